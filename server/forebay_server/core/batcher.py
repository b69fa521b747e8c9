"""Queue, batches and threads around engines: the EngineClient of engines that do not batch.

One thread per engine (`slot`), one queue for all (`intake`, `queue`). The busy engine is the timer:
a batch is cut when a slot frees.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import inf
from typing import Any

from forebay.errors import ForebayError, Unavailable

from forebay_server.core.collector import add_engine_time, engine_time
from forebay_server.core.intake import Intake
from forebay_server.core.interfaces import Clock, Completion, Engine, EngineRequest, EngineSpec
from forebay_server.core.quarantine import Quarantine
from forebay_server.core.slot import BatchReport, Slot
from forebay_server.core.statistics import EngineStatistics

__all__ = ["QUICK_S", "BatchReport", "BatchingEngineClient", "hop_s"]

#: `here_s` of servers: longer runs would keep the calls of other models waiting.
QUICK_S = 0.001
#: A stage is given to a second thread only when it takes longer than this, in seconds.
WORTH_A_HOP = 0.0003


def hop_s(engines: int) -> float:
    """`hop_s` of servers. Where engines have all cores, a second thread has none to run on: it only
    takes the interpreter from the others (tables of 500 rows, 2 cores: a tenth of the rate)."""
    return WORTH_A_HOP if engines < (os.cpu_count() or 1) else inf


class BatchingEngineClient:
    """See interfaces.EngineClient.

    Args:
        engines: loaded engines of one spec; each is a slot with a thread of its own.
        clock: monotonic seconds; deadlines are on it, and all times are measured by it.
        observer: called once per batch, on an engine's thread.
        revive: brings an engine back after it died (load, warm up); `Engine.load` by default.
        wait: sleeps between attempts to revive; by default until the client closes, at most.
        hop_s: see WORTH_A_HOP.
        here_s: a free engine whose batches take less is run by the thread that submits, if it is one
            that works through a batch of calls (`together`), and as long as engines took less of its
            time with that; 0 = never. More would keep the calls that wait for it waiting.
        nice: how much lower the priority of engines' threads is, see priority.py.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        clock: Clock = time.monotonic,
        observer: Callable[[BatchReport], None] | None = None,
        name: str = "",
        *,
        revive: Callable[[Engine], None] | None = None,
        wait: Callable[[float], object] | None = None,
        hop_s: float = WORTH_A_HOP,
        here_s: float = 0.0,
        nice: int = 0,
    ) -> None:
        self.spec: EngineSpec = engines[0].spec
        self.engines = list(engines)
        # An engine in a process can die, and what brings it back would hold the caller's thread up.
        self._here_s = here_s if self.spec.isolation == "thread" else 0.0
        self.statistics = EngineStatistics()
        self.quarantine = Quarantine(clock=clock)
        policy = self.spec.policy
        if not self.spec.batches:  # the model's first dimension is fixed: each item runs alone
            policy = replace(policy, max_batch_size=1)
        name = name or f"{self.spec.model}@{self.spec.version}"
        self._intake = Intake(
            policy, clock, self.statistics, self.quarantine, name, len(self.engines)
        )
        self._slots = [
            Slot(
                self._intake,
                engine,
                f"{name}#{i}",
                revive=revive or _load,
                wait=wait or self._intake.closing.wait,
                observer=observer,
                hop_s=hop_s,
                nice=nice,
            )
            for i, engine in enumerate(self.engines)
        ]
        self._intake.running_tokens = lambda: sum(s.held_tokens for s in self._slots)
        for slot in self._slots:
            slot.start()

    def submit(self, requests: Sequence[EngineRequest]) -> list[Completion]:
        """Queue all; one that is refused comes back failed: QueueFull, InvalidArgument for an item
        in quarantine, Unavailable when the client closes or its engines are down."""
        slot = self._borrow() if self._here_s else None
        if slot is None:
            return self._intake.submit(requests)  # type: ignore[return-value]
        began = time.perf_counter()
        try:
            alone = self._intake.submit_alone(requests[0]) if len(requests) == 1 else None
            if alone is not None:
                completion, cut = alone
                slot.serve_here(cut)
                return [completion]
            completions = self._intake.submit(requests, wake=False)
            slot.serve_here()
        finally:
            slot.turn.release()
            add_engine_time(time.perf_counter() - began)
        return completions  # type: ignore[return-value]

    def refusal(
        self, deadline: float | None, rows: int = 1, calls: int = 1, ahead: int = 0
    ) -> ForebayError | None:
        """See interfaces.EngineClient."""
        if not ahead and not self._intake.waiting_rows:
            return None
        return self._intake.refusal(deadline, rows, calls, ahead)

    def _borrow(self) -> Slot | None:
        """A quick slot that nobody uses, with its turn taken, for a thread that has time for it."""
        spent = engine_time()
        if spent is None or spent >= self._here_s:
            return None
        for slot in self._slots:
            took = slot.took_s
            if took is not None and took < self._here_s and slot.turn.acquire(blocking=False):
                if not slot.ahead:
                    return slot
                slot.turn.release()
        return None

    @property
    def trees(self) -> int | None:
        """See interfaces.EngineClient."""
        number = getattr(self.engines[0], "trees", None)
        return number if self.spec.isolation == "thread" else None

    def answered(self, rows: int, calls: int, engine_s: float) -> None:
        """See interfaces.EngineClient."""
        self.statistics.alone(rows, calls, engine_s, time.time())

    def stats(self) -> Mapping[str, Any]:
        """The statistics object, queue depth, derived figures and the engines' own facts."""
        return {
            "statistics": self.statistics,
            "queue_depth": self._intake.waiting_rows,
            "padding_ratio": self.statistics.padding_ratio,
            "rows_per_second": self.statistics.rows_per_second * len(self._slots),
            "engines": [dict(e.info()) for e in self.engines],
        }

    def check_health(self) -> None:
        """Raise Unavailable when no engine can serve a request now."""
        error: Unavailable | None = self._intake.down()
        if error is not None:
            raise error
        for engine in self.engines:
            try:
                engine.check_health()
            except Unavailable as e:
                error = e
            else:
                return
        if error is not None:
            raise error

    def wake(self) -> None:
        """Look at the clock again: for tests and simulations that move it."""
        self._intake.wake()

    def close(self, timeout_s: float = 10.0) -> None:
        """Finish what waits within the time, fail the rest, close the engines. Idempotent."""
        until = time.monotonic() + timeout_s
        self._intake.close()
        for slot in self._slots:
            if slot.thread is not threading.current_thread():
                slot.thread.join(max(0.0, until - time.monotonic()))
                if slot.turn.acquire(timeout=max(0.0, until - time.monotonic())):
                    slot.turn.release()  # no caller's thread is in the engine either
        error = Unavailable("the model was unloaded", reason="DRAINING", retry_after_s=1.0)
        self._intake.fail_waiting(error)
        for slot in self._slots:
            slot.abandon(error)
            slot.close()
        self._intake.wake()


def _load(engine: Engine) -> None:
    engine.load()
