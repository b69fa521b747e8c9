"""One engine and its thread: cut when the slot is free, prepare, execute, finish.

Two overlaps, each only where it pays:

- The next batch is prepared while one executes, but only when a full batch waits: an early cut of a
  partial batch would miss the items that arrive meanwhile.
- Results are split and callbacks run on a second thread, but only when more work waits: a lone
  caller would pay a thread hop (about 50 microseconds) for nothing.

And no overlap where it costs more than it gives: a free engine that answers within a millisecond is
run by the thread that submits (`serve_here`). Two threads that hand the interpreter to and fro for
such short runs get a third less done, and a lone caller waits for two hops.

What goes wrong stays with those it concerns: a failing batch is bisected, a dead engine is brought
back, and whatever a stage raises, every item of its batch is answered.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from forebay.errors import ForebayError, Internal, InvalidArgument, Unavailable

from forebay_server.core.collector import only_answer, together
from forebay_server.core.intake import Intake, quarantined, too_late
from forebay_server.core.interfaces import Batch, Engine
from forebay_server.core.lane import Entry, padded
from forebay_server.core.priority import lower
from forebay_server.core.queue import Cut
from forebay_server.core.revival import Revival

log = logging.getLogger("forebay.batcher")

#: After a batch of so many items, its callers' next calls are waited for, a share of the time that it
#: took and MAX_SETTLE_S at most. Cut at once, the first two calls would be a batch while the others'
#: answers are still on their way, and two rows take a core half as long as eight (MiniLM, 20 tokens).
#: Less than MIN_SETTLE_S is too short for a call to come back in.
CROWD, SETTLE_SHARE, MIN_SETTLE_S, MAX_SETTLE_S = 8, 0.1, 0.001, 0.004
#: Batches that a submitting thread serves before it leaves the rest to the slot's own.
HERE_BATCHES = 4


@dataclass(frozen=True, slots=True)
class BatchReport:
    """What an observer learns of a batch; times in seconds."""

    rows: int
    tokens: int
    padded_tokens: int
    queue_s: float
    execute_s: float
    queue_depth: int


@dataclass(slots=True)
class _Ahead:
    """A batch that was cut early, and its inputs in the making."""

    cut: Cut
    preparing: Future[tuple[Any, float]]


class Slot:
    """See the module.

    Args:
        revive, wait: see Revival.
        hop_s: a stage is given to a second thread only when it takes longer than this.
        nice: how much lower the priority of the slot's thread is, see priority.py.
    """

    def __init__(
        self,
        intake: Intake,
        engine: Engine,
        name: str,
        *,
        revive: Callable[[Engine], None],
        wait: Callable[[float], object],
        observer: Callable[[BatchReport], None] | None,
        hop_s: float,
        nice: int = 0,
    ) -> None:
        self.engine = engine
        self._nice = nice
        self.thread = threading.Thread(target=self._run, name=f"engine {name}", daemon=True)
        self._intake = intake
        self._revival = Revival(intake, engine, revive, wait, lambda: self._closed)
        self._observer = observer
        self._hop_s = hop_s
        self._preparer = ThreadPoolExecutor(1, f"prepare {name}")
        self._finisher = ThreadPoolExecutor(1, f"finish {name}", only_answer)
        self._finishing: Future[None] | None = None
        self._finish_s = 0.0
        self._ahead: _Ahead | None = None
        self._backlog: deque[Cut] = deque()
        #: All that was taken and is not answered for yet; `abandon` reads it from other threads.
        self._held: dict[int, Cut] = {}
        self._proven = True
        self._closed = False
        #: Held by the thread that uses the engine: the slot's own, or one that submits.
        self.turn = threading.Lock()
        #: Seconds that a batch took lately, preparing included; None before the first.
        self.took_s: float | None = None
        self._crowd = 0

    def start(self) -> None:
        """Begin to serve."""
        self.thread.start()

    @property
    def held_tokens(self) -> int:
        """Tokens of what was taken and is not answered for yet, padding included."""
        return sum(c.batch.rows * c.batch.length for c in list(self._held.values()))

    def abandon(self, error: ForebayError) -> None:
        """Fail what the slot holds, whatever its thread does."""
        for cut in list(self._held.values()):
            _fail_all(cut, error)

    def close(self) -> None:
        """Close the engine, whatever its thread does. Idempotent."""
        if self._closed:
            return
        self._closed = True
        try:
            self.engine.close()
        except Exception:
            log.exception("closing an engine failed")
        self._preparer.shutdown(wait=False)
        self._finisher.shutdown(wait=False)

    # The loop.

    def _run(self) -> None:
        if self._nice:
            lower(self._nice)
        while True:
            cut: Cut | None = None
            try:
                ahead, self._ahead = self._ahead, None
                if ahead is not None:
                    cut = ahead.cut
                elif self._backlog:
                    cut = self._backlog.popleft()
                else:
                    cut = self._intake.take(*self._expected())
                    if cut is None:
                        break
                    self._held[id(cut)] = cut
                with self.turn:
                    self._serve(cut, ahead.preparing if ahead is not None else None)
            except BaseException:  # a bug of ours must not leave callers waiting
                self._broke(cut)
        if self._finishing is not None:
            self._finishing.result()

    def _expected(self) -> tuple[int, float]:
        """Rows that are likely to come after the last batch, and until when."""
        if self._crowd < CROWD or self.took_s is None:
            return 0, 0.0
        patience = min(MAX_SETTLE_S, SETTLE_SHARE * self.took_s)
        if patience < MIN_SETTLE_S:
            return 0, 0.0
        return self._crowd, self._intake.clock() + patience

    def serve_here(self, cut: Cut | None = None) -> None:
        """Serve a batch, and what waits behind it, on the caller's thread, which holds `turn`."""
        batches = 0
        if cut is not None:
            self._held[id(cut)] = cut
            try:
                self._serve(cut, None, here=True)
            except BaseException:
                self._broke(cut)
        while self._backlog or batches < HERE_BATCHES:
            batches += 1
            cut = None
            try:
                if self._backlog:
                    cut = self._backlog.popleft()
                elif self._intake.waiting_rows:
                    cut = self._intake.take_here()
                if cut is None:
                    break
                self._held[id(cut)] = cut
                self._serve(cut, None, here=True)
            except BaseException:
                self._broke(cut)
        if self._intake.waiting_rows:
            self._intake.kick()

    @property
    def ahead(self) -> bool:
        """Whether the slot's own thread has batches already that go first."""
        return self._ahead is not None or bool(self._backlog)

    def _broke(self, cut: Cut | None) -> None:
        log.exception("serving a batch failed")
        error = Internal("the batch could not be served")
        if cut is not None:
            self._settle(cut, error)
        else:
            self._intake.fail_waiting(error)

    def _settle(self, cut: Cut, error: ForebayError | None = None) -> None:
        """Nothing more will happen to a cut: none of its items may be left without an answer."""
        if error is not None:
            _fail_all(cut, error)
        self._held.pop(id(cut), None)

    def _serve(
        self, cut: Cut, preparing: Future[tuple[Any, float]] | None, here: bool = False
    ) -> None:
        started = self._intake.clock()
        if preparing is None:
            part = self._screen(cut, started)
        else:
            part = cut if self._live(cut.entries, started) else None
        if part is None:
            self._settle(cut)
            return
        waited = 0.0
        for entry in part.entries:
            owner = entry.owner
            queue_s = started - owner.enqueued
            waited = max(waited, queue_s)
            if queue_s > owner.timing.queue_s:
                owner.timing.queue_s = queue_s
        try:
            inputs, prepare_s = preparing.result() if preparing else self._prepare(part.batch)
        except BaseException as e:
            self._failed(part, e, waited)
            self._settle(cut)
            return
        if prepare_s >= self._hop_s and not self._backlog and not here:
            self._look_ahead()
        before = self._intake.clock()
        try:
            outputs = self.engine.execute(inputs)
        except BaseException as e:
            self._park(e)
            self._failed(part, e, waited)
            self._settle(cut)
            return
        execute_s = self._intake.clock() - before
        self.took_s = prepare_s + execute_s
        self._crowd = len(part.entries)
        self._deliver(cut, part, outputs, (waited, prepare_s, execute_s))

    def _prepare(self, batch: Batch) -> tuple[Any, float]:
        before = self._intake.clock()
        return self.engine.prepare(batch), self._intake.clock() - before

    def _live(self, entries: list[Entry], now: float) -> list[Entry]:
        """The entries that are wanted still; those of requests that are too late fail."""
        live = []
        for entry in entries:
            owner = entry.owner
            if owner.done():
                continue
            deadline = owner.request.deadline
            if deadline is not None and deadline <= now:
                owner.timing.queue_s = now - owner.enqueued
                owner.fail(too_late())
                continue
            live.append(entry)
        return live

    def _screen(self, cut: Cut, now: float) -> Cut | None:
        """What of a cut runs now. Suspects are put aside, to run alone after it."""
        live = self._live(cut.entries, now)
        quarantine = self._intake.quarantine
        if live and not quarantine.empty:
            clean, suspects = [], []
            for entry in live:
                reason = quarantine.verdict(entry.item)
                if reason is not None:
                    entry.owner.fail(quarantined(reason), entry.index)
                elif len(live) > 1 and quarantine.is_suspect(entry.item):
                    suspects.append(entry)
                else:
                    clean.append(entry)
            for entry in suspects:
                alone = self._recut([entry])
                self._held[id(alone)] = alone
                self._backlog.append(alone)
            live = clean
        if not live:
            return None
        return cut if len(live) == len(cut.entries) else self._recut(live)

    def _look_ahead(self) -> None:
        following = self._intake.take_full()
        if following is None:
            return
        self._held[id(following)] = following
        part = self._screen(following, self._intake.clock())
        if part is None:
            self._settle(following)
            return
        if part is not following:  # seldom: some of it was dropped or put aside
            self._held[id(part)] = part
            self._backlog.appendleft(part)
            self._settle(following)
            return
        self._ahead = _Ahead(part, self._preparer.submit(self._prepare, part.batch))

    def _park(self, error: BaseException) -> None:
        """Let the preparation of the next batch end; a dead engine's inputs are made anew."""
        ahead = self._ahead
        if ahead is None:
            return
        try:
            ahead.preparing.result()
        except BaseException:
            pass  # met again when its turn comes
        if died(error):
            self._ahead = None
            self._backlog.append(ahead.cut)

    # Results.

    def _deliver(
        self, cut: Cut, part: Cut, outputs: Any, times: tuple[float, float, float]
    ) -> None:
        if self._finishing is not None:
            self._finishing.result()  # one batch of results at most waits for its callbacks
            self._finishing = None
        more = self._ahead is not None or self._intake.waiting_rows > 0
        if more and self._finish_s >= self._hop_s:
            self._finishing = self._finisher.submit(self._finish, cut, part, outputs, times)
        else:
            self._finish(cut, part, outputs, times)

    def _finish(self, cut: Cut, part: Cut, outputs: Any, times: tuple[float, float, float]) -> None:
        """Answer the items of `part`, and settle `cut`, which it came from. Never raises."""
        before = self._intake.clock()
        try:
            self._answer(part, outputs, *times)
        except BaseException:
            log.exception("finishing a batch failed")
            _fail_all(part, Internal("the model's answer could not be read"))
        finally:
            self._held.pop(id(cut), None)
        self._finish_s = self._intake.clock() - before

    def _answer(
        self, cut: Cut, outputs: Any, waited: float, prepare_s: float, execute_s: float
    ) -> None:
        batch, entries = cut.batch, cut.entries
        before = self._intake.clock()
        results = self.engine.finish(outputs, batch)
        if len(results) != len(entries):
            raise RuntimeError(f"{len(results)} results for {len(entries)} items")
        split_s = self._intake.clock() - before
        self._revival.deaths = 0
        self._proven = True
        tokens = sum(i.length * i.rows for i in batch.items)
        rows, all_tokens = batch.rows, batch.length * batch.rows
        self._intake.statistics.batch(rows, tokens, all_tokens, prepare_s, execute_s, split_s)
        self._observe(rows, tokens, all_tokens, waited, execute_s)
        seen: set[int] = set()
        for entry in entries:
            owner = entry.owner
            if id(owner) not in seen:
                seen.add(id(owner))
                timing = owner.timing
                timing.prepare_s += prepare_s
                timing.execute_s += execute_s
                timing.finish_s += split_s
                timing.batch_rows = rows
                timing.batch_tokens = tokens
        quarantine = self._intake.quarantine
        if not quarantine.empty:
            for entry in entries:
                if quarantine.is_suspect(entry.item):
                    quarantine.acquit(entry.item)
        with together():
            for entry, result in zip(entries, results, strict=True):
                entry.owner.set_result(entry.index, result)

    def _observe(
        self, rows: int, tokens: int, padded: int, waited: float, execute_s: float
    ) -> None:
        if self._observer is None:
            return
        try:
            depth = self._intake.waiting_rows
            self._observer(BatchReport(rows, tokens, padded, waited, execute_s, depth))
        except Exception:
            log.exception("the observer of batches raised")

    # Faults.

    def _recut(self, entries: list[Entry]) -> Cut:
        items = [e.item for e in entries]
        longest = max(i.length for i in items)
        rows = sum(i.rows for i in items)
        return Cut(Batch(items, padded(self._intake.policy, longest), rows), entries)

    def _failed(self, cut: Cut, error: BaseException, waited: float) -> None:
        """A batch failed: find the guilty items, answer the others."""
        guilty: list[tuple[Entry, BaseException]] = []
        served = self._bisect(cut.entries, error, waited, guilty)
        # When several fail and none succeeds, or one after the other fails alone, the engine is at
        # fault, not the items: they are not held against their next try.
        theirs = served or (len(guilty) == 1 and self._proven)
        if guilty and not served:
            self._proven = False
        for entry, fault in guilty:
            if isinstance(fault, InvalidArgument):
                told: ForebayError = fault
                reason = fault.description
            else:
                log.error("an item failed on %s", self._intake.name, exc_info=fault)
                told = Internal("the model failed on this input", reason="ITEM_FAILED")
                reason = "this input made the model fail before"
            if theirs or isinstance(fault, InvalidArgument):
                self._intake.quarantine.blame(entry.item, reason)
            entry.owner.fail(told, entry.index)

    def _bisect(
        self,
        entries: list[Entry],
        error: BaseException,
        waited: float,
        guilty: list[tuple[Entry, BaseException]],
    ) -> bool:
        """Run halves until the items to blame are alone. True when any item was answered."""
        if died(error):
            self._engine_died(entries, error)
            return False
        if isinstance(error, ForebayError) and not isinstance(error, InvalidArgument | Internal):
            for entry in entries:  # out of memory, say: no item's fault
                entry.owner.fail(error)
            return False
        entries = self._live(entries, self._intake.clock())
        if len(entries) == 1:
            guilty.append((entries[0], error))
        if len(entries) < 2:
            return False
        served = False
        middle = len(entries) // 2
        for half in (entries[:middle], entries[middle:]):
            part = self._recut(half)
            try:
                inputs, prepare_s = self._prepare(part.batch)
                before = self._intake.clock()
                outputs = self.engine.execute(inputs)
            except BaseException as e:
                served |= self._bisect(half, e, waited, guilty)
            else:
                self._finish(
                    part, part, outputs, (waited, prepare_s, self._intake.clock() - before)
                )
                served = True
        return served

    def _engine_died(self, entries: list[Entry], error: BaseException) -> None:
        """Fail the running batch, then bring the engine back; what waits is served after that."""
        if not self._closed:
            quarantine = self._intake.quarantine
            for entry in entries:
                if entry.owner.done():
                    continue
                if len(entries) == 1 and quarantine.is_suspect(entry.item):
                    quarantine.blame(entry.item, "this input killed the model's process")
                else:
                    quarantine.suspect(entry.item)
        retry = getattr(error, "retry_after_s", None) or 0.5
        told = Unavailable(str(error), reason="ENGINE_DIED", retry_after_s=retry)
        for entry in entries:
            entry.owner.fail(told)
        self._revival.run()


def died(error: BaseException) -> bool:
    """Whether the engine itself is gone."""
    return isinstance(error, Unavailable) and error.reason == "ENGINE_DIED"


def _fail_all(cut: Cut, error: ForebayError) -> None:
    with together():
        for entry in cut.entries:
            entry.owner.fail(error)
