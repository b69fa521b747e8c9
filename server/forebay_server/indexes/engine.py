"""Searches as an engine: what waits when a slot frees is one batch, and queries that agree in
collection, filter and parameters are one FAISS call. See core.interfaces.Engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from forebay.errors import ForebayError
from numpy.typing import NDArray

from forebay_server.core.interfaces import Batch, BatchPolicy, EngineSpec, Result
from forebay_server.indexes.collection import CollectionIndex, View
from forebay_server.indexes.dense import DenseQuery, set_threads
from forebay_server.indexes.filters import Filter
from forebay_server.indexes.fusion import Fusion, fuse

Mode = Literal["dense", "keyword", "hybrid"]


# These are made by the dozen for each search: frozen ones take five times as long to make.


@dataclass(slots=True, eq=False)
class SearchTask:
    """One search. `vector` [dimensions] and `text` are there as the mode needs them."""

    index: CollectionIndex
    mode: Mode
    limit: int
    candidates: int
    vector: NDArray[np.float32] | None = None
    text: str = ""
    condition: Filter | None = None
    fusion: Fusion = field(default_factory=Fusion)
    exact: bool = False
    ef_search: int = 0
    probes: int = 0
    boosts: Mapping[str, float] = field(default_factory=dict)
    threshold: float | None = None

    @property
    def shares_work(self) -> bool:
        """Whether a batch of such makes each cheaper: vectors that are all compared are read once for
        all. Walks through a graph, lists and words are each query's own."""
        dense = self.index.config.dense
        return self.mode == "dense" and dense is not None and (self.exact or dense.kind == "flat")

    @property
    def depth(self) -> int:
        """Points that each list needs."""
        return max(self.candidates, self.limit) if self.mode == "hybrid" else self.limit


@dataclass(slots=True)
class Found:
    """A point: its id, label and scores."""

    id: str
    label: int
    score: float
    dense_score: float | None = None
    keyword_score: float | None = None


class SearchEngine:
    """Runs batches of SearchTasks (each item's `inputs["tasks"]`)."""

    def __init__(
        self, policy: BatchPolicy, observe: Callable[[str, float], None] = lambda stage, s: None
    ) -> None:
        """Args: observe: called with stage and seconds, once a batch, on the engine's thread."""
        self.spec = EngineSpec("collections", 1, "faiss", "", "tensors", policy=policy)
        self._observe = observe
        self._set = False

    def load(self) -> None:
        """Nothing to load: indexes come with the tasks."""

    def warmup(self, shapes: Sequence[tuple[int, int]]) -> None:
        """Nothing to warm up."""

    def prepare(self, batch: Batch) -> list[SearchTask]:
        """The tasks of all items."""
        return [t for item in batch.items for t in item.inputs["tasks"]]  # type: ignore[call-overload]

    def execute(self, inputs: list[SearchTask]) -> list[list[Found] | ForebayError]:
        """Run all tasks; one that fails gives its error and disturbs no other."""
        if not self._set:  # FAISS's thread count belongs to the calling thread
            set_threads(1)
            self._set = True
        views = {id(t.index): t.index.view() for t in inputs}
        began = time.perf_counter()
        dense = self._dense(inputs, views)
        middle = time.perf_counter()
        out: list[list[Found] | ForebayError] = []
        for i, task in enumerate(inputs):
            found = dense.get(i, [])
            failed = isinstance(found, ForebayError)
            out.append(found if failed else _finish(task, views[id(task.index)], found))
        if dense:
            self._observe("dense", middle - began)
        if any(t.mode != "dense" for t in inputs):
            self._observe("keyword", time.perf_counter() - middle)
        return out

    def _dense(
        self, tasks: list[SearchTask], views: Mapping[int, View]
    ) -> dict[int, list[tuple[int, float]] | ForebayError]:
        groups: dict[tuple[Any, ...], list[int]] = {}
        for i, t in enumerate(tasks):
            if t.mode != "keyword":
                key = (id(t.index), t.condition, t.depth, t.exact, t.ef_search, t.probes)
                groups.setdefault(key, []).append(i)
        out: dict[int, list[tuple[int, float]] | ForebayError] = {}
        for members in groups.values():
            try:
                self._group(tasks, members, views, out)
            except ForebayError as e:  # an index that is away concerns its own searches
                out.update(dict.fromkeys(members, e))
        return out

    @staticmethod
    def _group(
        tasks: list[SearchTask],
        members: list[int],
        views: Mapping[int, View],
        out: dict[int, list[tuple[int, float]] | ForebayError],
    ) -> None:
        first = tasks[members[0]]
        index, view = first.index, views[id(first.index)]
        assert index.dense is not None and view.dense is not None
        allowed, whole = index.allowed(view, first.condition)
        queries = index.dense.prepared(np.stack([tasks[i].vector for i in members]))  # type: ignore[arg-type]
        how = DenseQuery(first.depth, first.exact, first.ef_search, first.probes)
        scores, slots = index.dense.search(view.dense, queries, allowed, whole, how)
        for i, s, p in zip(members, scores.tolist(), slots.tolist(), strict=True):
            out[i] = [(slot, score) for slot, score in zip(p, s, strict=True) if slot >= 0]

    def finish(self, outputs: list[Any], batch: Batch) -> Sequence[Result]:
        """What was found for each item's tasks."""
        results, at = [], 0
        for item in batch.items:
            results.append(outputs[at : at + item.rows])
            at += item.rows
        return results

    def check_health(self) -> None:
        """Always well."""

    def close(self) -> None:
        """Nothing to give back."""

    def info(self) -> Mapping[str, Any]:
        """Facts in force."""
        return {"threads": 1}


def _finish(task: SearchTask, view: View, dense: list[tuple[int, float]]) -> list[Found]:
    index = task.index
    keyword: list[tuple[int, float]] = []
    if task.mode != "dense":
        allowed, _ = index.allowed(view, task.condition)
        keyword = index.keyword_search(view, task.text, allowed, task.depth, task.boosts)
    hybrid = task.mode == "hybrid"
    if hybrid:
        ranking = fuse(dense, keyword, task.fusion)
    else:
        ranking = dense if task.mode == "dense" else keyword
    if task.threshold is not None:
        ranking = [r for r in ranking if r[1] >= task.threshold]
    labels, ids = index.labels.view(), index.ids
    ranking = ranking[: task.limit]
    found = labels[[slot for slot, _ in ranking]].tolist() if ranking else []
    if not hybrid:
        return [Found(ids[s], x, score) for (s, score), x in zip(ranking, found, strict=True)]
    by_dense, by_keyword = dict(dense), dict(keyword)
    return [
        Found(ids[slot], label, score, by_dense.get(slot), by_keyword.get(slot))
        for (slot, score), label in zip(ranking, found, strict=True)
    ]
