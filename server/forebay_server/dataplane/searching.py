"""Searches on their way: embed the text where that is needed, queue, answer with payloads.

As with texts.py, nothing here waits: the jobs of all calls that arrived together are submitted
together, and each call is answered by the thread that finished its work.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from forebay.errors import ForebayError, Internal, InvalidArgument, Unavailable
from numpy.typing import NDArray

from forebay_server.core.batcher import BatchingEngineClient
from forebay_server.core.call import Call
from forebay_server.core.interfaces import Completion, EngineRequest, Item, Timing
from forebay_server.dataplane.collection_config import check_filter
from forebay_server.dataplane.collections import Collections
from forebay_server.dataplane.embedding import embedding_job, matrix
from forebay_server.dataplane.models import attempt, guarded
from forebay_server.dataplane.parts import as_part
from forebay_server.dataplane.texts import TextOutcome, TextPipeline
from forebay_server.dataplane.upkeep import OpenCollection
from forebay_server.indexes.engine import Found, Mode, SearchTask
from forebay_server.indexes.filters import Filter
from forebay_server.indexes.fusion import Fusion
from forebay_server.storage.collections import CollectionStore, PointRow

#: Searches that go through the queue together.
BLOCK = 8
#: Searches of a batch, at most: of those that share work, and of those that do not. Of the latter a
#: batch takes only as many as make its own cost small: the others are left to the next engine that is
#: free, which would else wait for answers to bring new searches while one engine works off all of them.
LARGEST, APART = 256, 16
#: Bytes of payloads that are kept in memory for the next searches.
PAYLOAD_CACHE_BYTES = 64 << 20


@dataclass(slots=True)
class SearchSpec:
    """One search as it was asked for. Zeros and None = defaults; see the contract."""

    collection: str
    vector: NDArray[np.float32] | None = None
    text: str = ""
    mode: Mode | None = None
    limit: int = 10
    condition: Filter | None = None
    fusion: Fusion = field(default_factory=Fusion)
    candidates: int = 0
    exact: bool = False
    ef_search: int = 0
    probes: int = 0
    threshold: float | None = None
    boosts: Mapping[str, float] = field(default_factory=dict)
    with_payload: bool = True
    with_vectors: bool = False
    condition_path: str = "filter"


@dataclass(slots=True)
class Hit:
    """A point that was found. `row` is None when its payload was not asked for."""

    found: Found
    row: PointRow | None


@dataclass(slots=True)
class SearchOutcome:
    """What one search gave. `embedded` says whether a model made its vector."""

    mode: Mode
    hits: list[Hit]
    embedded: bool


@dataclass(slots=True)
class SearchJob:
    """One call's search. `done` gets the outcome, on the thread that completed it."""

    call: Call
    spec: SearchSpec
    done: Callable[[SearchOutcome], None]


Ready = tuple[SearchJob, SearchTask, OpenCollection]


