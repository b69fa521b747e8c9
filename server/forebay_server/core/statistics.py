"""Counts and times of one engine client since it was made, in the statistics protocol's terms."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

#: Weight of the newest batch in the throughput estimate.
EWMA = 0.2
#: What the estimate of a busy engine's throughput forgets with each slower batch. Small batches, which
#: give less, say nothing of what full ones would.
FORGETS = 0.1


@dataclass(slots=True)
class Duration:
    """A count and a sum of seconds."""

    count: int = 0
    seconds: float = 0.0

    def add(self, seconds: float, n: int = 1) -> None:
        """Add `n` events that took `seconds` together."""
        self.count += n
        self.seconds += seconds


@dataclass(slots=True)
class SizeStatistics:
    """Batches of one size."""

    prepare: Duration = field(default_factory=Duration)
    execute: Duration = field(default_factory=Duration)
    finish: Duration = field(default_factory=Duration)


class EngineStatistics:
    """Thread-safe counters. Read the attributes; write by the methods."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.success = Duration()
        self.fail = Duration()
        self.cancelled = 0
        self.expired = 0
        self.rejected = 0
        self.queue = Duration()
        self.prepare = Duration()
        self.execute = Duration()
        self.finish = Duration()
        self.rows = 0
        self.batches = 0
        self.tokens = 0
        self.padded_tokens = 0
        self.last_inference = 0.0
        self.restarts = 0
        self.by_size: dict[int, SizeStatistics] = {}
        self.rows_per_second = 0.0
        #: Tokens (tensors: rows) a second of a busy engine, about.
        self.tokens_per_second = 0.0

    def batch(
        self, rows: int, tokens: int, padded: int, prepare: float, execute: float, finish: float
    ) -> None:
        """One batch that ran, times in seconds."""
        with self._lock:
            self.batches += 1
            self.rows += rows
            self.tokens += tokens
            self.padded_tokens += padded
            self.prepare.add(prepare)
            self.execute.add(execute)
            self.finish.add(finish)
            size = self.by_size.get(rows)
            if size is None:
                size = self.by_size[rows] = SizeStatistics()
            size.prepare.add(prepare)
            size.execute.add(execute)
            size.finish.add(finish)
            took = max(prepare + execute + finish, 1e-6)
            best = self.tokens_per_second
            self.tokens_per_second = max(tokens / took, best + FORGETS * (tokens / took - best))
            rate = rows / took
            old = self.rows_per_second
            self.rows_per_second = rate if not old else old + EWMA * (rate - old)

    def alone(self, rows: int, calls: int, seconds: float, wall: float) -> None:
        """Calls of so many rows each ran by themselves, past the queue, in so many seconds together. They
        say nothing of how fast batches go."""
        with self._lock:
            self.batches += calls
            self.rows += rows * calls
            self.tokens += rows * calls
            self.padded_tokens += rows * calls
            size = self.by_size.get(rows)
            if size is None:
                size = self.by_size[rows] = SizeStatistics()
            for all_of, of_size in (
                (self.prepare, size.prepare),
                (self.execute, size.execute),
                (self.finish, size.finish),
            ):
                spent = seconds if of_size is size.execute else 0.0
                all_of.add(spent, calls)
                of_size.add(spent, calls)
            self.success.add(seconds, calls)
            self.queue.add(0.0, calls)
            self.last_inference = wall

    @property
    def padding_ratio(self) -> float:
        """Share of the tokens that ran which were padding, 0 to 1."""
        return 1.0 - self.tokens / self.padded_tokens if self.padded_tokens else 0.0

    def ended(
        self, outcome: str, seconds: float, queue_s: float, wall: float, calls: int = 1
    ) -> None:
        """Calls that ended together: `success`, `fail`, `cancelled`, `expired` or `rejected`."""
        with self._lock:
            if outcome == "success":
                self.success.add(seconds * calls, calls)
                self.last_inference = wall
            elif outcome == "fail":
                self.fail.add(seconds * calls, calls)
            else:
                setattr(self, outcome, getattr(self, outcome) + calls)
            self.queue.add(queue_s * calls, calls)
