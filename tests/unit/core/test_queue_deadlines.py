"""Admission by deadline: who would wait too long is refused at once, and nobody else."""

from __future__ import annotations

import numpy as np
import pytest
from forebay.errors import QueueFull
from forebay_server.core.completion import RequestCompletion
from forebay_server.core.interfaces import BatchPolicy, EngineRequest, Item, TokenInput
from forebay_server.core.queue import GAP_SHARE, MOST_OF_DEADLINE, RequestQueue
from hypothesis import given
from hypothesis import strategies as st

RATE = 1000.0  # tokens a second


def completion(tokens: int, deadline: float | None = None, priority: int = 0) -> RequestCompletion:
    item = Item(TokenInput(np.zeros(0, np.int64)), tokens)
    return RequestCompletion(EngineRequest([item], deadline=deadline, priority=priority), 0.0)


@pytest.fixture
def queue() -> RequestQueue:
    """A second's worth of work waits."""
    queue = RequestQueue(BatchPolicy(max_batch_tokens=500))
    for _ in range(10):
        queue.push(completion(100), RATE, 0.0)
    return queue


def test_who_would_wait_too_long_is_told_when_to_come_again(queue: RequestQueue) -> None:
    with pytest.raises(QueueFull) as refused:
        queue.push(completion(1, deadline=1.2), RATE, 0.2)
    # A second for what waits, half of one for the batch that it would be in.
    assert refused.value.retry_after_s == pytest.approx(1.5 - MOST_OF_DEADLINE)
    assert queue.waiting_tokens == 1000, "what is refused is not counted"


def test_who_has_time_waits(queue: RequestQueue) -> None:
    queue.push(completion(1, deadline=0.3 + 1.5 / MOST_OF_DEADLINE), RATE, 0.2)
    queue.push(completion(1), RATE, 0.2)
    assert queue.waiting_rows == 12


def test_who_goes_first_does_not_wait_for_what_goes_behind(queue: RequestQueue) -> None:
    urgent = completion(1, deadline=1.0, priority=1)
    queue.push(urgent, RATE, 0.2)
    with pytest.raises(QueueFull):
        queue.push(completion(1, deadline=1.0), RATE, 0.2)
    first = queue.cut()
    assert first is not None and first.entries[0].owner is urgent


def test_an_unknown_throughput_refuses_nobody(queue: RequestQueue) -> None:
    queue.push(completion(1, deadline=4.1), 0.0, 4.0)
    assert queue.waiting_rows == 11


def test_a_deadline_that_has_passed_is_no_full_queue(queue: RequestQueue) -> None:
    late = completion(1, deadline=3.0)
    queue.push(late, RATE, 4.0)
    assert queue.expire(4.0) == [late]


def test_nothing_waits_so_nobody_is_refused() -> None:
    queue = RequestQueue(BatchPolicy())
    queue.push(completion(100, deadline=1e-6), 1.0, 0.0)
    assert queue.waiting_rows == 1


def test_an_engine_that_became_slow_shows_in_what_the_oldest_has_waited(
    queue: RequestQueue,
) -> None:
    with pytest.raises(QueueFull):
        queue.push(completion(1, deadline=9.0), 1000 * RATE, 8.0)
    while queue.waiting_tokens > 500:
        queue.cut()
    queue.push(completion(1, deadline=9.0), 1000 * RATE, 8.0)  # the next batch takes all that waits


def test_work_that_left_makes_room(queue: RequestQueue) -> None:
    assert queue.cut(0.0) is not None  # half a second's worth
    deadline = 0.3 + 1.0 / MOST_OF_DEADLINE
    queue.push(completion(1, deadline), RATE, 0.2)
    assert queue.waiting_tokens == 501
    with pytest.raises(QueueFull):  # it is not answered yet, and runs first
        queue.push(completion(1, deadline), RATE, 0.2, running_tokens=500)


