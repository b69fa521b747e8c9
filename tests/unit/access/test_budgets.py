"""Budgets: never overspent, never falsely refused, whoever calls at the same time."""

from __future__ import annotations

import asyncio
import random

import pytest
from forebay.errors import RateLimited
from forebay.methods import methods
from forebay_server.access.budgets import Budgets
from forebay_server.access.keys import Limits
from forebay_server.access.usage import Counters
from forebay_server.core.call import Call, Principal
from hypothesis import given, settings
from hypothesis import strategies as st

DAY = 86400.0


class Ledger:
    """What was spent before, by first day of the period."""

    def __init__(self, tokens: int = 0, cost: float = 0.0) -> None:
        self._counters = Counters(tokens=tokens, cost=cost)
        self.asked: list[str] = []

    def watch(self, key_id: str) -> None: ...

    def unwatch(self, key_id: str) -> None: ...

    async def spent(self, key_id: str, from_day: str) -> tuple[Counters, Counters]:
        self.asked.append(from_day)
        await asyncio.sleep(0)  # others run while the database answers
        return self._counters, Counters()


def call(key_id: str = "k") -> Call:
    made = Call(
        methods()["/forebay.v1.GenerationService/Chat"], {}, started=0.0, on_end=lambda _: None
    )
    made.principal = Principal(key_id)
    return made


def budgets(limits: Limits, ledger: Ledger | None = None, now: float = DAY * 10.5) -> Budgets:
    return Budgets(lambda _: limits, ledger or Ledger(), clock=lambda: now)


def end(b: Budgets, c: Call, tokens: int, money: float = 0.0) -> None:
    c.facts.tokens = tokens
    c.note("cost", money)
    b.settle(c)


async def test_a_call_is_refused_when_its_longest_answer_does_not_fit() -> None:
    b = budgets(Limits(budget_tokens=100, budget_period="day"), Ledger(tokens=40))
    first = call()
    await b.reserve(first, 60, 0)
    with pytest.raises(RateLimited) as caught:
        await b.reserve(call(), 1, 0)
    assert caught.value.reason == "BUDGET_SPENT"
    assert caught.value.retry_after_s == 1.0, "the first call may give back"
    end(b, first, 10)
    await b.reserve(call(), 50, 0)


async def test_the_wait_for_a_spent_budget_is_the_time_to_the_next_period() -> None:
    b = budgets(Limits(budget_tokens=10, budget_period="day"), Ledger(tokens=10))
    with pytest.raises(RateLimited) as caught:
        await b.reserve(call(), 1, 0)
    assert caught.value.retry_after_s == DAY / 2
    monthly = budgets(Limits(budget_money=1.0), Ledger(cost=1.0))
    with pytest.raises(RateLimited) as caught:
        await monthly.reserve(call(), 0, 0.5)
    assert caught.value.retry_after_s == DAY * (31 - 10.5)


async def test_a_new_period_starts_whole_and_old_reservations_do_not_reach_it() -> None:
    now = [DAY * 10.5]
    limits = Limits(budget_tokens=100, budget_period="day")
    b = Budgets(lambda _: limits, Ledger(), clock=lambda: now[0])
    old = call()
    await b.reserve(old, 100, 0)
    now[0] += DAY
    await b.reserve(call(), 100, 0)
    end(b, old, 70)
    assert (await b.standing("k")).tokens == 0


async def test_keys_without_a_budget_are_not_looked_up() -> None:
    ledger = Ledger()
    b = budgets(Limits(), ledger)
    await b.reserve(call(), 10**12, 1e9)
    assert await b.room("k") == (None, None)
    assert not ledger.asked


CALLS = st.lists(
    st.tuples(st.integers(1, 50), st.integers(0, 50), st.integers(0, 5), st.booleans()),
    min_size=1,
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(CALLS, st.integers(1, 200), st.integers(0, 60), st.integers(0, 2**32))
def test_concurrent_callers_never_overspend_and_are_never_falsely_refused(
    calls: list[tuple[int, int, int, bool]], budget: int, before: int, seed: int
) -> None:
    """`calls`: longest, share that is used, loop turns it takes, whether it is aborted."""
    rng = random.Random(seed)
    b = budgets(
        Limits(budget_tokens=budget, budget_money=budget * 2e-3, budget_period="day"),
        Ledger(before, before * 2e-3),
    )
    spent, reserved = before, 0

    async def one(longest: int, used: int, turns: int, aborted: bool) -> None:
        nonlocal spent, reserved
        for _ in range(rng.randint(0, 5)):
            await asyncio.sleep(0)
        c = call()
        await b.standing("k")  # from here on nothing is awaited before the decision
        fits = spent + reserved + longest <= budget
        try:
            await b.reserve(c, longest, longest * 2e-3)
        except RateLimited:
            assert not fits, "falsely refused"
            return
        assert fits, "let in without room"
        reserved += longest
        for _ in range(turns):
            await asyncio.sleep(0)
        took = 0 if aborted else min(used, longest)
        end(b, c, took, took * 2e-3)
        spent, reserved = spent + took, reserved - longest
        assert spent <= max(budget, before)

    async def all_of_them() -> None:
        await asyncio.gather(*(one(*c) for c in calls))
        standing = await b.standing("k")
        assert (standing.tokens, standing.reserved_tokens) == (spent, 0)
        assert standing.reserved_money == pytest.approx(0, abs=1e-9)
        assert standing.money == pytest.approx(spent * 2e-3)

    asyncio.run(all_of_them())
