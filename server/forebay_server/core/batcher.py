"""Queue, batches and threads around engines: the EngineClient of engines that do not batch.

One thread per engine slot: cut when the slot is free, prepare, execute, finish. The busy engine is
the timer. Two overlaps, each only where it pays:

- The next batch is prepared while one executes, but only when a full batch waits: an early cut of a
  partial batch would miss the items that arrive meanwhile.
- Results are split and callbacks run on a second thread, but only when more work waits: a lone
  caller would pay a thread hop (about 50 microseconds) for nothing.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from forebay.errors import (
    DeadlineExceeded,
    ForebayError,
    Internal,
    InvalidArgument,
    QueueFull,
    Unavailable,
)

from forebay_server.core.completion import RequestCompletion
from forebay_server.core.interfaces import (
    Batch,
    Clock,
    Completion,
    Engine,
    EngineRequest,
    EngineSpec,
    Result,
)
from forebay_server.core.quarantine import Quarantine
from forebay_server.core.queue import Cut, Entry, RequestQueue
from forebay_server.core.statistics import EngineStatistics

log = logging.getLogger("forebay.batcher")

#: A stage is given to a second thread only when it takes longer than this, in seconds.
WORTH_A_HOP = 0.0003
#: Restarts in a row that fail before waiting requests are given up.
PATIENCE = 3
BACKOFF_S, MAX_BACKOFF_S = 0.05, 5.0


@dataclass(frozen=True, slots=True)
class BatchReport:
    """What an observer learns of a batch; times in seconds."""

    rows: int
    tokens: int
    padded_tokens: int
    queue_s: float
    execute_s: float
    queue_depth: int


class BatchingEngineClient:
    """See interfaces.EngineClient.

    Args:
        engines: loaded engines of one spec; each is a slot with a thread of its own.
        clock: monotonic seconds; deadlines are on it.
        observer: called once per batch, on an engine's thread.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        clock: Clock = time.monotonic,
        observer: Callable[[BatchReport], None] | None = None,
        name: str = "",
    ) -> None:
        self.spec: EngineSpec = engines[0].spec
        self.engines = list(engines)
        self.statistics = EngineStatistics()
        self.quarantine = Quarantine()
        self._clock = clock
        self._observer = observer
        self._queue = RequestQueue(self.spec.policy)
        self._work = threading.Condition(threading.Lock())
        self._closing = False
        self._down: Unavailable | None = None
        self._name = name or f"{self.spec.model}@{self.spec.version}"
        self._slots = [_Slot(self, e, f"{self._name}#{i}") for i, e in enumerate(engines)]
        for slot in self._slots:
            slot.start()

    # The callers' side.

    def submit(self, requests: Sequence[EngineRequest]) -> list[Completion]:
        """Queue all; one that is refused comes back failed."""
        now = self._clock()
        out = [RequestCompletion(r, now, self._cancelled) for r in requests]
        refused: list[tuple[RequestCompletion, ForebayError]] = []
        with self._work:
            for completion in out:
                error = self._admit(completion)
                if error is not None:
                    refused.append((completion, error))
            self._work.notify(min(len(self._slots), max(1, len(out))))
        for completion, error in refused:
            kind = "rejected" if isinstance(error, QueueFull) else "fail"
            self.statistics.ended(kind, 0.0, 0.0, time.time())
            item = getattr(error, "_item", None)
            completion.fail(error, item)
        return out  # type: ignore[return-value]

    def _admit(self, completion: RequestCompletion) -> ForebayError | None:
        if self._closing:
            return Unavailable("the model is being unloaded", reason="DRAINING", retry_after_s=1.0)
        if self._down is not None:
            return self._down
        if not completion.request.items:
            return InvalidArgument.at("items", "has no elements")
        if not self.quarantine.empty:
            error = self._screen(completion.request)
            if error is not None:
                return error
        try:
            self._queue.push(completion, self.statistics.rows_per_second * len(self._slots))
        except QueueFull as e:
            return e
        return None

    def _screen(self, request: EngineRequest) -> ForebayError | None:
        for index, item in enumerate(request.items):
            reason = self.quarantine.verdict(item)
            if reason is not None:
                error = InvalidArgument.at("items", reason, reason="ITEM_QUARANTINED")
                error._item = index  # type: ignore[attr-defined]
                return error
            if self.quarantine.is_suspect(item):
                item.group = f"suspect:{id(item)}"  # equal to nobody's: it runs alone
        return None

    def _cancelled(self, completion: RequestCompletion) -> None:
        with self._work:
            self._queue.discard(completion)
        self.statistics.ended("cancelled", 0.0, 0.0, time.time())

    def stats(self) -> Mapping[str, Any]:
        """The statistics object, queue depth and the engines' own facts."""
        return {
            "statistics": self.statistics,
            "queue_depth": self._queue.waiting_rows,
            "engines": [dict(e.info()) for e in self.engines],
        }

    def check_health(self) -> None:
        """Raise Unavailable when a request cannot succeed now."""
        if self._down is not None:
            raise self._down
        for engine in self.engines:
            engine.check_health()

    def close(self, timeout_s: float = 10.0) -> None:
        """Finish what waits within the time, fail the rest, close the engines. Idempotent."""
        until = time.monotonic() + timeout_s
        with self._work:
            self._closing = True
            self._work.notify_all()
        for slot in self._slots:
            slot.thread.join(max(0.0, until - time.monotonic()))
        self._fail_waiting(
            Unavailable("the model was unloaded", reason="DRAINING", retry_after_s=1.0)
        )
        for slot in self._slots:
            slot.close()

    def _fail_waiting(self, error: Unavailable) -> None:
        while True:
            with self._work:
                cut = self._queue.cut()
            if cut is None:
                return
            for entry in cut.entries:
                self._fail(entry, error, blame=False)

    # The slots' side.

    def _next(self, wait: bool = True) -> Cut | None:
        """The next batch; None when the client closes (or, without `wait`, unless a full one waits)."""
        while True:
            cut = None
            with self._work:
                expired = self._queue.expire(self._clock())
                if not expired:
                    if not wait and not self._queue.full_batch_waits():
                        return None
                    if self._delay() <= 0:
                        cut = self._queue.cut()
                    if cut is None and self._closing and not self._queue.waiting_rows:
                        return None
                    if cut is None and wait:
                        self._work.wait(self._sleep())
            for completion in expired:
                late = DeadlineExceeded("the deadline passed in the queue", stage="queue")
                completion.timing.queue_s = self._clock() - completion.enqueued
                self.statistics.ended("expired", 0.0, completion.timing.queue_s, time.time())
                completion.fail(late)
            if cut is not None or (not wait and not expired):
                return cut

    def _delay(self) -> float:
        """Seconds that a partial batch still waits for more, by max_queue_delay_s."""
        delay = self.spec.policy.max_queue_delay_s
        if delay <= 0 or self._closing or self._queue.full_batch_waits():
            return 0.0
        oldest = self._queue.oldest_enqueued()
        return 0.0 if oldest is None else oldest + delay - self._clock()

    def _sleep(self) -> float | None:
        """Seconds until something is due; None = until it is notified."""
        due = []
        deadline = self._queue.next_deadline()
        if deadline is not None:
            due.append(deadline - self._clock())
        if self._queue.waiting_rows:
            due.append(self._delay())
        return max(0.0, min(due)) if due else None

    def _more_waits(self) -> bool:
        return self._queue.waiting_rows > 0

    def _fail(self, entry: Entry, error: BaseException, blame: bool = True) -> None:
        owner = entry.owner
        if owner.done():
            return
        with self._work:
            self._queue.discard(owner)  # the request has failed: its other items need not run
        took = self._clock() - owner.enqueued
        self.statistics.ended("fail", took, owner.timing.queue_s, time.time())
        owner.fail(error, entry.index if blame else None)

    def _succeed(self, entry: Entry, result: Result) -> None:
        owner = entry.owner
        before = owner.done()
        owner.set_result(entry.index, result)
        if not before and owner.done() and owner.error() is None:
            took = self._clock() - owner.enqueued
            self.statistics.ended("success", took, owner.timing.queue_s, time.time())


