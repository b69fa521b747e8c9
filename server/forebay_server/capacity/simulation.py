"""Replicas, queues and batches in simulated time. The queue is the server's own RequestQueue; engines
take the time that the cost model says; nothing sleeps.

A call arrives, is sent to a replica, and waits there. A slot that is free cuts the next batch at once
(or after the policy's delay). The call's latency is its waiting, its batch, and its overhead.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Literal

import numpy as np
from forebay.errors import ForebayError

from forebay_server.capacity.cost import CostModel
from forebay_server.core.completion import RequestCompletion
from forebay_server.core.interfaces import BatchPolicy, EngineRequest, Item, TokenInput
from forebay_server.core.queue import Cut, RequestQueue

Routing = Literal["random", "round_robin", "least_loaded", "two_choices"]
Arrivals = Literal["poisson", "onoff"]

_NOTHING = TokenInput(np.zeros(0, np.int64))


@dataclass(frozen=True, slots=True)
class Call:
    """What arrives: items of `length` tokens (1 for tensors) with `rows` rows each."""

    length: int = 1
    rows: int = 1
    items: int = 1

    @classmethod
    def of_table(cls, rows: int, most: int) -> Call:
        """A call of so many rows of a table, `most` of which a batch takes: items of equal size."""
        items = -(-rows // most)
        return cls(1, -(-rows // items), items)


@dataclass(frozen=True, slots=True)
class Scenario:
    """What is simulated.

    Attributes:
        rate: calls a second over all replicas.
        calls: what arrives, drawn from evenly.
        slots: engine instances of a replica.
        deadline_s: of each call; None = none.
        call_s: interpreter time that each call takes at its replica, one after the other: what bounds
            models that are quicker than their server.
        routing: how the load balancer picks a replica. `least_loaded` knows all queues, `two_choices`
            the better of two that it picks at random.
    """

    rate: float
    calls: Sequence[Call]
    cost: CostModel
    policy: BatchPolicy
    replicas: int = 1
    slots: int = 1
    deadline_s: float | None = None
    call_s: float = 0.0
    routing: Routing = "random"
    arrivals: Arrivals = "poisson"
    on_s: float = 0.1
    off_s: float = 0.3
    seed: int = 1


@dataclass(slots=True)
class Outcome:
    """What came of it. Latencies of answered calls, seconds, after the warm-up."""

    latencies: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    offered: int = 0
    refused: int = 0
    late: int = 0
    batches: int = 0
    rows: int = 0
    busy_s: float = 0.0
    seconds: float = 0.0
    slots: int = 1
    most_waiting: int = 0
    gave_up: bool = False

    def quantile(self, q: float) -> float:
        """A quantile of the latencies, seconds; infinite when nothing was answered."""
        return float(np.quantile(self.latencies, q)) if self.latencies else float("inf")

    @property
    def utilisation(self) -> float:
        """Share of the time that engines were busy."""
        return self.busy_s / max(1e-9, self.seconds * self.slots)

    @property
    def answered(self) -> float:
        """Share of the calls that were answered in time."""
        return len(self.latencies) / max(1, self.offered)

    @property
    def batch_rows(self) -> float:
        """Rows of a batch, on average."""
        return self.rows / max(1, self.batches)


@dataclass(slots=True, eq=False)
class _Job:
    """A batch that runs. `left`: seconds that it would still take alone."""

    cut: Cut
    left: float
    began: float


class _Replica:
    def __init__(self, policy: BatchPolicy, slots: int) -> None:
        self.queue = RequestQueue(policy)
        self.free = slots
        self.load = 0  # rows that wait or run
        self.running = 0  # tokens of the batches that run
        self.jobs: list[_Job] = []
        self.since = 0.0  # until then the jobs' work is accounted for
        self.pace = 1.0  # seconds that one of their seconds has taken since
        self.turn = 0  # of the plan for the next job's end: older ones are void
        self.door = 0.0  # when the interpreter has passed all that came
        self.alarm: float | None = None  # when a batch that waits for more is cut


class Simulation:
    """One run of a scenario. `observe`, when given, sees (time, replica, rows, seconds) of batches."""

    def __init__(
        self,
        scenario: Scenario,
        observe: Callable[[float, int, int, float], None] | None = None,
    ) -> None:
        self._s = scenario
        self._observe = observe
        self._random = random.Random(scenario.seed)
        self._replicas = [
            _Replica(scenario.policy, scenario.slots) for _ in range(scenario.replicas)
        ]
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = 0
        self._turn = 0
        self._now = 0.0
        self._warm = 0.0
        self._out = Outcome()
        self._slow_s = float("inf")
        self._slow_left = 0

    def run(
        self, seconds: float, warm_s: float | None = None, p99_s: float | None = None
    ) -> Outcome:
        """Simulate; the first `warm_s` (a tenth by default) do not count.

        With `p99_s` the run gives up once a call was refused, or so many took longer that the p99 of
        all must be above it: what came of it until then is not the whole.
        """
        s = self._s
        self._warm = seconds / 10 if warm_s is None else warm_s
        if p99_s is not None:
            self._slow_s = p99_s
            counted = s.rate * (seconds - self._warm)
            # A hundredth, and six times what the number of arrivals varies by.
            self._slow_left = int((counted + 6 * counted**0.5) / 100) + 1
        self._out.seconds = seconds - self._warm
        self._out.slots = s.replicas * s.slots
        out = self._out
        for at in self._arrivals(seconds):
            while self._events and self._events[0][0] <= at:
                self._step()
            if out.gave_up:
                return out
            self._now = at
            self._arrive()
        while self._events and not out.gave_up:
            self._step()
        return out

    def _step(self) -> None:
        self._now, _, action = heappop(self._events)
        action()

    def _later(self, at: float, action: Callable[[], None]) -> None:
        self._order += 1
        heappush(self._events, (at, self._order, action))

    def _arrivals(self, end: float) -> Iterator[float]:
        s, rng = self._s, self._random
        at = 0.0
        if s.arrivals == "poisson":
            while (at := at + rng.expovariate(s.rate)) < end:
                yield at
            return
        on_left = rng.expovariate(1 / s.on_s)
        rate = s.rate * (s.on_s + s.off_s) / s.on_s
        while at < end:
            gap = rng.expovariate(rate)
            while gap > on_left:
                gap -= on_left
                at += on_left + rng.expovariate(1 / s.off_s)
                on_left = rng.expovariate(1 / s.on_s)
            on_left -= gap
            at += gap
            if at < end:
                yield at

    def _route(self) -> int:
        s, n = self._s, self._s.replicas
        if n == 1:
            return 0
        if s.routing == "round_robin":
            self._turn = (self._turn + 1) % n
            return self._turn
        if s.routing == "least_loaded":
            return min(range(n), key=lambda i: self._replicas[i].load)
        first = self._random.randrange(n)
        if s.routing == "random":
            return first
        second = self._random.randrange(n)
        return first if self._replicas[first].load <= self._replicas[second].load else second

    def _arrive(self) -> None:
        s = self._s
        call = s.calls[self._random.randrange(len(s.calls))]
        at = self._route()
        replica = self._replicas[at]
        replica.load += call.rows * call.items
        if s.call_s <= 0:
            self._submit(at, call, self._now)
            return
        came = self._now
        if replica.door <= came:  # the interpreter begins: batches beside it go slower
            self._work(at)
            replica.door = came + s.call_s
            self._plan(at)
        else:
            replica.door += s.call_s
        self._later(replica.door, lambda: self._submit(at, call, came))

    def _submit(self, at: int, call: Call, came: float) -> None:
        """The call is parsed and joins the queue. `came`: when it reached the replica."""
        s, replica = self._s, self._replicas[at]
        if replica.door <= self._now:  # the interpreter has nothing to do from here on
            self._work(at)
            self._plan(at)
        items = [Item(_NOTHING, call.length, call.rows) for _ in range(call.items)]
        deadline = None if s.deadline_s is None else came + s.deadline_s
        completion = RequestCompletion(
            EngineRequest(items, deadline=deadline), came, lambda c: self._ended(replica, c)
        )
        counts = came >= self._warm
        self._out.offered += counts
        rows = max(1, min(s.policy.max_batch_size, s.policy.max_batch_tokens // call.length))
        rate = rows * call.length / max(1e-9, s.cost.seconds(rows, call.length)) * s.slots
        try:
            replica.queue.push(completion, rate, self._now, replica.running)
        except ForebayError:
            self._out.refused += counts
            self._out.gave_up |= counts and self._slow_s < float("inf")
            replica.load -= call.rows * call.items
            return
        self._out.most_waiting = max(self._out.most_waiting, replica.queue.waiting_rows)
        if replica.free:
            self._cut(at)

    def _ended(self, replica: _Replica, completion: RequestCompletion) -> None:
        replica.load -= sum(i.rows for i in completion.request.items)
        counts = completion.enqueued >= self._warm
        if completion.error() is not None:
            self._out.late += counts
            return
        if not counts:
            return
        overhead = self._s.cost.overhead_s
        took = self._now - completion.enqueued
        took += overhead[self._random.randrange(len(overhead))]
        self._out.latencies.append(took)
        if took > self._slow_s:
            self._slow_left -= 1
            self._out.gave_up |= self._slow_left < 0
        self._out.waits.append(completion.timing.queue_s)

    def _cut(self, at: int) -> None:
        s, replica, now = self._s, self._replicas[at], self._now
        queue = replica.queue
        while replica.free:
            for late in queue.expire(now):
                late.fail(TimeoutError())
            delay = s.policy.max_queue_delay_s
            if delay > 0 and not queue.full_batch_waits():
                oldest = queue.oldest_enqueued()
                if oldest is None:
                    return
                if oldest + delay > now:
                    if replica.alarm is None or replica.alarm <= now:
                        replica.alarm = oldest + delay
                        self._later(replica.alarm, lambda: self._cut(at))
                    return
            cut = queue.cut(now)
            if cut is None:
                return
            for entry in cut.entries:
                entry.owner.timing.queue_s = now - entry.owner.enqueued
            ratios = s.cost.ratios
            seconds = s.cost.seconds(cut.batch.rows, cut.batch.length)
            seconds *= ratios[self._random.randrange(len(ratios))]
            replica.free -= 1
            replica.running += cut.batch.rows * cut.batch.length
            if now >= self._warm:
                self._out.batches += 1
                self._out.rows += cut.batch.rows
            self._work(at)
            replica.jobs.append(_Job(cut, seconds, now))
            self._plan(at)

    def _slower(self, replica: _Replica) -> float:
        """By what a batch takes longer beside those that run now, and beside the interpreter."""
        beside = len(replica.jobs) - 1 + (replica.door > self._now)
        return 1 + self._s.cost.contention * beside

    def _work(self, at: int) -> None:
        """Account for what the running batches have done until now."""
        replica = self._replicas[at]
        if replica.jobs:
            done = (self._now - replica.since) / replica.pace
            for job in replica.jobs:
                job.left -= done
        replica.since = self._now

    def _plan(self, at: int) -> None:
        """The next batch that ends, if none begins or ends before it."""
        replica = self._replicas[at]
        if not replica.jobs:
            return
        job = min(replica.jobs, key=lambda j: j.left)
        replica.turn += 1
        replica.pace = self._slower(replica)
        ends = self._now + max(0.0, job.left) * replica.pace
        self._later(ends, lambda turn=replica.turn: self._done(at, job, turn))

    def _done(self, at: int, job: _Job, turn: int) -> None:
        replica = self._replicas[at]
        if turn != replica.turn:
            return
        self._work(at)
        replica.jobs.remove(job)
        rows = job.cut.batch.rows
        replica.running -= rows * job.cut.batch.length
        if job.began >= self._warm:
            self._out.busy_s += self._now - job.began
        if self._observe is not None:
            self._observe(job.began, at, rows, self._now - job.began)
        result = np.zeros(0)
        for entry in job.cut.entries:
            entry.owner.set_result(entry.index, result)
        self._plan(at)
        if self._s.cost.between_s > 0:
            self._later(self._now + self._s.cost.between_s, lambda: self._free(at))
        else:
            self._free(at)

    def _free(self, at: int) -> None:
        """A slot is ready for its next batch."""
        self._replicas[at].free += 1
        self._cut(at)


def simulate(scenario: Scenario, seconds: float) -> Outcome:
    """Run a scenario once."""
    return Simulation(scenario).run(seconds)
