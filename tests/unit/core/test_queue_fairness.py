"""Nothing starves in the queue, deadlines and priorities hold, and its memory stays bounded."""

from __future__ import annotations

import numpy as np
from forebay_server.core.completion import RequestCompletion
from forebay_server.core.interfaces import BatchPolicy, EngineRequest, Item, TokenInput
from forebay_server.core.queue import RequestQueue
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

POLICY = BatchPolicy(max_batch_tokens=128, max_batch_size=6, max_queue_size=200, sort_window=3)


def completion(
    lengths: list[int], deadline: float | None = None, priority: int = 0, group: str = ""
) -> RequestCompletion:
    items = [Item(TokenInput(np.zeros(1, np.int64)), n, group=group) for n in lengths]
    return RequestCompletion(EngineRequest(items, deadline=deadline, priority=priority), 0.0)


class Queue(RuleBasedStateMachine):
    """A queue beside a list that knows what must happen."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = RequestQueue(POLICY)
        self.now = 0.0
        self.waiting: dict[tuple[RequestCompletion, int], int] = {}
        self.count = 0

    def _drop(self, gone: RequestCompletion) -> None:
        self.waiting = {k: v for k, v in self.waiting.items() if k[0] is not gone}

    @rule(
        lengths=st.lists(st.integers(1, 150), min_size=1, max_size=10),
        lifetime=st.none() | st.integers(1, 9),
        priority=st.sampled_from([0, 0, 1]),
        group=st.sampled_from(["", "", "g"]),
    )
    def push(self, lengths: list[int], lifetime: int | None, priority: int, group: str) -> None:
        deadline = None if lifetime is None else self.now + lifetime
        made = completion(lengths, deadline, priority, group)
        if self.queue.waiting_rows + len(lengths) > POLICY.max_queue_size:
            return
        self.queue.push(made)
        for i in range(len(lengths)):
            self.waiting[made, i] = self.count
            self.count += 1

    @rule(seconds=st.integers(1, 5))
    def time_passes(self, seconds: int) -> None:
        self.now += seconds
        due = {k[0] for k in self.waiting if (k[0].request.deadline or 1e9) <= self.now}
        upcoming = self.queue.next_deadline()
        assert (upcoming is not None and upcoming <= self.now) == bool(due)

    @rule()
    def expire(self) -> None:
        late = self.queue.expire(self.now)
        due = {k[0] for k in self.waiting if (k[0].request.deadline or 1e9) <= self.now}
        assert set(late) == due
        assert len(late) == len(due)
        for gone in late:
            self._drop(gone)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        gone = data.draw(st.sampled_from(list(self.waiting)))[0]
        gone.cancel()
        self.queue.discard(gone)
        self._drop(gone)

    @rule()
    def cut(self) -> None:
        self.expire()
        cut = self.queue.cut(self.now)
        if cut is None:
            assert not self.waiting, "not work-conserving"
            return
        keys = [(e.owner, e.index) for e in cut.entries]
        assert len(set(keys)) == len(keys)
        assert set(keys) <= set(self.waiting)
        urgent = max(k[0].request.priority for k in self.waiting)
        assert {k[0].request.priority for k in keys} == {urgent}
        assert len({i.group for i in cut.batch.items}) == 1
        oldest = min(n for k, n in self.waiting.items() if k[0].request.priority == urgent)
        assert oldest in [self.waiting[k] for k in keys]
        assert cut.batch.rows == len(keys) <= POLICY.max_batch_size
        assert len(keys) == 1 or cut.batch.length * cut.batch.rows <= POLICY.max_batch_tokens
        for key in keys:
            del self.waiting[key]

    @invariant()
    def counts(self) -> None:
        # Expired requests count until they are asked for.
        assert self.queue.waiting_rows == len(self.waiting)


Queue.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestQueue = Queue.TestCase


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 120), min_size=1, max_size=18), st.integers(1, 120))
def test_newcomers_of_the_best_length_do_not_hold_up_the_window(
    lengths: list[int], new: int
) -> None:
    queue = RequestQueue(POLICY)
    old = [completion([n]) for n in lengths]
    for one in old:
        queue.push(one)
    served: set[int] = set()
    cuts = 0
    while not all(id(o) in served for o in old):
        for _ in range(6):  # a batch's worth arrives for every batch that leaves
            if queue.waiting_rows < 190:
                queue.push(completion([new]))
        cut = queue.cut()
        assert cut is not None
        served.update(id(e.owner) for e in cut.entries)
        cuts += 1
    # At most 18 old items of up to 120 tokens: alone in the worst case, never behind newcomers.
    assert cuts <= len(lengths)


def test_deadlines_of_served_requests_do_not_pile_up() -> None:
    queue = RequestQueue(POLICY)
    for _ in range(5000):
        queue.push(completion([3], deadline=1e9))
        assert queue.cut(0.0) is not None
    assert len(queue._deadlines) < 600


def test_lanes_of_groups_that_are_served_are_forgotten() -> None:
    queue = RequestQueue(POLICY)
    for n in range(1000):
        queue.push(completion([3], group=str(n)))
        assert queue.cut() is not None
    assert not queue._lanes
    assert not queue._ready