class _Slot:
    """One engine and its thread."""

    def __init__(self, client: BatchingEngineClient, engine: Engine, name: str) -> None:
        self.client = client
        self.engine = engine
        self.thread = threading.Thread(target=self._run, name=f"engine {name}", daemon=True)
        self._preparer = ThreadPoolExecutor(1, f"prepare {name}")
        self._finisher = ThreadPoolExecutor(1, f"finish {name}")
        self._finishing: Future[None] | None = None
        self._prepare_s = 0.0
        self._finish_s = 0.0
        self._closed = False

    def start(self) -> None:
        """Begin to serve."""
        self.thread.start()

    def close(self) -> None:
        """Close the engine, whatever its thread does."""
        if self._closed:
            return
        self._closed = True
        try:
            self.engine.close()
        except Exception:
            log.exception("closing an engine failed")
        self._preparer.shutdown(wait=False)
        self._finisher.shutdown(wait=False)

    def _run(self) -> None:
        ahead: tuple[Cut, Future[tuple[Any, float]]] | None = None
        while True:
            if ahead is not None:
                cut, preparing = ahead
                ahead = None
            else:
                taken = self.client._next()
                if taken is None:
                    break
                cut, preparing = taken, None
            try:
                ahead = self._serve(cut, preparing)
            except Exception as e:  # a bug of ours must not leave callers waiting
                log.exception("serving a batch failed")
                for entry in cut.entries:
                    self.client._fail(entry, Internal("the batch could not be served"), blame=False)
                del e
        if self._finishing is not None:
            self._finishing.result()

    def _serve(
        self, cut: Cut, preparing: Future[tuple[Any, float]] | None
    ) -> tuple[Cut, Future[tuple[Any, float]]] | None:
        """Run one batch; gives the batch that was prepared meanwhile, if any."""
        client = self.client
        started = client._clock()
        cut = self._still_wanted(cut, started) if preparing is None else cut
        if not cut.entries:
            return None
        for entry in cut.entries:
            timing = entry.owner.timing
            timing.queue_s = max(timing.queue_s, started - entry.owner.enqueued)
        try:
            inputs, prepare_s = (
                preparing.result() if preparing is not None else self._prepare(cut.batch)
            )
        except Exception as e:
            self._bisect(cut, e, "prepare")
            return None
        self._prepare_s = prepare_s
        ahead = None
        if prepare_s > WORTH_A_HOP:
            following = client._next(wait=False)
            if following is not None:
                ahead = (following, self._preparer.submit(self._prepare, following.batch))
        before = time.perf_counter()
        try:
            outputs = self.engine.execute(inputs)
        except Exception as e:
            if ahead is not None and _died(e):
                # Its inputs are good still, but the engine is not: its turn comes after the restart.
                ahead[1].cancel()
            self._failed(cut, e)
            return (
                (ahead[0], self._preparer.submit(self._prepare, ahead[0].batch)) if ahead else None
            )
        execute_s = time.perf_counter() - before
        self._deliver(cut, outputs, prepare_s, execute_s)
        return ahead

    def _prepare(self, batch: Batch) -> tuple[Any, float]:
        before = time.perf_counter()
        return self.engine.prepare(batch), time.perf_counter() - before

    def _still_wanted(self, cut: Cut, now: float) -> Cut:
        """The cut without requests that ended between the cut and the run."""
        live = []
        for entry in cut.entries:
            deadline = entry.owner.request.deadline
            if entry.owner.done():
                continue
            if deadline is not None and deadline <= now:
                self.client._fail(
                    entry,
                    DeadlineExceeded("the deadline passed in the queue", stage="queue"),
                    False,
                )
                continue
            live.append(entry)
        return cut if len(live) == len(cut.entries) else _recut(self.client, live)

    def _deliver(self, cut: Cut, outputs: Any, prepare_s: float, execute_s: float) -> None:
        if self._finishing is not None:
            self._finishing.result()  # one batch of results at most waits for its callbacks
            self._finishing = None
        if self._finish_s > WORTH_A_HOP and self.client._more_waits():
            self._finishing = self._finisher.submit(
                self._finish, cut, outputs, prepare_s, execute_s
            )
        else:
            self._finish(cut, outputs, prepare_s, execute_s)

    def _finish(self, cut: Cut, outputs: Any, prepare_s: float, execute_s: float) -> None:
        client, batch = self.client, cut.batch
        before = time.perf_counter()
        try:
            results = self.engine.finish(outputs, batch)
            if len(results) != len(cut.entries):
                raise RuntimeError(f"{len(results)} results for {len(cut.entries)} items")
        except Exception as e:
            log.exception("finishing a batch failed")
            for entry in cut.entries:
                client._fail(entry, Internal("the model's answer could not be read"), blame=False)
            del e
            return
        split_s = time.perf_counter() - before
        tokens = sum(e.item.length * e.item.rows for e in cut.entries)
        padded = batch.length * batch.rows
        client.statistics.batch(batch.rows, tokens, padded, prepare_s, execute_s, split_s)
        if client._observer is not None:
            oldest = min(e.owner.enqueued for e in cut.entries)
            waited = client._clock() - oldest - prepare_s - execute_s - split_s
            client._observer(
                BatchReport(
                    batch.rows, tokens, padded, max(0.0, waited), execute_s, len(client._queue)
                )
            )
        seen: set[int] = set()
        for entry in cut.entries:
            if id(entry.owner) not in seen:
                seen.add(id(entry.owner))
                timing = entry.owner.timing
                timing.prepare_s += prepare_s
                timing.execute_s += execute_s
                timing.finish_s += split_s
                timing.batch_rows = batch.rows
                timing.batch_tokens = tokens
        suspects = not client.quarantine.empty
        for entry, result in zip(cut.entries, results, strict=True):
            if suspects and client.quarantine.is_suspect(entry.item):
                client.quarantine.acquit(entry.item)
            client._succeed(entry, result)
        self._finish_s = time.perf_counter() - before

    def _failed(self, cut: Cut, error: Exception) -> None:
        if _died(error):
            self._engine_died(cut, error)
        else:
            self._bisect(cut, error, "execute")

    def _bisect(self, cut: Cut, error: Exception, stage: str) -> None:
        """Find the guilty items: they fail alone, the others are answered."""
        entries = [e for e in cut.entries if not e.owner.done()]
        if not entries:
            return
        if len(entries) == 1:
            entry = entries[0]
            if isinstance(error, ForebayError):
                told: ForebayError = error
            else:
                log.error("an item failed in %s: %r", stage, error)
                told = Internal("the model failed on this input", reason="ITEM_FAILED")
                self.client.quarantine.blame(entry.item, "this input made the model fail before")
            self.client._fail(entry, told)
            return
        middle = len(entries) // 2
        for half in (entries[:middle], entries[middle:]):
            part = _recut(self.client, half)
            try:
                inputs, prepare_s = self._prepare(part.batch)
                before = time.perf_counter()
                outputs = self.engine.execute(inputs)
            except Exception as e:
                self._failed(part, e)
            else:
                self._finish(part, outputs, prepare_s, time.perf_counter() - before)

    def _engine_died(self, cut: Cut, error: Exception) -> None:
        """Fail the running batch, then bring the engine back; what waits is served after that."""
        alone = len(cut.entries) == 1
        for entry in cut.entries:
            if alone and self.client.quarantine.is_suspect(entry.item):
                self.client.quarantine.blame(entry.item, "this input killed the model's process")
            elif not entry.owner.done():
                self.client.quarantine.suspect(entry.item)
            self.client._fail(entry, error, blame=False)
        self.client.statistics.restarts += 1
        delay = BACKOFF_S
        for attempt in range(1_000_000):
            if self.client._closing:
                return
            try:
                self.engine.load()
                self.client._down = None
                log.info("engine %s is back", self.client._name)
                return
            except Exception as e:
                log.error("engine %s does not come back: %s", self.client._name, e)
                if attempt + 1 >= PATIENCE:
                    self.client._down = Unavailable(
                        f"the engine of {self.client.spec.model!r} is down",
                        reason="ENGINE_DIED",
                        retry_after_s=delay,
                    )
                    self.client._fail_waiting(self.client._down)
            with self.client._work:
                self.client._work.wait_for(lambda: self.client._closing, delay)
            delay = min(MAX_BACKOFF_S, delay * 2)


def _died(error: Exception) -> bool:
    return isinstance(error, Unavailable) and error.reason == "ENGINE_DIED"


def _recut(client: BatchingEngineClient, entries: list[Entry]) -> Cut:
    items = [e.item for e in entries]
    longest = max((i.length for i in items), default=0)
    rows = sum(i.rows for i in items)
    return Cut(Batch(items, client._queue.padded(longest), rows), entries)
