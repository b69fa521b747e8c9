"""Tabular prediction: rows of named values, checked against a model's signature, as tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from forebay.errors import FieldViolation, InvalidArgument, TooLarge
from numpy.typing import NDArray

from forebay_server.core.call import Call
from forebay_server.core.interfaces import Completion, EngineRequest, Item
from forebay_server.dataplane.models import (
    ModelAccess,
    ServedModel,
    attempt,
    guarded,
    located,
)
from forebay_server.repository.manifest import Feature, TabularHead

TASKS = ("tabular-regression", "tabular-classification")
#: One value of a row: None is missing.
Value = float | str | bool | None
MAX_VIOLATIONS = 20


@dataclass(frozen=True, slots=True)
class Table:
    """Values by column, one list per feature of the caller, all of one length.

    `path(name, row)` is where a value stands in the request, for errors.
    """

    columns: dict[str, Sequence[Value]]
    rows: int
    path: Callable[[str, int], str]


@dataclass(slots=True)
class TabularOutcome:
    """What the model said: raw outputs [rows, ...], and per row what was odd."""

    model: ServedModel
    outputs: dict[str, NDArray[Any]]
    warnings: list[list[str]]


@dataclass(slots=True)
class TabularJob:
    """One call's table on its way. `done` gets the outcome on the thread that completed it."""

    call: Call
    ref: str
    table: Callable[[], Table]
    done: Callable[[TabularOutcome], None]
    sticky_key: str = ""


class TabularPipeline:
    """Resolve, check, convert, submit, answer. One per server."""

    def __init__(self, access: ModelAccess, max_items: int) -> None:
        self._access = access
        self._max_items = max_items

    def run(self, jobs: Sequence[TabularJob]) -> None:
        """Start all jobs. Errors end their own calls."""
        groups: dict[int, tuple[ServedModel, list[TabularJob]]] = {}
        for job in jobs:
            model = self._access.resolve(
                job.call, job.ref, TASKS, job.sticky_key, lambda m, j=job: self._start(m, [j])
            )
            if model is not None:
                groups.setdefault(id(model), (model, []))[1].append(job)
        for model, group in groups.values():
            self._start(model, group)

    def _checked(
        self, head: TabularHead, job: TabularJob
    ) -> tuple[Table, dict[str, NDArray[Any]], list[list[str]]]:
        table = job.table()
        if table.rows > self._max_items:
            raise TooLarge("rows", size=table.rows, limit=self._max_items, unit="rows")
        return table, *to_tensors(head, table)

    def _start(self, model: ServedModel, jobs: list[TabularJob]) -> None:
        head = model.manifest.tabular_head
        batch = model.client.spec.policy.max_batch_size
        live: list[tuple[TabularJob, list[list[str]]]] = []
        requests: list[EngineRequest] = []
        for job in jobs:
            checked = attempt(job.call, partial(self._checked, head, job))
            if checked is None:
                continue
            table, tensors, warnings = checked
            facts = job.call.facts
            facts.model, facts.version, facts.items = model.name, model.version, table.rows
            items = [
                Item(
                    {k: v[i : i + batch] for k, v in tensors.items()},
                    rows=min(batch, table.rows - i),
                )
                for i in range(0, table.rows, batch)
            ]
            live.append((job, warnings))
            requests.append(EngineRequest(items, job.call.request_id, job.call.deadline))
        for (job, warnings), completion in zip(
            live, self._access.submit(model, requests), strict=True
        ):
            job.call.on_cancel(completion.cancel)
            completion.add_done_callback(lambda c, j=job, w=warnings: _completed(model, j, w, c))


def _completed(
    model: ServedModel, job: TabularJob, warnings: list[list[str]], completion: Completion
) -> None:
    facts, timing = job.call.facts, completion.timing
    facts.queue_s = timing.queue_s
    facts.compute_s = timing.prepare_s + timing.execute_s + timing.finish_s
    facts.batch_rows = timing.batch_rows
    facts.engine_s = timing.execute_s * min(1.0, facts.items / max(1, timing.batch_rows))
    error = completion.error()
    if error is not None:
        job.call.fail(located(error, "rows" if completion.failed_item is not None else None), error)
        return
    blocks: Sequence[Any] = completion.result()
    outputs = (
        dict(blocks[0])
        if len(blocks) == 1
        else {k: np.concatenate([b[k] for b in blocks]) for k in blocks[0]}
    )
    guarded(job.call, lambda: job.done(TabularOutcome(model, outputs, warnings)))


def to_tensors(head: TabularHead, table: Table) -> tuple[dict[str, NDArray[Any]], list[list[str]]]:
    """The model's inputs from a table, and what is odd about each row.

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
    warnings: list[list[str]] = [[] for _ in range(table.rows)]
    columns: dict[str, NDArray[Any]] = {}
    missing: Sequence[Value] = [None] * table.rows
    for feature in head.features:
        values = table.columns.get(feature.name, missing)
        if feature.type == "string":
            columns[feature.name] = _strings(feature, values, table, bad, warnings)
        else:
            columns[feature.name] = _numbers(feature, values, table, bad, warnings)
        if len(bad) >= MAX_VIOLATIONS:
            break
    if bad:
        raise InvalidArgument(bad[:MAX_VIOLATIONS])
    if head.layout == "matrix":
        stacked = np.stack([columns[f.name] for f in head.features], axis=1)
        return {head.input: stacked.astype(np.float32)}, warnings
    return {name: column.reshape(-1, 1) for name, column in columns.items()}, warnings


def _numbers(
    feature: Feature,
    values: Sequence[Value],
    table: Table,
    bad: list[FieldViolation],
    warnings: list[list[str]],
) -> NDArray[np.float32]:
    out = np.empty(len(values), np.float32)
    low, high = feature.min, feature.max
    for i, value in enumerate(values):
        if isinstance(value, (int, float)):  # bool is an int: true counts as 1
            number = float(value)
            if math.isfinite(number):
                out[i] = number
                if (low is not None and number < low) or (high is not None and number > high):
                    warnings[i].append(
                        f"{feature.name} is {number:g}, outside the range seen in training, "
                        f"{low:g} to {high:g}"
                    )
                continue
            if math.isinf(number):
                bad.append(FieldViolation(table.path(feature.name, i), "is infinite"))
                continue
            value = None
        if value is None:
            out[i] = np.nan
            if not feature.nullable:
                bad.append(
                    FieldViolation(table.path(feature.name, i), "is missing; a number is needed")
                )
        else:
            bad.append(
                FieldViolation(
                    table.path(feature.name, i), f"is the string {value!r:.60}; a number is needed"
                )
            )
    return out


def _strings(
    feature: Feature,
    values: Sequence[Value],
    table: Table,
    bad: list[FieldViolation],
    warnings: list[list[str]],
) -> NDArray[np.object_]:
    out = np.empty(len(values), object)
    categories = frozenset(feature.categories or ())
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
                warnings[i].append(
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
