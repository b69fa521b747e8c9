"""Rows of google.protobuf.Struct to tensors, many at once, by the extension.

Reading a row's values one by one costs Python more than the model's own work. The extension reads
all rows of a batch into one matrix, and checks them against the signature. A call that has a row
with anything odd (a wrong type, an unknown feature, a value to warn of) is left out here: the plain
way in tabular.py reads it again, and says what is wrong. So both agree by construction on every row
that this one takes; tests/unit/dataplane holds them to it.
"""

from __future__ import annotations

from math import inf
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forebay_server.dataplane.records import Records
from forebay_server.repository.manifest import TabularHead


class RowReader:
    """Reads rows for one signature."""

    def __init__(self, head: TabularHead) -> None:
        import forebay_native

        self._matrix = head.input if head.layout == "matrix" else None
        numbers = [f for f in head.features if f.type != "string"]
        strings = [f for f in head.features if f.type == "string"]
        self._numbers = [f.name for f in numbers]
        self._strings = [f.name for f in strings]
        self._reader = forebay_native.RowReader(
            [
                (
                    f.name,
                    -inf if f.min is None else f.min,
                    inf if f.max is None else f.max,
                    not f.nullable,
                )
                for f in numbers
            ],
            [(f.name, set(f.categories or ()), not f.nullable) for f in strings],
        )

    def read(
        self, rows: Records
    ) -> tuple[dict[str, NDArray[Any]], list[tuple[int, int]], list[int]]:
        """The model's inputs for the requests that are good; (place, rows) of each of them, in
        order; and the places of the others."""
        raw, columns, good, odd = self._reader.read(rows.split, rows.members)
        place = {at: i for i, at in enumerate(rows.members)}
        values = np.frombuffer(raw, np.float32).reshape(-1, len(self._numbers))
        whole = [(place[at], n) for at, n in good]
        left = [place[at] for at in odd]
        if self._matrix is not None:
            return {self._matrix: values}, whole, left
        tensors: dict[str, NDArray[Any]] = {
            name: values[:, i : i + 1] for i, name in enumerate(self._numbers)
        }
        for name, column in zip(self._strings, columns, strict=True):
            tensors[name] = np.array(column, object).reshape(-1, 1)
        return tensors, whole, left
