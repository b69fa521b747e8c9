"""Columns of payload values by key, from which filters make masks of slots.

A slot is a point's place in the index; it is given once and never reused. Columns only grow, so
readers need no lock: they look at slots below their view's end.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forebay_server.indexes import filters as f
from forebay_server.indexes.arrays import GrowingArray

Mask = NDArray[np.bool_]
#: Characters of a text field's string up to which it is kept as a value, as other strings are.
LONGEST = 256
_LONG = ("long", True)
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}([T ]\d{2}:\d{2}(:\d{2}(\.\d+)?)?(Z|[+-]\d{2}:?\d{2})?)?")


def parse_date(text: str) -> float | None:
    """Seconds since 1970 of an RFC 3339 time or a plain date (midnight UTC); None for others."""
    if not 10 <= len(text) <= 40 or not _DATE.fullmatch(text):
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def flatten(payload: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, scalar) of every value; lists give one pair per element, nulls none."""
    for key, value in payload.items():
        path = prefix + key
        if isinstance(value, Mapping):
            yield from flatten(value, path + ".")
        elif isinstance(value, list):
            for element in value:
                if isinstance(element, Mapping):
                    yield from flatten(element, path + ".")
                elif element is not None and not isinstance(element, list):
                    yield path, element
        elif value is not None:
            yield path, value


class _Column:
    """The values of one key: numbers, and codes of strings and booleans, each with its slot."""

    def __init__(self) -> None:
        self.numbers = GrowingArray(np.float64)
        self.number_slots = GrowingArray(np.int32)
        self.codes = GrowingArray(np.int32)
        self.code_slots = GrowingArray(np.int32)
        self.code_of: dict[tuple[str, Any], int] = {}
        self.dates = GrowingArray(np.float64)
        self.date_slots = GrowingArray(np.int32)

    def arrays(self) -> dict[str, GrowingArray]:
        names = ("numbers", "number_slots", "codes", "code_slots", "dates", "date_slots")
        return {n: getattr(self, n) for n in names}


