"""Arrays that grow at their end while others read what was there before."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


class GrowingArray:
    """One writer appends; readers take `view()`, which no later append changes.

    Rows that are there are never moved: when the room is full, they are copied to a larger array
    and readers keep the old one.

    Args:
        dtype: of the elements.
        width: columns of a two-dimensional array; 0 = one dimension.
    """

    def __init__(self, dtype: Any, width: int = 0, first: NDArray[Any] | None = None) -> None:
        shape = (16, width) if width else (16,)
        self._data: NDArray[Any] = np.zeros(shape, dtype)
        self._n = 0
        if first is not None and len(first):
            self._data = np.array(first, dtype)
            self._n = len(first)

    def __len__(self) -> int:
        return self._n

    @property
    def nbytes(self) -> int:
        """Bytes that it holds, room to grow included."""
        return self._data.nbytes

    def append(self, rows: Any) -> None:
        """Add rows [n] or [n, width]."""
        rows = np.asarray(rows, self._data.dtype)
        need = self._n + len(rows)
        if need > len(self._data):
            larger = np.zeros((max(need, 2 * len(self._data)), *self._data.shape[1:]), rows.dtype)
            larger[: self._n] = self._data[: self._n]
            self._data = larger
        self._data[self._n : need] = rows
        self._n = need

    def view(self) -> NDArray[Any]:
        """What is there now. Not to be written."""
        n = self._n  # first: the array that holds n rows is never replaced by one with fewer
        return self._data[:n]
