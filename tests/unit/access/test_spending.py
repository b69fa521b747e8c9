"""Budgets of calls that reserve nothing: refused once all is spent, and nothing is dropped or counted
twice while a key's standing is read from the ledger."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from forebay.errors import RateLimited
from forebay.methods import methods
from forebay_server.access.budgets import SPENDING, Budgets
from forebay_server.access.keys import Limits
from forebay_server.access.usage import UsageLedger
from forebay_server.core.call import Call, Principal
from forebay_server.storage.database import Database

from .conftest import Clock

EMBED = methods()["/forebay.v1.EmbeddingService/Embed"]


@pytest.fixture
async def ledger(database: Database, tmp_path: Path, clock: Clock) -> AsyncIterator[UsageLedger]:
    made = UsageLedger(database, tmp_path / "usage", clock)
    await made.start()
    yield made
    await made.close()


def ended(tokens: int, key_id: str = "k") -> Call:
    call = Call(EMBED, {}, started=0.0, on_end=lambda _: None)
    call.principal = Principal(key_id)
    call.facts.tokens = tokens
    return call


def record(ledger: UsageLedger, tokens: int) -> None:
    ledger.record({("k", "m", 1): (1, 1, tokens, 0, 0, 0, 0.0, 0.0)})


def make(ledger: UsageLedger, limits: Limits, clock: Clock) -> Budgets:
    return Budgets(lambda _: limits, ledger, clock, asyncio.get_running_loop())


async def loaded(budgets: Budgets) -> None:
    async with asyncio.timeout(10):
        while "k" not in budgets._standings:
            await asyncio.sleep(0.001)


def test_the_methods_are_known_and_do_not_reserve() -> None:
    assert set(SPENDING) <= {m.path for m in methods().values() if m.scope == "infer"}
    assert not any("Generation" in path or "Response" in path for path in SPENDING)


async def test_the_first_call_has_what_was_spent_read(ledger: UsageLedger, clock: Clock) -> None:
    limits = Limits(budget_tokens=10, budget_period="day")
    record(ledger, 10)
    budgets = make(ledger, limits, clock)
    assert budgets.refusal("k", limits) is None
    await loaded(budgets)
    refused = budgets.refusal("k", limits)
    assert isinstance(refused, RateLimited) and refused.reason == "BUDGET_SPENT"
    assert refused.retry_after_s == 86400 - clock.now % 86400


async def test_a_new_period_is_whole(ledger: UsageLedger, clock: Clock) -> None:
    limits = Limits(budget_tokens=10, budget_period="day")
    budgets = make(ledger, limits, clock)
    await budgets.standing("k")
    budgets.settle(ended(10))
    record(ledger, 10)
    assert budgets.refusal("k", limits) is not None
    clock.now += 86400
    assert budgets.refusal("k", limits) is None
    async with asyncio.timeout(10):
        while budgets._wanted:
            await asyncio.sleep(0.001)
    assert budgets.refusal("k", limits) is None
    assert (await budgets.standing("k")).tokens == 0


async def test_what_language_models_have_reserved_is_not_there_for_others(
    ledger: UsageLedger, clock: Clock
) -> None:
    limits = Limits(budget_tokens=10, budget_period="day")
    budgets = make(ledger, limits, clock)
    chat = ended(3)
    await budgets.reserve(chat, 10, 0)
    refused = budgets.refusal("k", limits)
    assert refused is not None and refused.retry_after_s == 1.0
    budgets.settle(chat)
    assert budgets.refusal("k", limits) is None


async def test_keys_without_a_budget_are_not_looked_up(ledger: UsageLedger, clock: Clock) -> None:
    budgets = make(ledger, Limits(), clock)
    assert budgets.refusal("k", Limits(requests_per_second=1.0)) is None
    budgets.settle(ended(5))
    assert not budgets._wanted and not budgets._standings and not ledger._watched


@pytest.mark.parametrize("seed", range(20))
async def test_each_token_counts_once_however_calls_end_while_it_loads(
    ledger: UsageLedger, clock: Clock, seed: int
) -> None:
    """A call is settled first and recorded a moment later; the ledger is read in between."""
    rng = random.Random(seed)
    limits = Limits(budget_tokens=10**6, budget_period="day")
    budgets = make(ledger, limits, clock)
    record(ledger, 7)

    async def call() -> None:
        assert budgets.refusal("k", limits) is None
        await asyncio.sleep(rng.random() * 0.02)
        budgets.settle(ended(1))
        await asyncio.sleep(rng.random() * 0.02)
        record(ledger, 1)

    async def busy() -> None:
        """Another's flush: the first calls end before this key's sums are made."""
        async with ledger._flushing:
            await asyncio.sleep(0.02)

    async def roll() -> None:
        for _ in range(10):
            await asyncio.sleep(0.002)
            await ledger.flush()

    await asyncio.gather(busy(), *(call() for _ in range(100)), roll())
    await loaded(budgets)
    assert (await budgets.standing("k")).tokens == 107
    assert (await ledger.total("k", "0000-00-00", "9999-99-99")).tokens == 107
    assert not ledger._watched and not budgets._meanwhile