class PayloadIndex:
    """See the module. One writer, any readers."""

    def __init__(self, skip: Iterable[str] = ()) -> None:
        """Args: skip: text fields, whose strings of more than LONGEST are not kept as values."""
        self._skip = frozenset(skip)
        self._columns: dict[str, _Column] = {}

    def append(self, slots: Sequence[int], payloads: Sequence[Mapping[str, Any]]) -> None:
        """Index payloads of new slots."""
        rows: dict[str, list[list[Any]]] = {}
        for slot, payload in zip(slots, payloads, strict=True):
            for key, value in flatten(payload):
                self._add(rows.setdefault(key, [[] for _ in range(6)]), key, slot, value)
        for key, lists in rows.items():
            column = self._columns[key]
            # Values before slots: a reader cuts both to the shorter one.
            for array, values in zip(column.arrays().values(), lists, strict=True):
                array.append(values)

    def _add(self, lists: list[list[Any]], key: str, slot: int, value: Any) -> None:
        column = self._columns.get(key)
        if column is None:
            column = _Column()
            # A new dict: readers may be looking through the old one.
            self._columns = {**self._columns, key: column}
        if isinstance(value, int | float) and not isinstance(value, bool):
            lists[0].append(float(value))
            lists[1].append(slot)
            return
        # Of a long text only that it is there, which is no value that a condition can have.
        long = key in self._skip and isinstance(value, str) and len(value) > LONGEST
        code = column.code_of.setdefault(_LONG if long else f.tagged(value), len(column.code_of))
        lists[2].append(code)
        lists[3].append(slot)
        if isinstance(value, str) and not long:
            moment = parse_date(value)
            if moment is not None:
                lists[4].append(moment)
                lists[5].append(slot)

    @property
    def nbytes(self) -> int:
        """Bytes of the columns, roughly."""
        return sum(
            sum(a.nbytes for a in c.arrays().values()) + 120 * len(c.code_of)
            for c in self._columns.values()
        )

    def mask(
        self,
        condition: f.Filter,
        n: int,
        words: Callable[[f.Words, int], Mask],
        ids: Callable[[f.Ids, int], Mask],
    ) -> Mask:
        """Which of the slots below n match, deleted ones included.

        Args:
            words, ids: answer the conditions that this index does not hold.
        """

        def again(part: f.Filter) -> Mask:
            return self.mask(part, n, words, ids)

        if isinstance(condition, f.AllOf):
            return np.logical_and.reduce([again(c) for c in condition.filters])
        if isinstance(condition, f.AnyOf):
            return np.logical_or.reduce([again(c) for c in condition.filters])
        if isinstance(condition, f.NoneOf):
            return ~np.logical_or.reduce([again(c) for c in condition.filters])
        if isinstance(condition, f.Words):
            return words(condition, n)
        if isinstance(condition, f.Ids):
            return ids(condition, n)
        out = np.zeros(n, bool)
        if isinstance(condition, f.Exists):
            return self._exists(condition.key, out)
        column = self._columns.get(condition.key)
        if column is None:
            return out
        if isinstance(condition, f.InRange):
            slots, values = _pair(column.number_slots, column.numbers)
            low = values > condition.low if condition.low_open else values >= condition.low
            high = values < condition.high if condition.high_open else values <= condition.high
            _mark(out, slots[low & high])
        elif isinstance(condition, f.DateRange):
            slots, values = _pair(column.date_slots, column.dates)
            _mark(out, slots[(values >= condition.since) & (values < condition.until)])
        else:
            self._one_of(column, condition, out)
        return out

    def _exists(self, key: str, out: Mask) -> Mask:
        """Where there is a value at the key, or below it: an object is there by what it holds."""
        below = key + "."
        for path, column in self._columns.items():
            if path == key or path.startswith(below):
                _mark(out, column.number_slots.view())
                _mark(out, column.code_slots.view())
        return out

    def _one_of(self, column: _Column, condition: f.OneOf, out: Mask) -> None:
        numbers = [v for t, v in condition.values if t == "number"]
        codes = [column.code_of[v] for v in condition.values if v in column.code_of]
        if numbers:
            slots, values = _pair(column.number_slots, column.numbers)
            _mark(out, slots[_among(values, numbers)])
        if codes:
            slots, values = _pair(column.code_slots, column.codes)
            _mark(out, slots[_among(values, codes)])

    def state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Arrays and plain values that `restore` takes."""
        arrays: dict[str, NDArray[Any]] = {}
        codes: dict[str, Any] = {}
        for i, (key, column) in enumerate(self._columns.items()):
            codes[key] = [list(v) for v in column.code_of]
            for name, array in column.arrays().items():
                arrays[f"{i}.{name}"] = array.view()
        return arrays, codes

    def restore(self, arrays: Mapping[str, NDArray[Any]], codes: Mapping[str, Any]) -> None:
        """Take over a saved state."""
        columns = {}
        for i, (key, values) in enumerate(codes.items()):
            column = columns[key] = _Column()
            column.code_of = {(t, v): n for n, (t, v) in enumerate(values)}
            for name, array in column.arrays().items():
                setattr(column, name, GrowingArray(array.view().dtype, first=arrays[f"{i}.{name}"]))
        self._columns = columns


def _pair(slots: GrowingArray, values: GrowingArray) -> tuple[NDArray[Any], NDArray[Any]]:
    a, b = slots.view(), values.view()
    n = min(len(a), len(b))
    return a[:n], b[:n]


def _among(values: NDArray[Any], wanted: Sequence[Any]) -> Mask:
    if len(wanted) == 1:
        return values == wanted[0]
    return np.isin(values, np.asarray(wanted, values.dtype))


def _mark(out: Mask, slots: NDArray[Any]) -> None:
    if len(slots) and slots[-1] >= len(out):  # slots rise: what is newer than the view comes last
        slots = slots[: np.searchsorted(slots, len(out))]
    out[slots] = True
