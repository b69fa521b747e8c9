"""Limits per key: never overspent, never falsely refused, in process and in Redis."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis
from forebay_server.access.keys import Limits
from forebay_server.access.limits import Limiter, LimitSpent, ProcessLimiter, Standing, capacity
from forebay_server.access.redis_limits import LEASE_S, RedisLimiter
from hypothesis import given
from hypothesis import strategies as st

from .conftest import Clock, RedisServer


def acquire(limiter: Limiter, key: str, limits: Limits) -> Standing:
    """One call's admission."""
    admitted = limiter.admit(key, limits)
    if admitted.refusal is not None:
        assert admitted.calls == 0
        raise admitted.refusal
    assert admitted.calls == 1
    return admitted.standing


def admitted(limiter: Limiter, limits: Limits, key: str = "k") -> bool:
    try:
        acquire(limiter, key, limits)
    except LimitSpent:
        return False
    return True


class Borrower:
    """Uses some of what it was lent; gives the rest back when asked."""

    def __init__(self, limiter: ProcessLimiter, limits: Limits) -> None:
        self.limiter, self.limits = limiter, limits
        self.calls = self.tokens = 0
        self.used = (0, 0)
        limiter.borrower = self

    def borrow(self, calls: int, tokens: int) -> None:
        loan = self.limiter.lend("k", self.limits, calls, tokens)
        if loan is not None:
            self.calls += loan.calls
            self.tokens += loan.tokens

    def use(self, calls: int, tokens: int) -> int:
        """Gives how many calls it had."""
        calls = min(calls, self.calls)
        tokens = min(tokens, self.tokens)
        self.calls -= calls
        self.tokens -= tokens
        self.used = (self.used[0] + calls, self.used[1] + tokens)
        return calls

    def settle(self, key_id: str) -> None:
        used, self.used = self.used, (0, 0)
        self.limiter.settle(key_id, self.limits, used, (0, 0))

    def recall(self, key_id: str) -> None:
        self.settle(key_id)
        back, self.calls, self.tokens = (self.calls, self.tokens), 0, 0
        self.limiter.settle(key_id, self.limits, (0, 0), back)


@given(
    rate=st.floats(0.01, 100),
    burst=st.integers(1, 50),
    steps=st.lists(
        st.tuples(st.sampled_from(["wait", "call", "lend", "use", "recall"]), st.integers(1, 60)),
        min_size=1,
        max_size=80,
    ),
)
def test_what_is_lent_is_part_of_what_the_limit_allows(
    rate: float, burst: int, steps: list[tuple[str, int]]
) -> None:
    clock, limits = Clock(0.0), Limits(rate, burst)
    limiter = ProcessLimiter(clock)
    borrower = Borrower(limiter, limits)
    level = float(burst)  # the bucket by the book
    for step, n in steps:
        if step == "wait":
            borrower.settle("k")
            clock.now += n / 10
            level = min(burst, level + n / 10 * rate)
        elif step == "lend":
            borrower.borrow(n, n)
        elif step == "use":
            level -= borrower.use(n, n)
        elif step == "recall":
            borrower.recall("k")
        else:
            got = limiter.admit("k", limits, n)
            assert abs(got.calls - min(n, level)) < 1 + 1e-3
            level -= got.calls
            assert got.standing.remaining_requests is not None
            assert abs(got.standing.remaining_requests - max(0.0, level)) < 1 + 1e-3
        assert level > -1e-3


def test_tokens_are_lent_and_come_back() -> None:
    clock, limits = Clock(0.0), Limits(tokens_per_minute=60)
    limiter = ProcessLimiter(clock)
    borrower = Borrower(limiter, limits)
    borrower.borrow(8, 100)
    assert (borrower.calls, borrower.tokens) == (8, 30), "half of what there is"
    borrower.use(8, 20)
    assert acquire(limiter, "k", limits).remaining_tokens == 40
    clock.now += 1000
    assert acquire(limiter, "k", limits).remaining_tokens == 60, "no more than a full bucket"
    limiter.release("k", limits, 55)
    assert acquire(limiter, "k", limits).remaining_tokens == 5, "those that were lent"
    limiter.release("k", limits, 5)
    assert not admitted(limiter, limits)


def test_keys_that_may_have_few_calls_at_once_are_lent_nothing() -> None:
    limiter = ProcessLimiter()
    assert limiter.lend("k", Limits(max_concurrency=31), 9, 9) is None
    loan = limiter.lend("k", Limits(max_concurrency=32), 9, 9)
    assert loan is not None and (loan.calls, loan.tokens) == (9, 9)
    assert limiter.lend("k", Limits(requests_per_second=1), 9, 9) is None, "half of one"


