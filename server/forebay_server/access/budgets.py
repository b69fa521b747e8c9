"""Budgets of keys in tokens and money: reserved before the work, settled with what it took.

What was spent is known from the usage ledger; what comes on top is kept in memory. A reservation
is the most that a call can take, so a budget is never overspent; what was not used is free again
as soon as the call ends. With several servers each counts its own calls between its start and its
period's end: give each a share of the budget.

Calls that reserve nothing (embeddings, say: what they take is known when they are done) are refused
once no tokens are left. Those that were let in before go on, and overspend by what they take; so do
the calls that come while a key's standing is loaded, which its first call brings about.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
import math
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from forebay.errors import QuotaViolation, RateLimited

from forebay_server.access.keys import Limits
from forebay_server.access.usage import Counters
from forebay_server.core.call import Call

log = logging.getLogger("forebay.access")

#: Methods that take tokens and reserve none. Language models' calls reserve for themselves, and
#: predictions on rows take no tokens.
SPENDING = frozenset(
    f"/{service}/{method}"
    for service, methods in {
        "forebay.v1.ClassificationService": ("Classify", "ClassifyStream"),
        "forebay.v1.EmbeddingService": ("Embed", "EmbedStream"),
        "forebay.v1.RerankService": ("Rerank",),
        "forebay.v1.TokenService": ("Tokenize", "CountTokens"),
        "forebay.v1.CollectionService": ("Search", "SearchStream", "UpsertPoints", "UpsertStream"),
        "forebay.v1.KnowledgeService": (
            "UploadDocument",
            "IngestText",
            "ReingestDocument",
            "Retrieve",
            "Ask",
            "AskStream",
            "Evaluate",
            "StartEvaluation",
        ),
        "inference.GRPCInferenceService": ("ModelInfer", "ModelStreamInfer"),
    }.items()
    for method in methods
)
#: Seconds until a standing is asked for again that could not be loaded.
LOAD_AGAIN_S = 1.0
#: Seconds after which running calls may have given back what they reserved. A guess.
RESERVED_RETRY_S = 1.0
#: Floating-point sums may miss a whole amount by this.
SLACK = 1e-9


class Spent(Protocol):
    """The usage ledger's part that is needed here."""

    def watch(self, key_id: str) -> None: ...

    def unwatch(self, key_id: str) -> None: ...

    def spent(self, key_id: str, from_day: str) -> Awaitable[tuple[Counters, Counters]]: ...


@dataclass(slots=True)
class Reservation:
    """What a call may take at most."""

    key_id: str
    since: str
    tokens: int
    money: float


@dataclass(slots=True)
class Standing:
    """A key's budget in one period. `since` is its first day, empty for ever; `until` is its end,
    in seconds since the epoch."""

    since: str
    period: str | None = None
    until: float = math.inf
    tokens: int = 0
    money: float = 0.0
    reserved_tokens: int = 0
    reserved_money: float = 0.0


@dataclass(slots=True)
class _Spend:
    tokens: int = 0
    money: float = 0.0


