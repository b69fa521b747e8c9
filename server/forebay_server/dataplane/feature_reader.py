"""Tables to tensors, many at once, by the extension.

Reading a table's values one by one costs Python more than the model's own work, and keeps the
interpreter from all others meanwhile. The extension reads the tables of all calls that came together
into one matrix, and checks them against the signature. A call whose table has anything odd (a wrong
type, an unknown feature, a value to warn of) is left out here: the plain way in tabular.py reads it
again, and says what is wrong. So both agree by construction on every table that this one takes;
tests/unit/dataplane holds them to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forebay_server.dataplane.records import ColumnFields, Records
from forebay_server.repository.manifest import Feature, TabularHead

#: The model's inputs for the requests that are good; (place, rows) of each of them, in order; and the
#: places of the others.
Read = tuple[dict[str, NDArray[Any]], list[tuple[int, int]], list[int]]


def takes(features: Sequence[Feature]) -> list[tuple[str, float, float, bool]]:
    """What the extension takes for each feature of numbers without asking: its name, the least and the
    most, and whether it must be there."""
    return [
        (f.name, -inf if f.min is None else f.min, inf if f.max is None else f.max, not f.nullable)
        for f in features
    ]


class FeatureReader:
    """Reads tables for one signature."""

    def __init__(self, head: TabularHead) -> None:
        import forebay_native

        self._matrix = head.input if head.layout == "matrix" else None
        numbers = [f for f in head.features if f.type != "string"]
        strings = [f for f in head.features if f.type == "string"]
        self._numbers = [f.name for f in numbers]
        self._strings = [f.name for f in strings]
        self._reader = forebay_native.FeatureReader(
            takes(numbers),
            [(f.name, set(f.categories or ()), not f.nullable) for f in strings],
        )

    def rows(self, tables: Records) -> Read:
        """Tables whose records are rows of google.protobuf.Struct."""
        raw, texts, good, odd = self._reader.rows(tables.split, tables.members)
        values = np.frombuffer(raw, np.float32).reshape(-1, len(self._numbers))
        return self._read(tables, values, texts, good, odd)

    def columns(self, tables: Records, fields: ColumnFields) -> Read:
        """Tables whose records are columns of one feature each."""
        raw, texts, good, odd = self._reader.columns(tables.split, tables.members, fields)
        values = np.frombuffer(raw, np.float32).reshape(len(self._numbers), -1).T
        return self._read(tables, values, texts, good, odd)

    def _read(
        self,
        tables: Records,
        values: NDArray[np.float32],
        texts: Sequence[list[str]],
        good: list[tuple[int, int]],
        odd: list[int],
    ) -> Read:
        place = {at: i for i, at in enumerate(tables.members)}
        whole = [(place[at], n) for at, n in good]
        left = [place[at] for at in odd]
        if self._matrix is not None:
            return {self._matrix: np.ascontiguousarray(values)}, whole, left
        tensors: dict[str, NDArray[Any]] = {
            name: values[:, i : i + 1] for i, name in enumerate(self._numbers)
        }
        for name, column in zip(self._strings, texts, strict=True):
            tensors[name] = np.array(column, object).reshape(-1, 1)
        return tensors, whole, left
