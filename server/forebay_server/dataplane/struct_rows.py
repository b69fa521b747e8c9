"""Rows of google.protobuf.Struct to tensors, many at once, by the extension.

Reading a row's values one by one costs Python more than the model's own work. The extension reads
all rows of a batch into one matrix, and checks them against the signature. A row
with anything odd (a wrong type, an unknown feature, a value to warn of) is only counted out here:
the plain way in tabular.py reads it again, and says what is wrong. So both agree by construction on
every row that this one takes; tests/unit/dataplane holds them to it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from math import inf
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forebay_server.repository.manifest import TabularHead

AVAILABLE = importlib.util.find_spec("forebay_native") is not None


class RowReader:
    """Reads rows for one signature."""

    def __init__(self, head: TabularHead) -> None:
        import forebay_native

        self._matrix = head.input if head.layout == "matrix" else None
        numbers = [f for f in head.features if f.type != "string"]
        strings = [f for f in head.features if f.type == "string"]
        self._numbers = [f.name for f in numbers]
        self._strings = [(f.name, frozenset(f.categories or ()), f.nullable) for f in strings]
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
            [f.name for f in strings],
        )

    def read(self, rows: Sequence[bytes]) -> tuple[dict[str, NDArray[Any]], NDArray[np.bool_]]:
        """The model's inputs, and which rows are good: [rows]. Rows that are not have any values."""
        raw, columns, odd = self._reader.read(rows)
        good = np.frombuffer(odd, np.uint8) == 0
        values = np.frombuffer(raw).reshape(len(rows), len(self._numbers)).astype(np.float32)
        for (_, known, nullable), column in zip(self._strings, columns, strict=True):
            for i, value in enumerate(column):
                if (value not in known and known) if value else not nullable:
                    good[i] = False
        if self._matrix is not None:
            return {self._matrix: values}, good
        tensors: dict[str, NDArray[Any]] = {
            name: values[:, i : i + 1] for i, name in enumerate(self._numbers)
        }
        for (name, _, _), column in zip(self._strings, columns, strict=True):
            tensors[name] = np.array(column, object).reshape(-1, 1)
        return tensors, good
