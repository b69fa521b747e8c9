"""Tabular prediction: rows of named values, checked against a model's signature, as tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from forebay.errors import FieldViolation, InvalidArgument, TooLarge
from numpy.typing import NDArray

from forebay_server.core.call import Call
from forebay_server.core.collector import pass_on
from forebay_server.dataplane.blocks import Blocks, answer_each
from forebay_server.dataplane.feature_reader import FeatureReader
from forebay_server.dataplane.models import ModelAccess, ServedModel, guarded
from forebay_server.dataplane.records import ColumnFields, Records
from forebay_server.repository.manifest import Feature, TabularHead

TASKS = ("tabular-regression", "tabular-classification")
#: One value of a row: None is missing.
Value = float | str | bool | None
Column = Sequence[Value] | NDArray[np.float64]
#: What was odd, by row; most rows are not in it.
Warnings = Mapping[int, Sequence[str]]
MAX_VIOLATIONS = 20


@dataclass(frozen=True, slots=True)
class Table:
    """Values by column, one list per feature of the caller, all of one length.

    An array is a column of numbers, NaN where missing. `path(name, row)` is where a value stands in
    the request, for errors.
    """

    columns: dict[str, Column]
    rows: int
    path: Callable[[str, int], str]


@dataclass(slots=True)
class TabularOutcome:
    """What the model said: raw outputs [rows, ...], and what was odd about which row."""

    model: ServedModel
    rows: int
    outputs: Mapping[str, NDArray[Any]]
    warnings: Warnings


@dataclass(slots=True)
class TabularJob:
    """One call's table of so many rows on its way. `done` gets the outcome on the thread that
    completed it."""

    call: Call
    ref: str
    rows: int
    table: Callable[[], Table]
    done: Callable[[TabularOutcome], None]
    sticky_key: str = ""


class TabularPipeline:
    """Resolve, check, convert, submit, answer. One per server."""

    def __init__(self, access: ModelAccess, max_items: int) -> None:
        self._access = access
        self.max_items = max_items
        self._readers: WeakKeyDictionary[ServedModel, FeatureReader] = WeakKeyDictionary()

    def run(self, jobs: Sequence[TabularJob]) -> None:
        """Start all jobs. Errors end their own calls.

        Those that the queue will not take are told so before the tables of the others are made,
        which takes a millisecond for each few thousand values. (Where the queue is nearly full, one
        whose table then turns out bad has kept room; the refused ones have RetryInfo.)
        """
        starting: list[tuple[TabularJob, ServedModel]] = []
        ahead: dict[ServedModel, int] = {}
        for job in jobs:
            model = self._access.resolve(
                job.call, job.ref, TASKS, job.sticky_key, partial(self._admit_and_start, job)
            )
            if model is not None and self._admitted(job, model, ahead.get(model, 0)):
                ahead[model] = ahead.get(model, 0) + job.rows
                starting.append((job, model))
        if starting and len(starting) < len(jobs):
            pass_on()
        for job, model in starting:
            guarded(job.call, partial(self._start, job, model))

    def run_together(
        self,
        calls: Sequence[Call],
        ref: str,
        sticky_key: str,
        tables: Records,
        done: Callable[
            [ServedModel, Sequence[Call], Sequence[int], Mapping[str, NDArray[Any]]], None
        ],
        columns: ColumnFields | None = None,
    ) -> list[Call]:
        """Start calls whose tables can be read together.

        Args:
            tables: the tables of the calls: rows of google.protobuf.Struct or, with `columns`, columns.
            done: gets the model, calls, rows of each, and outputs [rows, ...]; see blocks.Done.

        Returns: the calls that are left for `run`, which knows how to load a model, to split traffic,
        and to say what is odd about a table.
        """
        model = self._access.common(calls, ref, TASKS, sticky_key)
        if model is None:
            return list(calls)
        reader = self._readers.get(model)
        if reader is None:
            reader = self._readers[model] = FeatureReader(model.manifest.tabular_head)
        if columns is None:
            if self._access.refused(model, ref, calls):
                return []
            tensors, good, odd = reader.rows(tables)
            if sum(n for _, n in good) > self.max_items:
                return list(calls)
            left = [calls[i] for i in odd]
        else:
            calls, tables, left = self._admit_tables(model, ref, calls, tables, columns)
            tensors, good, odd = reader.columns(tables, columns)
            left += [calls[i] for i in odd]
        if good:
            blocks = Blocks(self._access, model, "rows", partial(done, model))
            blocks.submit(tensors, [calls[i] for i, _ in good], [n for _, n in good])
        return left

    def _admit_tables(
        self,
        model: ServedModel,
        ref: str,
        calls: Sequence[Call],
        tables: Records,
        columns: ColumnFields,
    ) -> tuple[list[Call], Records, list[Call]]:
        """The calls that the queue will take, with their tables, and those that are too large; the
        others are ended, before any table is read."""
        places, large, ahead = [], [], 0
        for i, (call, rows) in enumerate(zip(calls, tables.column_sizes(columns), strict=True)):
            if rows > self.max_items:
                large.append(call)
            elif not self._access.refused(model, ref, [call], rows, ahead):
                ahead += rows
                places.append(i)
        if len(places) + len(large) < len(calls):
            pass_on()
        return [calls[i] for i in places], tables.only(places), large

    def _admitted(self, job: TabularJob, model: ServedModel, ahead: int = 0) -> bool:
        """Whether the queue will take it, behind so many rows of other jobs; else it is ended."""
        if job.rows > self.max_items:
            limit = self.max_items
            job.call.fail(TooLarge("rows", size=job.rows, limit=limit, unit="rows"))
            return False
        return not self._access.refused(model, job.ref, [job.call], job.rows, ahead)

    def _admit_and_start(self, job: TabularJob, model: ServedModel) -> None:
        if self._admitted(job, model):
            self._start(job, model)

    def _start(self, job: TabularJob, model: ServedModel) -> None:
        table = job.table()
        tensors, warnings = to_tensors(model.manifest.tabular_head, table)

        def answer(call: Call, n: int, outputs: Mapping[str, NDArray[Any]]) -> None:
            job.done(TabularOutcome(model, n, outputs, warnings))

        blocks = Blocks(self._access, model, "rows", answer_each(answer))
        blocks.submit(tensors, [job.call], [table.rows])


def to_tensors(head: TabularHead, table: Table) -> tuple[dict[str, NDArray[Any]], Warnings]:
    """The model's inputs from a table, and what is odd about its rows.

    Raises:
        InvalidArgument: unknown features, missing values that may not be missing, wrong types;
            every violation (at most 20) with its path and what is allowed.
    """
    bad: list[FieldViolation] = []
    known = head.by_name
    for name in table.columns:
        if name not in known:
            bad.append(
                FieldViolation(
                    table.path(name, 0),
                    f"is no feature of this model; its features are {', '.join(known)}",
                )
            )
    warnings: dict[int, list[str]] = {}
    columns: dict[str, NDArray[Any]] = {}
    plain = _plain(head, table)
    for feature in head.features:
        name = feature.name
        if name in plain:
            columns[name] = plain[name]
            continue
        values = table.columns.get(name)
        if values is None:
            values = np.full(table.rows, np.nan)
        if feature.type == "string":
            if isinstance(values, np.ndarray):
                values = [None if math.isnan(v) else v for v in values.tolist()]
            columns[name] = _strings(feature, values, table, bad, warnings)
        elif isinstance(values, np.ndarray):
            columns[name] = _array(feature, values, table, bad, warnings)
        else:
            columns[name] = _numbers(feature, values, table, bad, warnings)
        if len(bad) >= MAX_VIOLATIONS:
            break
    if bad:
        raise InvalidArgument(bad[:MAX_VIOLATIONS])
    if head.layout == "matrix":
        stacked = np.stack([columns[f.name] for f in head.features], axis=1)
        return {head.input: stacked.astype(np.float32)}, warnings
    return {name: column.reshape(-1, 1) for name, column in columns.items()}, warnings


def _plain(head: TabularHead, table: Table) -> dict[str, NDArray[np.float32]]:
    """The columns of numbers about which nothing is odd. Looked at together: eight columns one by one
    take numpy three times as long."""
    numbers, given = [], []
    for feature in head.features:
        values = table.columns.get(feature.name)
        if feature.type != "string" and isinstance(values, np.ndarray):
            numbers.append(feature)
            given.append(values)
    if not numbers:
        return {}
    matrix = np.concatenate(given).reshape(len(numbers), table.rows)
    low = np.array([[-math.inf if f.min is None else f.min] for f in numbers])
    high = np.array([[math.inf if f.max is None else f.max] for f in numbers])
    fine = np.all((matrix >= low) & (matrix <= high) & np.isfinite(matrix), axis=1).tolist()
    with np.errstate(over="ignore"):  # infinite, as it is for a model of float32
        columns = matrix.astype(np.float32)
    return {f.name: columns[i] for i, f in enumerate(numbers) if fine[i]}


def _array(
    feature: Feature,
    values: NDArray[np.float64],
    table: Table,
    bad: list[FieldViolation],
    warnings: dict[int, list[str]],
) -> NDArray[np.float32]:
    """As `_numbers`, for numbers that are an array already: what is odd is looked at one by one."""
    low = -math.inf if feature.min is None else feature.min
    high = math.inf if feature.max is None else feature.max
    plain = (values >= low) & (values <= high) & np.isfinite(values)
    for i in np.flatnonzero(~plain).tolist():
        _number(feature, float(values[i]), i, table, bad, warnings)
    with np.errstate(over="ignore"):  # infinite, as it is for a model of float32
        return values.astype(np.float32)


def _number(
    feature: Feature,
    number: float,
    i: int,
    table: Table,
    bad: list[FieldViolation],
    warnings: dict[int, list[str]],
) -> None:
    """What is odd about a number of row i; NaN is missing."""
    low, high = feature.min, feature.max
    if math.isinf(number):
        bad.append(FieldViolation(table.path(feature.name, i), "is infinite"))
    elif math.isnan(number):
        if not feature.nullable:
            bad.append(
                FieldViolation(table.path(feature.name, i), "is missing; a number is needed")
            )
    elif (low is not None and number < low) or (high is not None and number > high):
        warnings.setdefault(i, []).append(
            f"{feature.name} is {number:g}, outside the range seen in training, {_range(low, high)}"
        )


def _range(low: float | None, high: float | None) -> str:
    if low is None:
        return f"{high:g} and less"
    return f"{low:g} and more" if high is None else f"{low:g} to {high:g}"


def _numbers(
    feature: Feature,
    values: Sequence[Value],
    table: Table,
    bad: list[FieldViolation],
    warnings: dict[int, list[str]],
) -> NDArray[np.float32]:
    out = np.full(len(values), np.nan)
    for i, value in enumerate(values):
        if isinstance(value, str):
            bad.append(
                FieldViolation(
                    table.path(feature.name, i), f"is the string {value!r:.60}; a number is needed"
                )
            )
            out[i] = 0  # any number: the call is refused, and not for a missing value too
        elif value is not None:  # bool is an int: true counts as 1
            out[i] = value
    return _array(feature, out, table, bad, warnings)


def _strings(
    feature: Feature,
    values: Sequence[Value],
    table: Table,
    bad: list[FieldViolation],
    warnings: dict[int, list[str]],
) -> NDArray[np.object_]:
    values = values[:]  # of a message's field, each look at a value makes a new string
    categories = frozenset(feature.categories or ())
    found = set(values)
    if all(type(v) is str and v for v in found) and (not categories or found <= categories):
        return np.fromiter(values, object, len(values))
    out = np.empty(len(values), object)
    for i, value in enumerate(values):
        if value is None or value == "":
            out[i] = ""
            if not feature.nullable:
                bad.append(
                    FieldViolation(table.path(feature.name, i), "is missing; a string is needed")
                )
        elif isinstance(value, str):
            out[i] = value
            if categories and value not in categories:
                warnings.setdefault(i, []).append(
                    f"{feature.name} is {value!r:.60}, which was not seen in training; "
                    f"known are {', '.join(sorted(categories))}"
                )
        else:
            bad.append(
                FieldViolation(
                    table.path(feature.name, i), f"is the number {value:g}; a string is needed"
                )
            )
    return out