@given(
    rate=st.floats(0.01, 1e4),
    burst=st.none() | st.integers(1, 50),
    gaps=st.lists(st.floats(0, 30), min_size=1, max_size=80),
)
def test_calls_never_exceed_the_rate_and_none_is_refused_below_it(
    rate: float, burst: int | None, gaps: list[float]
) -> None:
    clock, limits = Clock(0.0), Limits(rate, burst)
    limiter, level = ProcessLimiter(clock), capacity(limits)
    full = level
    for gap in gaps:
        clock.now += gap
        level = min(full, level + gap * rate)  # the bucket by the book
        try:
            acquire(limiter, "k", limits)
            assert level >= 1 - 1e-5
            level -= 1
        except LimitSpent as e:
            assert level < 1 + 1e-5
            assert e.retry_after_s is not None
            assert e.retry_after_s == pytest.approx(max((1 - level) / rate, 0.001), abs=1e-4 / rate)


@given(rate=st.floats(0.01, 1e4), spent=st.integers(1, 20), early=st.floats(0.05, 0.9))
def test_the_retry_delay_is_true(rate: float, spent: int, early: float) -> None:
    clock, limits = Clock(0.0), Limits(rate, burst=1)
    limiter = ProcessLimiter(clock)
    for _ in range(spent):
        assert admitted(limiter, limits)
        with pytest.raises(LimitSpent) as e:
            acquire(limiter, "k", limits)
        wait = e.value.retry_after_s
        assert wait is not None
        if wait > 0.001:
            clock.now += wait * early
            assert not admitted(limiter, limits)
            clock.now += wait * (1 - early)
        else:
            clock.now += wait
        # RetryInfo holds whole nanoseconds, and clocks have a grain.
        clock.now -= 1e-9 / max(rate, 1.0)


@given(burst=st.integers(1, 60), callers=st.integers(2, 8))
def test_concurrent_callers_get_the_burst_and_no_more(burst: int, callers: int) -> None:
    limits, limiter = Limits(0.001, burst), ProcessLimiter(Clock())
    each = burst // callers + 3
    gate = threading.Barrier(callers)

    def call(_: int) -> int:
        gate.wait()
        return sum(admitted(limiter, limits) for _ in range(each))

    with ThreadPoolExecutor(callers) as pool:
        assert sum(pool.map(call, range(callers))) == min(burst, each * callers)


def test_tokens_are_taken_after_the_work_and_debt_is_waited_out() -> None:
    clock, limits = Clock(), Limits(tokens_per_minute=600)
    limiter = ProcessLimiter(clock)
    assert acquire(limiter, "k", limits).remaining_tokens == 600
    limiter.release("k", limits, 900)
    with pytest.raises(LimitSpent) as e:
        acquire(limiter, "k", limits)
    assert e.value.retry_after_s == pytest.approx(30.1)
    assert e.value.violations[0].subject == "key:k"
    assert "600 tokens" in e.value.violations[0].description
    clock.now += 30.1
    assert admitted(limiter, limits)


def test_calls_in_flight_are_bounded_and_given_back() -> None:
    limits, limiter = Limits(max_concurrency=2), ProcessLimiter(Clock())
    assert [admitted(limiter, limits) for _ in range(3)] == [True, True, False]
    limiter.release("k", limits, 0)
    assert admitted(limiter, limits)
    assert not admitted(limiter, limits)
    assert admitted(limiter, limits, "other")


def test_a_refusal_takes_nothing() -> None:
    limits, clock = Limits(1.0, 5, max_concurrency=1), Clock()
    limiter = ProcessLimiter(clock)
    assert acquire(limiter, "k", limits).remaining_requests == 4
    for _ in range(10):
        assert not admitted(limiter, limits)
    limiter.release("k", limits, 0)
    assert acquire(limiter, "k", limits).remaining_requests == 3


@given(
    limits=st.builds(
        Limits,
        st.none() | st.floats(0.01, 50),
        st.none() | st.integers(1, 9),
        st.none() | st.integers(1, 100),
        st.none() | st.integers(1, 9),
    ),
    lots=st.lists(st.tuples(st.integers(1, 6), st.floats(0, 3), st.integers(0, 40))),
)
def test_calls_that_come_together_are_admitted_as_one_by_one(
    limits: Limits, lots: list[tuple[int, float, int]]
) -> None:
    clock = Clock()
    together, alone = ProcessLimiter(clock), ProcessLimiter(clock)
    for calls, gap, tokens in lots:
        clock.now += gap
        lot = together.admit("k", limits, calls)
        assert lot.calls == sum(admitted(alone, limits) for _ in range(calls))
        assert (lot.refusal is not None) == (lot.calls < calls)
        if lot.calls:
            together.release("k", limits, tokens, lot.calls)
        for i in range(lot.calls):
            alone.release("k", limits, tokens if i == 0 else 0)


