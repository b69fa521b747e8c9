"""Limits per key: calls per second, tokens per minute, calls in flight.

Token buckets, refilled continuously. In process by default; with Redis or Valkey the buckets are
shared by all servers, each decision one atomic script. Tokens are not known before the work is
done: a call is admitted while the bucket holds one and its tokens are taken afterwards, so a
bucket may go into debt by the calls in flight, and later callers wait the debt out.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from forebay.errors import QuotaViolation, RateLimited

from forebay_server.access.keys import Limits
from forebay_server.access.shared import connect

log = logging.getLogger("forebay.access")

#: What floating-point sums may lack of a whole call: who waited as told is not refused for it. The
#: bucket keeps the difference as debt, so nothing is overspent.
SLACK = 1e-6
#: Seconds for which a call in flight holds its permit in Redis, and how often that is renewed meanwhile.
LEASE_S, RENEWALS = 60.0, 4
#: Seconds without trying after Redis failed: else each call would wait for its timeout.
REST_S = 2.0
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
        return _standing(limits, requests, tokens)


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


def _standing(limits: Limits, requests: float, tokens: float) -> Standing:
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


#: What both scripts share. Redis's own clock counts: servers' clocks differ. A bucket that has not
#: been touched for as long as it takes to fill is forgotten, which changes nothing.
_LUA = """
local function clock()
  local t = redis.call('TIME')
  return tonumber(t[1]) + tonumber(t[2]) / 1e6
end
local function level(key, rate, full, now)
  local v = redis.call('HMGET', key, 'l', 't')
  local l, t = tonumber(v[1]) or full, tonumber(v[2]) or now
  return math.min(full, l + math.max(0, now - t) * rate)
end
local function keep(key, l, rate, full, now)
  redis.call('HSET', key, 'l', string.format('%.9f', l), 't', string.format('%.6f', now))
  redis.call('PEXPIRE', key, math.ceil(math.max(0, full - l) / rate * 1000) + 60000)
end
"""
#: KEYS: requests bucket, tokens bucket, calls in flight. ARGV: rate, burst, tokens/min, most in
#: flight, seconds of a lease, ids of the calls. -1 = no such limit. Calls in flight are a sorted set
#: of leases that their servers renew: one that dies holds its permits no longer than a lease.
_ADMIT = (
    _LUA
    + """
local now = clock()
local rate, burst = tonumber(ARGV[1]), tonumber(ARGV[2])
local tpm, most = tonumber(ARGV[3]), tonumber(ARGV[4])
local lease = tonumber(ARGV[5])
local granted, wait, what, rl, tl = #ARGV - 5, 0, '', 0, 0
if rate > 0 then
  rl = level(KEYS[1], rate, burst, now)
  local held = math.max(0, math.floor(rl + 1e-6))
  if held < granted then granted = held; wait = (held + 1 - rl) / rate; what = 'r' end
end
if tpm > 0 then
  tl = level(KEYS[2], tpm / 60, tpm, now)
  if tl < 1 - 1e-6 then
    granted = 0
    if (1 - tl) / (tpm / 60) > wait then wait = (1 - tl) / (tpm / 60); what = 't' end
  end
end
if most > 0 then
  redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', now - lease)
  local free = math.max(0, most - redis.call('ZCARD', KEYS[3]))
  if free < granted then
    granted = free
    wait = math.max(wait, 0.05)
    if what == '' then what = 'c' end
  end
end
if granted > 0 then
  if rate > 0 then rl = rl - granted; keep(KEYS[1], rl, rate, burst, now) end
  if most > 0 then
    for i = 6, 5 + granted do redis.call('ZADD', KEYS[3], now, ARGV[i]) end
    redis.call('PEXPIRE', KEYS[3], math.ceil(lease * 1000))
  end
end
return {granted, what, string.format('%.9f', wait), string.format('%.9f', rl), string.format('%.9f', tl)}
"""
)
#: KEYS: tokens bucket, calls in flight. ARGV: tokens/min or -1, tokens used, ids of ended calls.
_RELEASE = (
    _LUA
    + """
local tpm, used = tonumber(ARGV[1]), tonumber(ARGV[2])
if tpm > 0 and used > 0 then
  local now = clock()
  keep(KEYS[1], level(KEYS[1], tpm / 60, tpm, now) - used, tpm / 60, tpm, now)
end
for i = 3, #ARGV do redis.call('ZREM', KEYS[2], ARGV[i]) end
return 0
"""
)
#: KEYS: calls in flight. ARGV: seconds of a lease, ids of calls that go on. Those that have ended
#: meanwhile stay ended.
_RENEW = (
    _LUA
    + """