def test_a_refusal_says_for_whom_else_it_holds(queue: RequestQueue) -> None:
    late = queue.refusal(1, 1.2, RATE, 0.2)
    assert late is not None and late.holds_s > 0 and not late.by_size
    within = late.within_s
    assert within == pytest.approx(1.5 / MOST_OF_DEADLINE)
    assert within is not None
    assert queue.refusal(1, 0.2 + within - 0.01, RATE, 0.2) is not None
    assert queue.refusal(1, 0.2 + within + 0.01, RATE, 0.2) is None
    small = RequestQueue(BatchPolicy(max_queue_size=4))
    for _ in range(3):
        small.push(completion(1))
    full = small.refusal(2, None, RATE, 0.0)
    assert full is not None and full.by_size and full.within_s is None
    assert small.refusal(1, None, RATE, 0.0) is None


@pytest.mark.parametrize(
    ("rate", "holds_s"), [(1000, 0.1), (8000, 0.0625), (100_000, 0.025), (0, 0.025)]
)
def test_a_refusal_holds_for_half_of_what_waits(rate: float, holds_s: float) -> None:
    """A tenth of a second at most, and a fortieth where it is little or unknown."""
    queue = RequestQueue(BatchPolicy(max_batch_tokens=500, max_queue_size=10))
    for _ in range(10):
        queue.push(completion(100), rate, 0.0)
    full = queue.refusal(1, None, rate, 0.0)
    assert full is not None and full.holds_s == pytest.approx(holds_s)
    late = queue.refusal(1, 1e-3, rate, 0.0)
    assert late is not None and late.holds_s == pytest.approx(holds_s)


def test_calls_come_in_after_a_hold_no_faster_than_engines_take_them() -> None:
    queue = RequestQueue(BatchPolicy(max_batch_tokens=500, max_queue_size=10))
    for _ in range(10):
        queue.push(completion(100), RATE, 0.0)
    one, two = (queue.refusal(rows, None, RATE, 0.0) for rows in (1, 2))
    assert one is not None and two is not None
    assert one.gap_s == pytest.approx(GAP_SHARE * 0.1), "ten rows take a second"
    assert two.gap_s == pytest.approx(2 * one.gap_s)
    assert one.retry_after_s == 1.0
    unknown = queue.refusal(1, None, 0.0, 0.0)
    assert unknown is not None and (unknown.gap_s, unknown.retry_after_s) == (0.0, 1.0)


def test_rows_that_are_about_to_come_count_in_a_queue_that_is_rather_full() -> None:
    small = RequestQueue(BatchPolicy(max_queue_size=4))
    assert small.refusal(1, None, RATE, 0.0, ahead=100) is None
    for _ in range(2):
        small.push(completion(1))
    assert small.refusal(1, None, RATE, 0.0, ahead=100) is None, "they may leave as others come"
    small.push(completion(1))
    full = small.refusal(1, None, RATE, 0.0, ahead=1)
    assert full is not None and "holds 4 of 4" in full.message
    assert small.refusal(1, None, RATE, 0.0) is None


@given(
    st.lists(st.tuples(st.integers(1, 60), st.sampled_from(["push", "cut", "discard", "expire"])))
)
def test_tokens_are_counted_in_and_out(steps: list[tuple[int, str]]) -> None:
    queue = RequestQueue(BatchPolicy(max_batch_tokens=100, max_batch_size=3))
    waiting: list[RequestCompletion] = []
    for now, (tokens, what) in enumerate(steps):
        if what == "push":
            waiting.append(completion(tokens, deadline=now + tokens))
            queue.push(waiting[-1], 0.0, now)
        elif what == "cut":
            queue.cut(now)
        elif what == "expire":
            queue.expire(now)
        elif waiting:
            queue.discard(waiting.pop())
        held = sum(c.waiting_tokens for c in waiting)
        assert queue.waiting_tokens >= held >= 0
        assert (queue.waiting_tokens == 0) == (queue.waiting_rows == 0)
    while queue.cut():
        pass
    assert queue.waiting_tokens == queue.waiting_rows == 0
