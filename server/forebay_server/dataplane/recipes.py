"""How the transport answers calls by itself, like one that was answered well.

A model that is nothing but a regressor's trees takes some microseconds for a row, a tenth of what Python
takes to carry the call. Where a request differs from the one before in its records alone, the extension
can read it, walk the trees and write the answer; it is told how here. Whether it may, and for how long,
is the transport's affair (`transport/leasing.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from forebay_server.core.call import Principal
from forebay_server.dataplane.feature_reader import takes
from forebay_server.dataplane.models import ServedModel
from forebay_server.repository.manifest import TabularHead

if TYPE_CHECKING:
    import forebay_native

#: Rows of a request at most, and nodes that a request's rows visit together: about 50 microseconds, for
#: which the transport's thread serves nobody else.
MOST_ROWS, MOST_VISITS = 16, 20_000

#: The bytes behind an answer's values for so many rows, and where in them the milliseconds that the work
#: took go, as a double; None: such requests are not answered.
Ending = tuple[bytes, int | None] | None


@dataclass(frozen=True, slots=True)
class Recipe:
    """See the module.

    Attributes:
        head: the request without its records.
        make: the extension's form of it; None: it cannot answer such calls.
        valid: whether calls of a caller that ask the same still mean this model.
    """

    head: bytes
    model: ServedModel
    make: Callable[[], forebay_native.Recipe | None]
    valid: Callable[[Principal], bool]


def most_rows(model: ServedModel) -> int:
    """Rows of the requests that the extension may answer; 0 where it cannot, or should not."""
    trees = model.client.trees
    if trees is None:
        return 0
    import forebay_native

    visits = forebay_native.tree_visits(trees)
    return 0 if visits is None else min(MOST_ROWS, MOST_VISITS // max(1, visits))


def of_rows(
    model: ServedModel, field: int, each: bytes, endings: Sequence[Ending]
) -> forebay_native.Recipe | None:
    """For requests whose records in `field` are rows (google.protobuf.Struct) of numbers in the order of
    the model's features.

    Args:
        each: what stands before each value, a double, in an answer.
        endings: by the number of rows, from one on.
    """
    head, trees = model.manifest.tabular_head, model.client.trees
    if trees is None or not _plain(head):
        return None
    return _made(field, trees, takes(head.features), None, b"", each, True, endings)


def of_tensor(
    model: ServedModel, field: int, shape: tuple[int, int], before: bytes
) -> forebay_native.Recipe | None:
    """For requests whose record in `field` is a tensor of float32 of this shape, in its raw bytes.

    Args:
        before: an answer's bytes before the values, one float32 a row.
    """
    trees = model.client.trees
    rows, columns = shape
    if trees is None:
        return None
    endings: list[Ending] = [*([None] * (rows - 1)), (b"", None)]
    return _made(field, trees, None, (rows * columns * 4, columns), before, b"", False, endings)


def _plain(head: TabularHead) -> bool:
    numbers = all(f.type != "string" for f in head.features)
    return numbers and head.layout == "matrix" and head.classes is None


def _made(
    field: int,
    trees: int,
    numbers: list[tuple[str, float, float, bool]] | None,
    raw: tuple[int, int] | None,
    before: bytes,
    each: bytes,
    double: bool,
    endings: Sequence[Ending],
) -> forebay_native.Recipe | None:
    import forebay_native

    try:
        return forebay_native.Recipe(
            field, trees, numbers, raw, before, each, double, list(endings)
        )
    except ValueError:  # the model was unloaded meanwhile, or its trees want more columns
        return None
