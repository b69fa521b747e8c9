"""Budgets of keys in tokens and money: reserved before the work, settled with what it took.

What was spent is known from the usage ledger; what comes on top is kept in memory. A reservation
is the most that a call can take, so a budget is never overspent; what was not used is free again
as soon as the call ends. With several servers each counts its own calls between its start and its
period's end: give each a share of the budget.
"""

from __future__ import annotations

import asyncio
import datetime
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from forebay.errors import QuotaViolation, RateLimited

from forebay_server.access.keys import Limits
from forebay_server.access.usage import Counters
from forebay_server.core.call import Call

#: Seconds after which running calls may have given back what they reserved. A guess.
RESERVED_RETRY_S = 1.0
#: Floating-point sums may miss a whole amount by this.
SLACK = 1e-9


class Spent(Protocol):
    """The usage ledger's part that is needed here."""

    def total(self, key_id: str, from_day: str, to_day: str) -> Awaitable[Counters]: ...


@dataclass(slots=True)
class Reservation:
    """What a call may take at most."""

    key_id: str
    since: str
    tokens: int
    money: float


@dataclass(slots=True)
class Standing:
    """A key's budget in one period. `since` is its first day, empty for ever."""

    since: str
    tokens: int = 0
    money: float = 0.0
    reserved_tokens: int = 0
    reserved_money: float = 0.0


class Budgets:
    """See the module. `reserve` runs on one loop, `settle` on any thread.

    Args:
        limits: a key's limits; None for strangers.
        ledger: what was spent before.
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        limits: Callable[[str], Limits | None],
        ledger: Spent,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._limits = limits
        self._ledger = ledger
        self._clock = clock
        self._standings: dict[str, Standing] = {}
        self._loading: dict[str, asyncio.Lock] = {}
        self._lock = threading.Lock()

    def limits(self, key_id: str) -> Limits:
        """A key's limits; none for strangers."""
        return self._limits(key_id) or Limits()

    async def room(self, key_id: str) -> tuple[int | None, float | None]:
        """Tokens and money that a call may still reserve; None = no such limit."""
        limits = self._limits(key_id)
        if not _has_budget(limits):
            return None, None
        assert limits is not None
        standing = await self.standing(key_id)
        with self._lock:
            return _room(limits, standing)

    async def reserve(self, call: Call, tokens: int, money: float) -> None:
        """Set aside the most that the call can take.

        Raises:
            RateLimited: BUDGET_SPENT; it says when there may be room.
        """
        key_id = call.principal.key_id
        limits = self._limits(key_id)
        if not _has_budget(limits):
            return
        assert limits is not None
        standing = await self.standing(key_id)
        with self._lock:
            free_tokens, free_money = _room(limits, standing)
            short = []
            if free_tokens is not None and tokens > free_tokens:
                short.append(f"{tokens} tokens are needed, {max(0, free_tokens)} are left")
            if free_money is not None and money > free_money + SLACK:
                short.append(f"{money:.6f} is needed, {max(0.0, free_money):.6f} is left")
            if short:
                # Sums of floats rarely come back to 0: what is left of them is no reservation.
                reserved = standing.reserved_tokens > 0 or standing.reserved_money > SLACK
                wait = RESERVED_RETRY_S if reserved else self._until_whole(limits)
                period = limits.budget_period or "month"
                raise _spent(key_id, period, "; ".join(short), wait)
            standing.reserved_tokens += tokens
            standing.reserved_money += money
        call.note("reservation", Reservation(key_id, standing.since, tokens, money))

    def settle(self, call: Call) -> None:
        """The call has ended: what it took is spent, the rest of its reservation is free.
        Called once for each call."""
        reservation = call.context.get("reservation")
        tokens, money = call.facts.tokens, float(call.context.get("cost", 0.0))  # type: ignore[arg-type]
        if reservation is None and not tokens:
            return
        with self._lock:
            standing = self._standings.get(call.principal.key_id)
            if standing is None:
                return
            if isinstance(reservation, Reservation):
                if reservation.since != standing.since:  # it began in the period before
                    return
                standing.reserved_tokens -= reservation.tokens
                standing.reserved_money -= reservation.money
            standing.tokens += tokens
            standing.money += money

    async def standing(self, key_id: str) -> Standing:
        """Where a key stands in the present period."""
        limits = self._limits(key_id) or Limits()
        since = self._since(limits.budget_period)
        found = self._standings.get(key_id)
        if found is not None and found.since == since:
            return found
        async with self._loading.setdefault(key_id, asyncio.Lock()):
            found = self._standings.get(key_id)
            if found is not None and found.since == since:
                return found
            total = await self._ledger.total(key_id, since or "0000-00-00", "9999-99-99")
            fresh = Standing(since, total.tokens, total.cost)
            with self._lock:
                self._standings[key_id] = fresh
            return fresh

    def _since(self, period: str | None) -> str:
        today = datetime.datetime.fromtimestamp(self._clock(), datetime.UTC).date()
        if period == "total":
            return ""
        return today.isoformat() if period == "day" else today.replace(day=1).isoformat()

    def _until_whole(self, limits: Limits) -> float:
        """Seconds to the next period."""
        now = datetime.datetime.fromtimestamp(self._clock(), datetime.UTC)
        start = now.replace(hour=0, minute=0, second=0, microsecond=0)
        if limits.budget_period == "total":
            return 365 * 86400.0
        if limits.budget_period == "day":
            following = start + datetime.timedelta(days=1)
        else:
            following = (start.replace(day=1) + datetime.timedelta(days=32)).replace(day=1)
        return (following - now).total_seconds()


def _has_budget(limits: Limits | None) -> bool:
    return limits is not None and (
        limits.budget_tokens is not None or limits.budget_money is not None
    )


def _room(limits: Limits, standing: Standing) -> tuple[int | None, float | None]:
    tokens = money = None
    if limits.budget_tokens is not None:
        tokens = limits.budget_tokens - standing.tokens - standing.reserved_tokens
    if limits.budget_money is not None:
        money = limits.budget_money - standing.money - standing.reserved_money
    return tokens, money


def _spent(key_id: str, period: str, what: str, wait: float) -> RateLimited:
    error = RateLimited(
        f"the key's budget of this {period} does not cover the call: {what}",
        violations=[QuotaViolation(f"key:{key_id}", f"budget per {period}: {what}")],
        retry_after_s=wait,
    )
    error.reason = "BUDGET_SPENT"
    return error
