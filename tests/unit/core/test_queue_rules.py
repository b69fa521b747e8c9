"""The queue's promises, whatever comes: budgets, the oldest first, nothing lost, nothing dead run."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from forebay.errors import QueueFull
from forebay_server.core.completion import RequestCompletion
from forebay_server.core.interfaces import BatchPolicy, EngineRequest, Item, TokenInput
from forebay_server.core.queue import RequestQueue
from hypothesis import given, settings
from hypothesis import strategies as st


def request(lengths: list[int], deadline: float | None = None, group: str = "") -> EngineRequest:
    items = [Item(TokenInput(np.zeros(n, np.int64)), n, group=group) for n in lengths]
    return EngineRequest(items, deadline=deadline)


steps = st.lists(
    st.one_of(
        st.tuples(
            st.just("push"),
            st.lists(st.integers(1, 120), min_size=1, max_size=12),
            st.sampled_from(["", "a", "b"]),
        ),
        st.tuples(st.just("cut"), st.just([0]), st.just("")),
        st.tuples(
            st.just("cancel"), st.lists(st.integers(0, 30), min_size=1, max_size=1), st.just("")
        ),
    ),
    max_size=60,
)
POLICY = BatchPolicy(max_batch_tokens=256, max_batch_size=8, max_queue_size=60, sort_window=3)


@settings(max_examples=200, deadline=None)
@given(steps, st.sampled_from([None, 0, 10]))
def test_batches_keep_the_rules_and_every_item_is_served_once(
    script: list[tuple[str, list[int], str]], padding: int | None
) -> None:
    queue = RequestQueue(replace(POLICY, max_padding_tokens=padding))
    live: list[RequestCompletion] = []
    order: dict[tuple[int, int], int] = {}
    waiting: set[tuple[int, int]] = set()
    ticks = 0

    def cut() -> bool:
        made = queue.cut()
        if made is None:
            assert not waiting
            return False
        batch = made.batch
        keys = [(id(e.owner), e.index) for e in made.entries]
        assert len(set(keys)) == len(keys)
        assert set(keys) <= waiting, "served twice, or served though it was taken back"
        assert min(order[k] for k in waiting) in [order[k] for k in keys], "the oldest was left out"
        assert batch.rows <= POLICY.max_batch_size
        assert batch.length >= max(i.length for i in batch.items)
        assert batch.length * batch.rows <= POLICY.max_batch_tokens or batch.rows == 1
        padded = batch.length * batch.rows - sum(i.length for i in batch.items)
        assert padding is None or padded <= padding
        assert len({i.group for i in batch.items}) == 1
        waiting.difference_update(keys)
        return True

    for what, values, group in script:
        if what == "push":
            completion = RequestCompletion(request(values, group=group), 0.0)
            before = queue.waiting_rows
            try:
                queue.push(completion)
            except QueueFull as e:
                assert before and before + len(values) > POLICY.max_queue_size
                assert e.retry_after_s and e.retry_after_s > 0
                continue
            live.append(completion)
            for i in range(len(values)):
                ticks += 1
                order[id(completion), i] = ticks
                waiting.add((id(completion), i))
        elif what == "cut":
            cut()
        elif live:
            gone = live[values[0] % len(live)]
            if gone.fail(RuntimeError("taken back")):
                queue.discard(gone)
            waiting.difference_update({k for k in waiting if k[0] == id(gone)})
        assert queue.waiting_rows == len(waiting)
    while cut():
        pass
    assert queue.waiting_rows == 0


def test_an_item_beyond_the_budget_runs_alone_and_at_once() -> None:
    queue = RequestQueue(POLICY)
    for lengths in ([5], [5000], [5]):
        queue.push(RequestCompletion(request(lengths), 0.0))
    rows = []
    while (made := queue.cut()) is not None:
        rows.append(sorted(i.length for i in made.batch.items))
    assert [5000] in rows
    assert sum(map(len, rows)) == 3


def test_expired_requests_are_taken_out_and_never_cut() -> None:
    queue = RequestQueue(POLICY)
    early = RequestCompletion(request([3, 4], deadline=5.0), 0.0)
    late = RequestCompletion(request([3], deadline=50.0), 0.0)
    queue.push(early)
    queue.push(late)
    assert queue.next_deadline() == 5.0
    assert queue.expire(5.0) == [early]
    made = queue.cut()
    assert made is not None
    assert [e.owner for e in made.entries] == [late]
    assert queue.cut() is None


def test_near_lengths_ride_together_when_more_waits_than_fits() -> None:
    queue = RequestQueue(BatchPolicy(max_batch_tokens=100_000, max_batch_size=4, sort_window=8))
    for n in [10, 200, 11, 190, 12, 180, 13, 170]:
        queue.push(RequestCompletion(request([n]), 0.0))
    batches = []
    while (made := queue.cut()) is not None:
        batches.append(sorted(i.length for i in made.batch.items))
    assert sorted(batches) == [[10, 11, 12, 13], [170, 180, 190, 200]]


def test_what_would_be_padded_too_much_goes_apart() -> None:
    policy = BatchPolicy(max_batch_tokens=10_000, max_batch_size=8, max_padding_tokens=20)
    queue = RequestQueue(policy)
    for n in [100, 20, 22, 95, 24, 60, 26]:
        queue.push(RequestCompletion(request([n]), 0.0))
    batches = []
    while (made := queue.cut()) is not None:
        batches.append(sorted(i.length for i in made.batch.items))
    assert batches[0] == [95, 100], "the oldest goes first"
    assert sorted(batches) == [[20, 22, 24, 26], [60], [95, 100]]


def test_lengths_of_one_bucket_are_not_padded_against_each_other() -> None:
    policy = BatchPolicy(max_padding_tokens=0, length_buckets=(16, 32))
    queue = RequestQueue(policy)
    for n in [10, 16, 30, 12]:
        queue.push(RequestCompletion(request([n]), 0.0))
    made = queue.cut()
    assert made is not None
    assert sorted(i.length for i in made.batch.items) == [10, 12, 16]


def test_buckets_round_lengths_up() -> None:
    policy = BatchPolicy(max_batch_tokens=64, max_batch_size=8, length_buckets=(16, 32))
    queue = RequestQueue(policy)
    for _ in range(5):
        queue.push(RequestCompletion(request([10]), 0.0))
    made = queue.cut()
    assert made is not None
    assert (made.batch.length, made.batch.rows) == (16, 4)


def test_a_request_beyond_the_bound_is_taken_by_an_empty_queue_only() -> None:
    queue = RequestQueue(POLICY)
    queue.push(RequestCompletion(request([1] * 100), 0.0))
    with pytest.raises(QueueFull):
        queue.push(RequestCompletion(request([1]), 0.0))