class SearchPipeline:
    """See the module. One per server."""

    def __init__(
        self,
        collections: Collections,
        client: BatchingEngineClient,
        texts: TextPipeline,
        points: PointReader,
    ) -> None:
        self._collections = collections
        self._client = client
        self._texts = texts
        self._points = points

    def run(self, jobs: Sequence[SearchJob]) -> None:
        """Start all jobs. Errors end their own calls."""
        ready: list[Ready] = []
        embeds = []
        for job in jobs:
            made = attempt(job.call, partial(self._task, job))
            if made is None:  # it has ended, or comes again
                continue
            task, collection = made
            job.call.facts.items = 1
            if task.mode != "keyword" and task.vector is None:
                embeds.append(self._embedding(job, task, collection))
            else:
                ready.append((job, task, collection))
        if embeds:
            self._texts.run(embeds)
        self._submit(ready)

    async def search(self, call: Call, spec: SearchSpec) -> SearchOutcome:
        """One search as part of another call, awaited on the event loop. Its facts are added."""

        def start(child: Call, done: Callable[[SearchOutcome], None]) -> None:
            self.run([SearchJob(child, spec, done)])

        outcome, child = await as_part(call, start)
        facts = call.facts
        if outcome.embedded:
            facts.model, facts.version = child.facts.model, child.facts.version
        facts.tokens += child.facts.tokens
        facts.engine_s += child.facts.engine_s
        return outcome

    def _embedding(self, job: SearchJob, task: SearchTask, collection: OpenCollection):
        def done(outcome: TextOutcome) -> None:
            vector = matrix(outcome)[0]
            self._submit([(job, replace(task, vector=vector), collection)], embedded=True)

        model = collection.config.embedding_model
        return embedding_job(job.call, model, [job.spec.text], "query", "text", done)

    def _task(self, job: SearchJob) -> tuple[SearchTask, OpenCollection] | None:
        spec = job.spec
        c = self._collections.resolve(job.call, spec.collection, lambda: self.run([job]))
        if c is None:
            return None
        mode = _mode(c, spec)
        dense = c.config.dense
        if spec.vector is not None and dense is not None and len(spec.vector) != dense.dimensions:
            raise InvalidArgument.at(
                "vector", f"has {len(spec.vector)} numbers; {dense.dimensions} are needed"
            )
        if spec.condition is not None:
            check_filter(c.config, spec.condition, spec.condition_path)
        known = [f.path for f in c.config.text_fields]
        for path in spec.boosts:
            if path not in known:
                raise InvalidArgument.at(
                    f"field_boosts.{path}",
                    f"is no text field; they are {', '.join(known) or 'none'}",
                )
        task = SearchTask(
            c.index,
            mode,
            spec.limit,
            spec.candidates or max(50, 4 * spec.limit),
            spec.vector,
            spec.text,
            spec.condition,
            spec.fusion,
            spec.exact,
            spec.ef_search,
            spec.probes,
            spec.boosts,
            spec.threshold,
        )
        return task, c

    def _submit(self, ready: Sequence[Ready], embedded: bool = False) -> None:
        """Queue searches in blocks of some that came together: see dataplane/blocks.py. A block is
        small, so that all engines have their part of what waits."""
        blocks = [ready[i : i + BLOCK] for i in range(0, len(ready), BLOCK)]
        requests = []
        for block in blocks:
            tasks = [task for _, task, _ in block]
            deadlines = [job.call.deadline for job, _, _ in block]
            known = [d for d in deadlines if d is not None]
            latest = max(known) if len(known) == len(deadlines) else None
            # The policy bounds length x rows of a batch by LARGEST.
            length = 1 if all(t.shares_work for t in tasks) else LARGEST // APART
            item = Item({"tasks": tasks}, length, len(tasks))  # type: ignore[dict-item]
            first = block[0][0].call.request_id
            requests.append(EngineRequest([item], first, latest, calls=len(block)))
        if not requests:
            return
        for block, completion in zip(blocks, self._client.submit(requests), strict=True):
            if len(block) == 1:
                block[0][0].call.on_cancel(completion.cancel)
            completion.add_done_callback(partial(self._completed, block, embedded))

    def _completed(self, block: Sequence[Ready], embedded: bool, completion: Completion) -> None:
        """Runs on the engine's thread."""
        error, timing = completion.error(), completion.timing
        if len(block) > 1 and isinstance(error, InvalidArgument | Internal):
            for one in block:  # what may be one search's fault is no other's
                guarded(one[0].call, partial(self._submit, [one], embedded))
            return
        results: Any = completion.result()[0] if error is None else [error] * len(block)
        for (job, task, collection), found in zip(block, results, strict=True):
            if job.call.code is None:
                run = partial(self._found, job, task, collection, embedded, timing, found)
                guarded(job.call, run)

    def _found(
        self,
        job: SearchJob,
        task: SearchTask,
        collection: OpenCollection,
        embedded: bool,
        timing: Timing,
        found: list[Found] | ForebayError,
    ) -> None:
        call = job.call
        call.facts.queue_s += timing.queue_s
        call.facts.compute_s += timing.execute_s
        call.facts.engine_s += timing.execute_s / max(1, timing.batch_rows)
        call.facts.batch_rows = timing.batch_rows
        if isinstance(found, ForebayError):
            call.fail(found, cause=found)
            return

        def answer(rows: Mapping[int, PointRow] | None) -> None:
            if rows is None:
                hits = [Hit(f, None) for f in found]
            else:  # a point may have been removed meanwhile: it is no answer any more
                hits = [Hit(f, rows[f.label]) for f in found if f.label in rows]
            guarded(call, lambda: job.done(SearchOutcome(task.mode, hits, embedded)))

        spec = job.spec
        if not found or not (spec.with_payload or spec.with_vectors):
            answer(None)
            return
        labels = [f.label for f in found]
        self._points.read(collection.row.id, labels, spec.with_vectors, answer, call)


