"""Limits per key: calls per second, tokens per minute, calls in flight.

Token buckets, refilled continuously. In process by default; with Redis or Valkey all servers share them
(`redis_limits.py`). Tokens are not known before the work is
done: a call is admitted while the bucket holds one and its tokens are taken afterwards, so a
bucket may go into debt by the calls in flight, and later callers wait the debt out.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from forebay.errors import QuotaViolation, RateLimited

from forebay_server.access.keys import Limits

#: What floating-point sums may lack of a whole call: who waited as told is not refused for it. The
#: bucket keeps the difference as debt, so nothing is overspent.
SLACK = 1e-6
#: Keys that may have fewer calls in flight are lent nothing.
LENT_FROM = 32
#: Seconds after which a full house may have room. A guess: no clock says when calls end.
CONCURRENCY_RETRY_S = 0.05


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a key stands, for x-ratelimit headers. None = no such limit.

    `reset_*_s`: seconds until the bucket is full again, if nobody calls.
    """

    limit_requests: int | None = None
    remaining_requests: int | None = None
    limit_tokens: int | None = None
    remaining_tokens: int | None = None
    reset_requests_s: float | None = None
    reset_tokens_s: float | None = None

    def headers(self) -> list[tuple[str, str]]:
        """The x-ratelimit headers, named as OpenAI's; resets in seconds as `1.5s`."""
        values = (
            ("limit-requests", self.limit_requests, ""),
            ("remaining-requests", self.remaining_requests, ""),
            ("reset-requests", self.reset_requests_s, "s"),
            ("limit-tokens", self.limit_tokens, ""),
            ("remaining-tokens", self.remaining_tokens, ""),
            ("reset-tokens", self.reset_tokens_s, "s"),
        )
        return [
            (f"x-ratelimit-{name}", f"{round(value, 3):g}s" if unit else str(value))
            for name, value, unit in values
            if value is not None
        ]


class LimitSpent(RateLimited):
    """A refusal, with where the key stands."""

    def __init__(self, key_id: str, violation: str, wait_s: float, standing: Standing) -> None:
        super().__init__(
            f"the key's limit of {violation} is spent; retry after {wait_s:.3f} s",
            violations=[QuotaViolation(f"key:{key_id}", violation)],
            retry_after_s=max(wait_s, 0.001),
        )
        self.standing = standing


@dataclass(frozen=True, slots=True)
class Admitted:
    """How many of the calls that came together may go on, and where the key stands then.

    `refusal` is for the others: it has a true retry delay, and nothing was taken for them.
    """

    calls: int
    standing: Standing
    refusal: LimitSpent | None = None


@dataclass(frozen=True, slots=True)
class Loan:
    """Calls and tokens that were taken from a key's buckets for calls that may come; and where the key
    stands, them included."""

    calls: int
    tokens: int
    standing: Standing = Standing()


class Borrower(Protocol):
    """Who was lent something."""

    def settle(self, key_id: str) -> None:
        """Say now what of a key's was used."""
        ...

    def recall(self, key_id: str) -> None:
        """Give a key's back that was not."""
        ...


class Limiter(Protocol):
    """Admission by key."""

    def admit(self, key_id: str, limits: Limits, calls: int = 1) -> Admitted:
        """Take as many calls as the limits allow."""
        ...

    def release(self, key_id: str, limits: Limits, tokens: int, calls: int = 1) -> None:
        """Calls have ended, and used `tokens` together."""
        ...

    def lend(self, key_id: str, limits: Limits, calls: int, tokens: int) -> Loan | None:
        """So many calls and tokens at most for who admits calls by itself for a moment; None where that
        cannot be, or where nothing is to be had."""
        ...

    def settle(
        self, key_id: str, limits: Limits, used: tuple[int, int], back: tuple[int, int]
    ) -> None:
        """Of the calls and tokens that were lent, so many were used, and so many come back."""
        ...


def capacity(limits: Limits) -> float:
    """Calls that may come at once."""
    assert limits.requests_per_second is not None
    return float(limits.burst or max(1, math.floor(limits.requests_per_second)))


class _Bucket:
    """A token bucket. `level` may be negative by debt."""

    __slots__ = ("level", "updated")

    def __init__(self, level: float, now: float) -> None:
        self.level = level
        self.updated = now

    def refill(self, rate: float, full: float, now: float) -> None:
        self.level = min(full, self.level + max(0.0, now - self.updated) * rate)
        self.updated = now


@dataclass(slots=True)
class _State:
    requests: _Bucket | None = None
    tokens: _Bucket | None = None
    in_flight: int = 0
    #: Lent, and not settled: of each bucket, which is as much less full.
    lent_calls: int = 0
    lent_tokens: int = 0

    @property
    def lends(self) -> bool:
        return self.lent_calls > 0 or self.lent_tokens > 0

    def refill(self, limits: Limits, now: float) -> None:
        """Bring the buckets up to now."""
        rate, per_minute = limits.requests_per_second, limits.tokens_per_minute
        if rate is not None:
            full = capacity(limits)
            if self.requests is None:
                self.requests = _Bucket(full, now)
            self.requests.refill(rate, full - self.lent_calls, now)
        if per_minute is not None:
            if self.tokens is None:
                self.tokens = _Bucket(float(per_minute), now)
            self.tokens.refill(per_minute / 60, float(per_minute) - self.lent_tokens, now)

    def standing(self, limits: Limits) -> Standing:
        """What is lent counts as being there: it comes back, unless calls use it."""
        requests = self.requests.level + self.lent_calls if self.requests else 0.0
        tokens = self.tokens.level + self.lent_tokens if self.tokens else 0.0
        return standing_of(limits, requests, tokens)


