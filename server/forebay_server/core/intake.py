"""Where callers and engine slots meet: the queue under its lock, admission, deadlines, the count
of how requests ended.

Nothing here runs an engine, and no caller's code runs under the lock.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from math import inf

from forebay.errors import (
    Cancelled,
    DeadlineExceeded,
    ForebayError,
    InvalidArgument,
    QueueFull,
    Unavailable,
)

from forebay_server.core.completion import RequestCompletion
from forebay_server.core.interfaces import Batch, BatchPolicy, Clock, EngineRequest
from forebay_server.core.lane import Entry, padded
from forebay_server.core.quarantine import Quarantine
from forebay_server.core.queue import Cut, RequestQueue
from forebay_server.core.statistics import EngineStatistics

log = logging.getLogger("forebay.batcher")


class Intake:
    """The shared half of a client and its slots. Thread-safe.

    Args:
        name: `model@version`, for messages and thread names.
        slots: engines that take from it.
    """

    def __init__(
        self,
        policy: BatchPolicy,
        clock: Clock,
        statistics: EngineStatistics,
        quarantine: Quarantine,
        name: str,
        slots: int,
    ) -> None:
        self.policy = policy
        self.clock = clock
        self.statistics = statistics
        self.quarantine = quarantine
        self.name = name
        self.slots = slots
        #: Tokens of the batches that the slots hold.
        self.running_tokens: Callable[[], int] = lambda: 0
        #: Set when the client begins to close, for whoever waits for something else than work.
        self.closing = threading.Event()
        self._queue = RequestQueue(policy)
        lock = threading.Lock()
        self._work = threading.Condition(lock)  # the slots wait here
        self._late = threading.Condition(lock)  # the deadlines' thread waits here
        self._idle = 0
        self._down: set[object] = set()
        self._watch_until = inf
        self._watcher: threading.Thread | None = None

    # The callers' side.

    def submit(
        self, requests: Sequence[EngineRequest], wake: bool = True
    ) -> list[RequestCompletion]:
        """Queue all; one that is refused comes back failed. Without `wake` the caller serves them
        or calls `kick`."""
        now = self.clock()
        out = [RequestCompletion(r, now, self._ended) for r in requests]
        refused: list[tuple[RequestCompletion, ForebayError, int | None]] = []
        admitted = []
        for completion in out:
            fault = self._screen(completion.request)
            if fault is None:
                admitted.append(completion)
            else:
                refused.append((completion, *fault))
        rate = self.statistics.tokens_per_second * self.slots
        running = self.running_tokens()
        with self._work:
            error = self._shut()
            for completion in admitted:
                if error is not None:
                    refused.append((completion, self._shut() or error, None))
                    continue
                try:
                    self._queue.push(completion, rate, now, running)
                except QueueFull as e:
                    # Who asks before it submits knows of caches and split traffic, and so of others.
                    e.holds_s = 0.0
                    refused.append((completion, e, None))
            if wake:
                self._wake(len(admitted))
        for completion, error, item in refused:
            completion.fail(error, item)
        return out

    def refusal(
        self, deadline: float | None, rows: int = 1, calls: int = 1, ahead: int = 0
    ) -> ForebayError | None:
        """See interfaces.EngineClient."""
        rate = self.statistics.tokens_per_second * self.slots
        running = self.running_tokens()
        with self._work:
            full = self._queue.refusal(rows, deadline, rate, self.clock(), running, ahead=ahead)
            shut = self._shut()
        if shut is None and full is not None:
            self.statistics.ended("rejected", 0.0, 0.0, time.time(), calls)
        return shut or full

    def submit_alone(self, request: EngineRequest) -> tuple[RequestCompletion, Cut] | None:
        """A request as a batch of its own, past the queue, for a caller who runs it at once. None
        when others wait, when it does not fit a batch, or when there is something to refuse."""
        policy = self.policy
        if self._queue.waiting_rows or policy.max_queue_delay_s > 0 or len(request.items) != 1:
            return None
        (item,) = request.items
        longest = padded(policy, item.length)
        fits = 0 < item.rows <= policy.max_batch_size
        if not fits or item.rows * longest > policy.max_batch_tokens or not self.quarantine.empty:
            return None
        if self._shut() is not None:
            return None
        completion = RequestCompletion(request, self.clock(), self._ended)
        return completion, Cut(Batch([item], longest, item.rows), [Entry(completion, 0, item)])

    def kick(self) -> None:
        """Have the slots look after what waits."""
        with self._work:
            if self._queue.waiting_rows:
                self._wake(1)

    def _wake(self, slots: int) -> None:
        if self._idle:
            self._work.notify(slots)
        else:
            self._arm()

    def _screen(self, request: EngineRequest) -> tuple[ForebayError, int | None] | None:
        """Why a request is refused whatever the queue holds, and the item to blame."""
        if not request.items:
            return InvalidArgument.at("items", "has no elements"), None
        for index, item in enumerate(request.items):
            if item.rows < 1:  # it would be in no batch, and never answered
                return InvalidArgument.at("items", "has no rows"), index
        if not self.quarantine.empty:
            for index, item in enumerate(request.items):
                reason = self.quarantine.verdict(item)
                if reason is not None:
                    return quarantined(reason), index
        return None

    def _shut(self) -> Unavailable | None:
        if self.closing.is_set():
            return Unavailable("the model is being unloaded", reason="DRAINING", retry_after_s=1.0)
        return self.down()

    def down(self) -> Unavailable | None:
        """A new error when no engine is left that serves, else None."""
        if len(self._down) < self.slots:
            return None
        return Unavailable(
            f"the engine of {self.name} is down", reason="ENGINE_DIED", retry_after_s=1.0
        )

    def set_down(self, slot: object, down: bool) -> None:
        """A slot has given its engine up for now, or has it back. The last one fails what waits."""
        with self._work:
            (self._down.add if down else self._down.discard)(slot)
        error = self.down()
        if error is not None:
            self.fail_waiting(error)

    @property
    def waiting_rows(self) -> int:
        """Rows in the queue."""
        return self._queue.waiting_rows

    def close(self) -> None:
        """Refuse new requests. The slots go on until the queue is empty."""
        with self._work:
            self.closing.set()
            self._work.notify_all()
            self._late.notify_all()

    def wake(self) -> None:
        """Look at the clock again: for tests and simulations that move it."""
        with self._work:
            self._work.notify_all()
            self._late.notify_all()

    def fail_waiting(self, error: ForebayError) -> None:
        """Fail all that waits."""
        while True:
            with self._work:
                late = self._queue.expire(self.clock())
                cut = self._queue.cut()
            self._expired(late)
            if cut is None:
                return
            for entry in cut.entries:
                entry.owner.fail(error)

    def _ended(self, completion: RequestCompletion) -> None:
        """A request is done, however. Its items that still wait need not run."""
        if completion.waiting_rows:
            with self._work:
                self._queue.discard(completion)
                if self.closing.is_set():
                    self._work.notify_all()
        error = completion.error()
        queue_s = completion.timing.queue_s
        took = self.clock() - completion.enqueued
        if error is None:
            outcome = "success"
        elif isinstance(error, Cancelled):
            outcome = "cancelled"
        elif isinstance(error, DeadlineExceeded):
            outcome = "expired"
        elif isinstance(error, QueueFull):
            outcome = "rejected"
        else:
            outcome = "fail"
        calls = completion.request.calls
        self.statistics.ended(outcome, took, queue_s, time.time(), calls)

    # The slots' side.

    def take(self, rows: int = 0, until: float = 0.0) -> Cut | None:
        """Wait for the next batch; None when the client closes and nothing waits any more.

        Args:
            rows: so many are likely to come soon: until the time `until`, fewer are not taken.
        """
        while True:
            with self._work:
                now = self.clock()
                late = self._queue.expire(now)
                if not late:
                    delay = self._delay(now)
                    if now < until and self._queue.waiting_rows < rows:
                        delay = max(delay, 0.0 if self.closing.is_set() else until - now)
                    cut = self._queue.cut(now) if delay <= 0 else None
                    if cut is not None:
                        self._arm()
                        if self._idle and self._queue.waiting_rows:
                            self._work.notify()  # one request may be work for several slots
                        return cut
                    if self.closing.is_set() and not self._queue.waiting_rows:
                        return None
                    if self._queue.waiting_rows:
                        self._arm()
                    self._idle += 1
                    self._work.wait(delay if delay > 0 else None)
                    self._idle -= 1
            self._expired(late)

    def take_here(self) -> Cut | None:
        """The next batch if one is due; never waits."""
        with self._work:
            now = self.clock()
            late = self._queue.expire(now)
            cut = self._queue.cut(now) if self._delay(now) <= 0 else None
        self._expired(late)
        return cut

    def take_full(self) -> Cut | None:
        """The next batch if it is full and no other slot is free for it; never waits."""
        with self._work:
            if self._idle or not self._queue.full_batch_waits():
                return None
            now = self.clock()
            late = self._queue.expire(now)
            cut = self._queue.cut(now) if not late else None
        self._expired(late)
        return cut

    def _delay(self, now: float) -> float:
        """Seconds that a partial batch still waits for more, by max_queue_delay_s."""
        delay = self.policy.max_queue_delay_s
        if delay <= 0 or self.closing.is_set() or self._queue.full_batch_waits():
            return 0.0
        oldest = self._queue.oldest_enqueued()
        return 0.0 if oldest is None else oldest + delay - now

    def _expired(self, late: Sequence[RequestCompletion]) -> None:
        for completion in late:
            completion.timing.queue_s = self.clock() - completion.enqueued
            completion.fail(too_late())

    # Deadlines: requests expire on time also while every engine is busy.

    def _arm(self) -> None:
        """Have the deadlines' thread wake up in time. Mostly it sleeps until an earlier one."""
        due = self._queue.next_deadline()
        if due is None or due >= self._watch_until:
            return
        self._watch_until = due
        if self._watcher is None:
            self._watcher = threading.Thread(
                target=self._watch, name=f"deadlines {self.name}", daemon=True
            )
            self._watcher.start()
        else:
            self._late.notify()

    def _watch(self) -> None:
        while True:
            with self._work:
                now = self.clock()
                late = self._queue.expire(now)
                if not late:
                    if self.closing.is_set() and not self._queue.waiting_rows:
                        return
                    due = self._queue.next_deadline()
                    self._watch_until = inf if due is None else due
                    self._late.wait(None if due is None else due - now)
            self._expired(late)


def too_late() -> DeadlineExceeded:
    """The error of a request whose deadline passed before its batch ran."""
    return DeadlineExceeded("the deadline passed in the queue", stage="queue")


def quarantined(reason: str) -> InvalidArgument:
    """The error of an item that is refused because of what it did before."""
    return InvalidArgument.at("items", reason, reason="ITEM_QUARANTINED")