def _mode(c: OpenCollection, spec: SearchSpec) -> Mode:
    """The mode that a request asks for, or means. Raises InvalidArgument for what cannot be."""
    dense, words = c.config.dense is not None, bool(c.config.text_fields)
    text, model = bool(spec.text.strip()), bool(c.config.embedding_model)
    if spec.vector is None and not text:
        raise InvalidArgument.at("vector", "vector or text must be given")
    mode = spec.mode
    if mode is None:
        if spec.vector is not None:
            mode = "hybrid" if text and words else "dense"
        elif words:
            mode = "hybrid" if dense and model else "keyword"
        else:
            mode = "dense"
    if mode != "keyword":
        if not dense:
            raise InvalidArgument.at("mode", "needs vectors, which the collection has not")
        if spec.vector is None and not model:
            raise InvalidArgument.at(
                "vector", "must be given: the collection has no embedding model"
            )
    if mode != "dense":
        if not words:
            raise InvalidArgument.at("mode", "needs text fields, which the collection has not")
        if not text:
            raise InvalidArgument.at("text", "must be given for keyword search")
    return mode


Answer = Callable[[Mapping[int, PointRow]], None]


class PointReader:
    """Reads payloads: from memory what was read before, the rest of all waiting searches by one
    look into the database."""

    def __init__(
        self,
        store: CollectionStore,
        loop: asyncio.AbstractEventLoop,
        observe: Callable[[str, float], None] = lambda stage, s: None,
        room: int = PAYLOAD_CACHE_BYTES,
    ) -> None:
        self._store = store
        self._observe = observe
        self._loop = loop
        self._room = room
        self._kept: OrderedDict[tuple[int, int], PointRow] = OrderedDict()
        self._kept_bytes = 0
        self._waiting: list[tuple[int, list[int], bool, Answer, Call]] = []
        self._lock = threading.Lock()

    def read(
        self, collection_id: int, labels: list[int], vectors: bool, answer: Answer, call: Call
    ) -> None:
        """Give the rows to `answer`, at once or on the event loop. Labels are never reused, so
        what is kept is never stale; whoever looks must know that the point is alive."""
        if not vectors:
            with self._lock:
                rows = {x: r for x in labels if (r := self._kept.get((collection_id, x)))}
                for x in rows:
                    self._kept.move_to_end((collection_id, x))
            if len(rows) == len(set(labels)):
                answer(rows)
                return
        with self._lock:
            self._waiting.append((collection_id, labels, vectors, answer, call))
            first = len(self._waiting) == 1
        if first:
            future = asyncio.run_coroutine_threadsafe(self._read_waiting(), self._loop)
            future.add_done_callback(_observe)

    async def _read_waiting(self) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, []
        by_kind: dict[tuple[int, bool], set[int]] = {}
        for collection_id, labels, vectors, _, _ in waiting:
            by_kind.setdefault((collection_id, vectors), set()).update(labels)
        found: dict[tuple[int, bool], dict[int, PointRow]] = {}
        for (collection_id, vectors), labels in by_kind.items():
            began = time.perf_counter()
            try:
                rows = await self._store.by_labels(collection_id, sorted(labels), vectors)
            except Exception as e:
                error = Unavailable("payloads could not be read", retry_after_s=1.0)
                for w in waiting:
                    if (w[0], w[2]) == (collection_id, vectors):
                        w[4].fail(error, cause=e)
                continue
            self._observe("payload", time.perf_counter() - began)
            found[collection_id, vectors] = rows
            if not vectors:
                self._keep(collection_id, rows)
        for collection_id, labels, vectors, answer, call in waiting:
            rows = found.get((collection_id, vectors))
            if rows is not None:
                guarded(call, partial(answer, {x: rows[x] for x in labels if x in rows}))

    def _keep(self, collection_id: int, rows: Mapping[int, PointRow]) -> None:
        with self._lock:
            for label, row in rows.items():
                if (collection_id, label) not in self._kept:
                    self._kept[collection_id, label] = row
                    self._kept_bytes += len(row.payload) + 300
            while self._kept_bytes > self._room and self._kept:
                _, row = self._kept.popitem(last=False)
                self._kept_bytes -= len(row.payload) + 300


def _observe(future: Future[None]) -> None:
    if not future.cancelled():
        future.exception()