local now = clock()
for i = 2, #ARGV do redis.call('ZADD', KEYS[1], 'XX', now, ARGV[i]) end
redis.call('PEXPIRE', KEYS[1], math.ceil(tonumber(ARGV[1]) * 1000))
return 0
"""
)


class RedisLimiter:
    """Buckets that all servers share. When Redis is away, this process's own buckets decide.

    Synchronous, with short timeouts: it runs on ingest threads, never on the event loop.

    Args:
        observe: told of each decision that was made without Redis.
        clock: monotonic seconds.
        lease_s: seconds for which a call holds its permit unless `keep` renews it.
    """

    def __init__(
        self,
        url: str,
        clock: Callable[[], float] = time.monotonic,
        observe: Callable[[], None] = lambda: None,
        lease_s: float = LEASE_S,
    ) -> None:
        self._redis: Any = connect(url, 0.25)
        import redis

        self._clock = clock
        self._observe = observe
        self._admit = self._redis.register_script(_ADMIT)
        self._release = self._redis.register_script(_RELEASE)
        self._renew = self._redis.register_script(_RENEW)
        self._lease_s = lease_s
        self._error = redis.RedisError
        self._own = ProcessLimiter(clock)
        self._lock = threading.Lock()
        self._sequence = itertools.count()
        self._origin = uuid.uuid4().hex
        self._resting_until = -math.inf
        # Permits of a key are alike, so ended calls give back any one of them.
        self._shared: dict[str, list[str]] = {}
        self._owned: dict[str, int] = {}
        self._ended: dict[str, list[str]] = {}

    def admit(self, key_id: str, limits: Limits, calls: int = 1) -> Admitted:
        """See Limiter."""
        if self._clock() < self._resting_until:
            return self._admit_own(key_id, limits, calls)
        rate = limits.requests_per_second
        members = [f"{self._origin}:{next(self._sequence)}" for _ in range(calls)]
        try:
            granted, what, wait, requests, tokens = self._admit(
                keys=_names(key_id),
                args=[
                    -1 if rate is None else rate,
                    -1 if rate is None else capacity(limits),
                    limits.tokens_per_minute or -1,
                    limits.max_concurrency or -1,
                    self._lease_s,
                    *members,
                ],
            )
        except self._error as e:
            self._rest(e)
            return self._admit_own(key_id, limits, calls)
        if granted and limits.max_concurrency is not None:
            with self._lock:
                self._shared.setdefault(key_id, []).extend(members[:granted])
        standing = _standing(limits, float(requests), float(tokens))
        if not what:
            return Admitted(granted, standing)
        violation = {
            b"r": f"{rate:g} calls per second" if rate is not None else "",
            b"t": f"{limits.tokens_per_minute} tokens per minute",
            b"c": f"{limits.max_concurrency} calls in flight",
        }[what]
        return Admitted(granted, standing, LimitSpent(key_id, violation, float(wait), standing))

    def release(self, key_id: str, limits: Limits, tokens: int, calls: int = 1) -> None:
        """See Limiter. What Redis does not take now is given back with a later call."""
        with self._lock:
            owned = min(calls, self._owned.get(key_id, 0))
            if owned:
                self._owned[key_id] -= owned
            members = self._shared.get(key_id, [])
            back = min(calls - owned, len(members))
            if back:
                self._ended.setdefault(key_id, []).extend(members[-back:])
                del members[-back:]
        if owned:  # of a mixed lot, each bucket pays for the calls that it admitted
            here = tokens * owned // calls
            self._own.release(key_id, limits, here, owned)
            tokens -= here
        metered = limits.tokens_per_minute is not None and tokens > 0
        with self._lock:
            ended = self._ended.pop(key_id, [])
        if not ended and not metered:
            return
        try:
            if self._clock() < self._resting_until:
                raise self._error("it is left alone for a moment")
            self._release(
                keys=_names(key_id)[1:], args=[limits.tokens_per_minute or -1, tokens, *ended]
            )
        except self._error as e:
            self._rest(e)
            with self._lock:
                self._ended.setdefault(key_id, []).extend(ended)

    def lend(self, key_id: str, limits: Limits, calls: int, tokens: int) -> Loan | None:
        """See Limiter. Nothing: other servers would refuse calls for what this one may not use."""
        return None

    def settle(
        self, key_id: str, limits: Limits, used: tuple[int, int], back: tuple[int, int]
    ) -> None:
        """See Limiter. Nothing was lent."""

    async def keep(self) -> None:
        """Renew the leases of calls in flight for ever."""
        while True:
            await asyncio.sleep(self._lease_s / RENEWALS)
            await asyncio.to_thread(self.renew)

    def renew(self) -> None:
        """Renew the leases of this server's calls in flight. While Redis is away they run out."""
        with self._lock:
            running = {key_id: list(members) for key_id, members in self._shared.items() if members}
        for key_id, members in running.items():
            if self._clock() < self._resting_until:
                return
            try:
                self._renew(keys=_names(key_id)[2:], args=[self._lease_s, *members])
            except self._error as e:
                self._rest(e)

    def _admit_own(self, key_id: str, limits: Limits, calls: int) -> Admitted:
        self._observe()
        admitted = self._own.admit(key_id, limits, calls)
        with self._lock:
            self._owned[key_id] = self._owned.get(key_id, 0) + admitted.calls
        return admitted

    def _rest(self, error: Exception) -> None:
        if self._clock() >= self._resting_until:
            self._resting_until = self._clock() + REST_S
            log.warning(
                "the shared limiter is away (%s); for %g s this server's own limits hold",
                error,
                REST_S,
            )


def _names(key_id: str) -> list[str]:
    # The braces keep a key's buckets on one node of a cluster.
    return [f"forebay:{{{key_id}}}:{part}" for part in ("requests", "tokens", "flight")]