class ProcessLimiter:
    """Buckets of this process. A decision takes about a microsecond."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._states: dict[str, _State] = {}
        self._lock = threading.Lock()
        self.borrower: Borrower | None = None

    def admit(self, key_id: str, limits: Limits, calls: int = 1) -> Admitted:
        """See Limiter."""
        state = self._states.get(key_id)
        lent = state is not None and state.lends
        if lent and self.borrower is not None:
            self.borrower.settle(key_id)
        admitted = self._admit(key_id, limits, calls)
        if admitted.refusal is None or not lent or self.borrower is None:
            return admitted
        # No call is refused for what nobody uses.
        self.borrower.recall(key_id)
        more = self._admit(key_id, limits, calls - admitted.calls)
        return Admitted(admitted.calls + more.calls, more.standing, more.refusal)

    def _admit(self, key_id: str, limits: Limits, calls: int) -> Admitted:
        with self._lock:
            state = self._states.setdefault(key_id, _State())
            state.refill(limits, self._clock())
            granted, wait, violation = calls, 0.0, None
            rate = limits.requests_per_second
            if rate is not None and state.requests is not None:
                held = max(0, int(state.requests.level + SLACK))
                if held < granted:
                    granted = held
                    wait = (held + 1 - state.requests.level) / rate
                    violation = f"{rate:g} calls per second"
            tokens, per_minute = state.tokens, limits.tokens_per_minute
            if tokens is not None and per_minute is not None and tokens.level < 1 - SLACK:
                granted = 0
                needed = (1 - tokens.level) / (per_minute / 60)
                if needed > wait:
                    wait, violation = needed, f"{per_minute} tokens per minute"
            most = limits.max_concurrency
            if most is not None and state.in_flight + granted > most:
                granted = max(0, most - state.in_flight)
                wait = max(wait, CONCURRENCY_RETRY_S)
                violation = violation or f"{most} calls in flight"
            if state.requests is not None and rate is not None:
                state.requests.level -= granted
            state.in_flight += granted
            standing = state.standing(limits)
            if violation is None:
                return Admitted(granted, standing)
            return Admitted(granted, standing, LimitSpent(key_id, violation, wait, standing))

    def release(self, key_id: str, limits: Limits, tokens: int, calls: int = 1) -> None:
        """See Limiter."""
        with self._lock:
            state = self._states.get(key_id)
            if state is None:
                return
            state.in_flight = max(0, state.in_flight - calls)
            if state.tokens is not None and limits.tokens_per_minute is not None:
                state.tokens.level -= tokens

    def lend(self, key_id: str, limits: Limits, calls: int, tokens: int) -> Loan | None:
        """See Limiter. At most half of what a bucket holds; nothing of keys that may have few calls in
        flight, for what is lent is not counted there."""
        if limits.max_concurrency is not None and limits.max_concurrency < LENT_FROM:
            return None
        with self._lock:
            state = self._states.setdefault(key_id, _State())
            state.refill(limits, self._clock())
            if state.requests is not None and limits.requests_per_second is not None:
                calls = min(calls, int(max(0.0, state.requests.level) / 2))
            if state.tokens is not None and limits.tokens_per_minute is not None:
                tokens = min(tokens, int(max(0.0, state.tokens.level) / 2))
            if calls < 1 or tokens < 1:
                return None
            if state.requests is not None and limits.requests_per_second is not None:
                state.requests.level -= calls
                state.lent_calls += calls
            if state.tokens is not None and limits.tokens_per_minute is not None:
                state.tokens.level -= tokens
                state.lent_tokens += tokens
            return Loan(calls, tokens, state.standing(limits))

    def settle(
        self, key_id: str, limits: Limits, used: tuple[int, int], back: tuple[int, int]
    ) -> None:
        """See Limiter."""
        with self._lock:
            state = self._states.setdefault(key_id, _State())
            state.refill(limits, self._clock())  # as full as what is lent has let them become
            if state.requests is not None and limits.requests_per_second is not None:
                state.lent_calls = max(0, state.lent_calls - used[0] - back[0])
                state.requests.level += back[0]
            if state.tokens is not None and limits.tokens_per_minute is not None:
                state.lent_tokens = max(0, state.lent_tokens - used[1] - back[1])
                state.tokens.level += back[1]


def standing_of(limits: Limits, requests: float, tokens: float) -> Standing:
    """Where a key stands whose buckets are at these levels."""
    rate, per_minute = limits.requests_per_second, limits.tokens_per_minute
    full = capacity(limits) if rate is not None else 0.0
    return Standing(
        int(full) if rate is not None else None,
        max(0, int(requests + SLACK)) if rate is not None else None,
        per_minute,
        max(0, int(tokens + SLACK)) if per_minute is not None else None,
        max(0.0, full - requests) / rate if rate is not None else None,
        max(0.0, per_minute - tokens) * 60 / per_minute if per_minute is not None else None,
    )