class Budgets:
    """See the module. `reserve` runs on one loop, `refusal` and `settle` on any thread.

    Args:
        limits: a key's limits; None for strangers.
        ledger: what was spent before.
        clock: seconds since the epoch.
        loop: where `refusal` has standings loaded.
    """

    def __init__(
        self,
        limits: Callable[[str], Limits | None],
        ledger: Spent,
        clock: Callable[[], float] = time.time,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self._limits = limits
        self._ledger = ledger
        self._clock = clock
        self._standings: dict[str, Standing] = {}
        self._loading: dict[str, asyncio.Lock] = {}
        self._loop = loop
        self._wanted: dict[str, asyncio.Task[None] | None] = {}
        #: What keys spend while their standings are loaded.
        self._meanwhile: dict[str, _Spend] = {}
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

    def refusal(self, key_id: str, limits: Limits) -> RateLimited | None:
        """Why a call may not begin that takes tokens and reserves none; None = it may."""
        if limits.budget_tokens is None:
            return None
        standing = self._standings.get(key_id)
        if (
            standing is None
            or standing.period != limits.budget_period
            or self._clock() >= standing.until
        ):
            self._want(key_id)
            return None
        left = limits.budget_tokens - standing.tokens
        if left > standing.reserved_tokens:
            return None
        period = limits.budget_period or "month"
        wait = RESERVED_RETRY_S if left > 0 else self._until_whole(limits)
        return _spent(key_id, period, f"no tokens are left of {limits.budget_tokens}", wait)

    def settle(self, call: Call) -> None:
        """The call has ended: what it took is spent, the rest of its reservation is free.
        Called once for each call."""
        reservation = call.context.get("reservation")
        tokens, money = call.facts.tokens, float(call.context.get("cost", 0.0))  # type: ignore[arg-type]
        if reservation is None and not tokens:
            return
        key_id = call.principal.key_id
        if key_id not in self._standings and key_id not in self._meanwhile:
            return  # as of all keys without a budget
        with self._lock:
            standing = self._standings.get(key_id)
            if isinstance(reservation, Reservation) and standing is not None:
                if reservation.since != standing.since:  # it began in the period before
                    return
                standing.reserved_tokens -= reservation.tokens
                standing.reserved_money -= reservation.money
            self._add(key_id, tokens, money)

    def spend(self, key_id: str, tokens: int) -> None:
        """A part of a call that settles nothing itself took tokens."""
        if key_id in self._standings or key_id in self._meanwhile:
            with self._lock:
                self._add(key_id, tokens, 0.0)

    def _add(self, key_id: str, tokens: int, money: float) -> None:
        for spend in (self._standings.get(key_id), self._meanwhile.get(key_id)):
            if spend is not None:
                spend.tokens += tokens
                spend.money += money

    async def standing(self, key_id: str) -> Standing:
        """Where a key stands in the present period."""
        limits = self._limits(key_id) or Limits()
        since = self._since(limits.budget_period)
        found = self._standings.get(key_id)
        if found is not None and found.since == since and found.period == limits.budget_period:
            return found
        async with self._loading.setdefault(key_id, asyncio.Lock()):
            found = self._standings.get(key_id)
            if found is not None and found.since == since:
                found.period = limits.budget_period  # a day's budget is a month's on its first day
                found.until = self._until(limits)
                return found
            return await self._load(key_id, limits, since)

    async def _load(self, key_id: str, limits: Limits, since: str) -> Standing:
        until = self._until(limits)
        with self._lock:
            self._watch(key_id)
        total, recorded = await self._ledger.spent(key_id, since or "0000-00-00")
        with self._lock:
            # Calls are settled first and recorded then: of what was settled meanwhile, the sums
            # have what was recorded before they were made.
            meanwhile = self._unwatch(key_id)
            fresh = Standing(
                since,
                limits.budget_period,
                until,
                total.tokens + meanwhile.tokens - recorded.tokens,
                total.cost + meanwhile.money - recorded.cost,
            )
            self._standings[key_id] = fresh
        return fresh

    def _watch(self, key_id: str) -> None:
        """Keep what the key spends, until its standing is there. Under the lock, as `_unwatch`."""
        if key_id not in self._meanwhile:
            self._ledger.watch(key_id)
            self._meanwhile[key_id] = _Spend()

    def _unwatch(self, key_id: str) -> _Spend:
        self._ledger.unwatch(key_id)
        return self._meanwhile.pop(key_id, None) or _Spend()

    def _want(self, key_id: str) -> None:
        """Have a key's standing loaded, soon."""
        with self._lock:
            if key_id in self._wanted:
                return
            self._wanted[key_id] = None
            self._watch(key_id)
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop has ended, and the server with it
            self._loop.call_soon_threadsafe(self._begin_loading, key_id)

    def _begin_loading(self, key_id: str) -> None:
        async def load() -> None:
            try:
                await self.standing(key_id)
                with self._lock:  # another may have loaded it before this was wanted
                    self._unwatch(key_id)
            except Exception as e:
                log.warning("what key %s has spent cannot be read yet: %s", key_id, e)
                await asyncio.sleep(LOAD_AGAIN_S)
            finally:
                self._wanted.pop(key_id, None)

        self._wanted[key_id] = asyncio.get_running_loop().create_task(load())

    def _since(self, period: str | None) -> str:
        today = datetime.datetime.fromtimestamp(self._clock(), datetime.UTC).date()
        if period == "total":
            return ""
        return today.isoformat() if period == "day" else today.replace(day=1).isoformat()

    def _until(self, limits: Limits) -> float:
        """When the period ends, in seconds since the epoch."""
        if limits.budget_period == "total":
            return math.inf
        return self._clock() + self._until_whole(limits)

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