def test_headers_say_limit_remaining_and_reset() -> None:
    limits = Limits(2.0, 4, tokens_per_minute=60)
    limiter = ProcessLimiter(Clock())
    assert dict(acquire(limiter, "k", limits).headers()) == {
        "x-ratelimit-limit-requests": "4",
        "x-ratelimit-remaining-requests": "3",
        "x-ratelimit-reset-requests": "0.5s",
        "x-ratelimit-limit-tokens": "60",
        "x-ratelimit-remaining-tokens": "60",
        "x-ratelimit-reset-tokens": "0s",
    }
    limiter.release("k", limits, 15)
    after = dict(acquire(limiter, "k", limits).headers())
    assert after["x-ratelimit-remaining-tokens"] == "45"
    assert after["x-ratelimit-reset-tokens"] == "15s", "a token comes back each second"
    for _ in range(2):
        acquire(limiter, "k", limits)
    with pytest.raises(LimitSpent) as e:
        acquire(limiter, "k", limits)
    assert dict(e.value.standing.headers())["x-ratelimit-remaining-requests"] == "0"


def test_a_decision_takes_microseconds() -> None:
    limits, limiter = Limits(1e9, 10**6, 10**12, 10**6), ProcessLimiter()
    best = 1.0
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(100):
            acquire(limiter, "k", limits)
        best = min(best, (time.perf_counter() - start) / 100)
    assert best < 50e-6


def test_redis_servers_share_a_keys_burst(redis_server: RedisServer) -> None:
    limiters = [RedisLimiter(redis_server.url) for _ in range(3)]
    limits = Limits(0.001, 20)
    with ThreadPoolExecutor(6) as pool:
        got = list(pool.map(lambda i: admitted(limiters[i % 3], limits), range(60)))
    assert sum(got) == 20
    with pytest.raises(LimitSpent) as e:
        acquire(limiters[0], "k", limits)
    assert e.value.retry_after_s == pytest.approx(1000, rel=0.05)
    assert dict(e.value.standing.headers())["x-ratelimit-limit-requests"] == "20"


def test_redis_bounds_calls_in_flight_and_tokens(redis_server: RedisServer) -> None:
    one, two = RedisLimiter(redis_server.url), RedisLimiter(redis_server.url)
    limits = Limits(tokens_per_minute=60, max_concurrency=2)
    assert admitted(one, limits)
    assert admitted(two, limits)
    assert not admitted(one, limits)
    one.release("k", limits, 0)
    assert admitted(two, limits)
    two.release("k", limits, 200)
    with pytest.raises(LimitSpent, match="tokens per minute") as e:
        acquire(one, "k", limits)
    assert e.value.retry_after_s == pytest.approx(141, abs=5)


def test_a_lot_of_calls_pays_and_gives_back_in_redis_as_one(redis_server: RedisServer) -> None:
    limiter = RedisLimiter(redis_server.url)
    limits = Limits(0.001, 5, tokens_per_minute=60, max_concurrency=4)
    lot = limiter.admit("k", limits, 7)
    assert (lot.calls, lot.standing.remaining_requests) == (4, 1)
    assert lot.refusal is not None
    assert limiter.admit("k", limits).calls == 0  # the house is full
    limiter.release("k", limits, 30, 4)
    after = limiter.admit("k", limits, 3)
    assert after.calls == 1  # of the burst of five; the house has room for four
    assert after.standing.remaining_tokens is not None
    assert 29 <= after.standing.remaining_tokens <= 32


def test_a_server_that_dies_gives_its_permits_back(redis_server: RedisServer) -> None:
    """One that lives keeps them for as long as it says so."""
    limits = Limits(max_concurrency=2)
    dead, alive, other = (RedisLimiter(redis_server.url) for _ in range(3))
    assert admitted(dead, limits)
    assert admitted(alive, limits)
    flight = "forebay:{k}:flight"
    client = redis.Redis.from_url(redis_server.url)
    for member in client.zrange(flight, 0, -1):  # a lease has passed
        client.zincrby(flight, -LEASE_S - 1, member)
    client.close()
    alive.renew()
    assert admitted(other, limits)
    assert not admitted(other, limits), "a living server's permit was given away"


def test_calls_that_have_ended_are_not_renewed(redis_server: RedisServer) -> None:
    limits = Limits(max_concurrency=1)
    limiter, other = RedisLimiter(redis_server.url), RedisLimiter(redis_server.url)
    assert admitted(limiter, limits)
    members = {k: list(m) for k, m in limiter._shared.items()}
    limiter.release("k", limits, 0)
    limiter._shared = members  # as `renew` saw them just before
    limiter.renew()
    assert admitted(other, limits)


def test_without_redis_a_servers_own_limits_hold_and_permits_come_back(
    redis_server: RedisServer,
) -> None:
    bypassed: list[int] = []
    clock, limits = Clock(), Limits(max_concurrency=2)
    limiter = RedisLimiter(redis_server.url, clock, lambda: bypassed.append(1))
    assert admitted(limiter, limits)
    redis_server.stop()
    limiter_calls = [admitted(limiter, limits) for _ in range(3)]
    assert limiter_calls == [True, True, False]
    start = time.perf_counter()
    assert not admitted(limiter, limits)
    assert time.perf_counter() - start < 0.1  # it rests: no time-out each
    for _ in range(3):
        limiter.release("k", limits, 0)
    assert [admitted(limiter, limits) for _ in range(3)] == [True, True, False]
    assert len(bypassed) == 7
