"""Limits per key: calls per second, tokens per minute, calls in flight.

Token buckets, refilled continuously. In process by default; with Redis or Valkey the buckets are
shared by all servers, each decision one atomic script. Tokens are not known before the work is
done: a call is admitted while the bucket is positive and its tokens are taken afterwards, so a
bucket may go into debt by the calls in flight, and later callers wait the debt out.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from forebay.errors import QuotaViolation, RateLimited

from forebay_server.access.keys import Limits

log = logging.getLogger("forebay.access")


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a key stands, for x-ratelimit headers. None = no such limit."""

    limit_requests: int | None = None
    remaining_requests: int | None = None
    limit_tokens: int | None = None
    remaining_tokens: int | None = None


class Limiter(Protocol):
    """Admission by key."""

    def acquire(self, key_id: str, limits: Limits) -> Standing:
        """Take one call. Raises RateLimited with a true retry delay; then nothing was taken."""
        ...

    def release(self, key_id: str, limits: Limits, tokens: int) -> None:
        """The call has ended and used `tokens`."""
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


class ProcessLimiter:
    """Buckets of this process. A decision takes about a microsecond."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._states: dict[str, _State] = {}
        self._lock = threading.Lock()

    def acquire(self, key_id: str, limits: Limits) -> Standing:
        """See Limiter."""
        with self._lock:
            now = self._clock()
            state = self._states.setdefault(key_id, _State())
            wait, violation = 0.0, None
            rate = limits.requests_per_second
            if rate is not None:
                full = capacity(limits)
                if state.requests is None:
                    state.requests = _Bucket(full, now)
                state.requests.refill(rate, full, now)
                if state.requests.level < 1:
                    wait = (1 - state.requests.level) / rate
                    violation = f"{rate:g} calls per second"
            per_minute = limits.tokens_per_minute
            if per_minute is not None:
                if state.tokens is None:
                    state.tokens = _Bucket(float(per_minute), now)
                state.tokens.refill(per_minute / 60, float(per_minute), now)
                if state.tokens.level <= 0:
                    needed = (1 - state.tokens.level) / (per_minute / 60)
                    if needed > wait:
                        wait, violation = needed, f"{per_minute} tokens per minute"
            if limits.max_concurrency is not None and state.in_flight >= limits.max_concurrency:
                wait = max(wait, 0.05)
                violation = violation or f"{limits.max_concurrency} calls in flight"
            if violation is not None:
                raise refusal(key_id, violation, wait)
            if state.requests is not None and rate is not None:
                state.requests.level -= 1
            state.in_flight += 1
            return _standing(
                limits,
                state.requests.level if state.requests else 0.0,
                state.tokens.level if state.tokens else 0.0,
            )

    def release(self, key_id: str, limits: Limits, tokens: int) -> None:
        """See Limiter."""
        with self._lock:
            state = self._states.get(key_id)
            if state is None:
                return
            state.in_flight = max(0, state.in_flight - 1)
            if state.tokens is not None and limits.tokens_per_minute is not None:
                state.tokens.level -= tokens


def refusal(key_id: str, violation: str, wait: float) -> RateLimited:
    """The error of a limit that is spent."""
    return RateLimited(
        f"the key's limit of {violation} is spent; retry after {wait:.3f} s",
        violations=[QuotaViolation(f"key:{key_id}", violation)],
        retry_after_s=max(wait, 0.001),
    )


def _standing(limits: Limits, requests: float, tokens: float) -> Standing:
    limited = limits.requests_per_second is not None
    metered = limits.tokens_per_minute is not None
    return Standing(
        int(capacity(limits)) if limited else None,
        max(0, int(requests)) if limited else None,
        limits.tokens_per_minute,
        max(0, int(tokens)) if metered else None,
    )


#: KEYS: requests bucket, tokens bucket, calls in flight. ARGV: now, rate, burst, tokens/min, most
#: in flight, id of the call. -1 = no such limit. Calls in flight are a sorted set with expiry, so
#: that a server that dies does not hold its permits for ever.
_ACQUIRE = """
local now = tonumber(ARGV[1])
local function bucket(key, rate, full)
  local v = redis.call('HMGET', key, 'l', 't')
  local level = tonumber(v[1]) or full
  local t = tonumber(v[2]) or now
  return math.min(full, level + math.max(0, now - t) * rate)
end
local rate, burst, tpm, most = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local wait, what, rl, tl = 0, '', 0, 0
if rate > 0 then
  rl = bucket(KEYS[1], rate, burst)
  if rl < 1 then wait = (1 - rl) / rate; what = 'r' end
end
if tpm > 0 then
  tl = bucket(KEYS[2], tpm / 60, tpm)
  if tl <= 0 and (1 - tl) / (tpm / 60) > wait then wait = (1 - tl) / (tpm / 60); what = 't' end
end
if most > 0 then
  redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', now - 3600)
  if redis.call('ZCARD', KEYS[3]) >= most and what == '' then wait = math.max(wait, 0.05); what = 'c' end
end
if what ~= '' then return {what, tostring(wait), tostring(rl), tostring(tl)} end
if rate > 0 then
  rl = rl - 1
  redis.call('HSET', KEYS[1], 'l', tostring(rl), 't', ARGV[1]); redis.call('EXPIRE', KEYS[1], 3600)
end
if tpm > 0 then redis.call('HSET', KEYS[2], 'l', tostring(tl), 't', ARGV[1]); redis.call('EXPIRE', KEYS[2], 3600) end
if most > 0 then redis.call('ZADD', KEYS[3], now, ARGV[6]); redis.call('EXPIRE', KEYS[3], 3600) end
return {'', '0', tostring(rl), tostring(tl)}
"""


class RedisLimiter:
    """Buckets that all servers share. When Redis is away, this process's own buckets decide."""

    def __init__(self, url: str, clock: Callable[[], float] = time.time) -> None:
        import redis

        self._clock = clock
        self._redis: Any = redis.Redis.from_url(
            url, socket_timeout=0.25, socket_connect_timeout=0.25
        )
        self._acquire = self._redis.register_script(_ACQUIRE)
        self._error = redis.RedisError
        self._fallback = ProcessLimiter()
        self._mine: dict[str, list[bytes]] = {}
        self._sequence = 0
        self._lock = threading.Lock()
        self._origin = hex(id(self) ^ int(time.time_ns()))

    def acquire(self, key_id: str, limits: Limits) -> Standing:
        """See Limiter."""
        with self._lock:
            self._sequence += 1
            member = f"{self._origin}:{self._sequence}".encode()
        rate = limits.requests_per_second
        try:
            what, wait, requests, tokens = self._acquire(
                keys=_names(key_id),
                args=[
                    self._clock(),
                    -1 if rate is None else rate,
                    -1 if rate is None else capacity(limits),
                    limits.tokens_per_minute or -1,
                    limits.max_concurrency or -1,
                    member,
                ],
            )
        except self._error as e:
            log.warning("the shared limiter is away (%s); this server's own limits hold", e)
            return self._fallback.acquire(key_id, limits)
        if what:
            violation = {
                b"r": f"{rate:g} calls per second" if rate is not None else "",
                b"t": f"{limits.tokens_per_minute} tokens per minute",
                b"c": f"{limits.max_concurrency} calls in flight",
            }[what]
            raise refusal(key_id, violation, float(wait))
        if limits.max_concurrency is not None:
            with self._lock:
                self._mine.setdefault(key_id, []).append(member)
        return _standing(limits, float(requests), float(tokens))

    def release(self, key_id: str, limits: Limits, tokens: int) -> None:
        """See Limiter."""
        with self._lock:
            mine = self._mine.get(key_id)
            member = mine.pop() if mine else None
        _, bucket, flight = _names(key_id)
        try:
            with self._redis.pipeline(transaction=False) as pipe:
                if member is not None:
                    pipe.zrem(flight, member)
                if tokens and limits.tokens_per_minute is not None:
                    pipe.hincrbyfloat(bucket, "l", -tokens)
                if pipe.command_stack:
                    pipe.execute()
        except self._error as e:
            log.warning("the shared limiter is away (%s)", e)
            self._fallback.release(key_id, limits, tokens)


def _names(key_id: str) -> list[str]:
    # The braces keep a key's buckets on one node of a cluster.
    return [f"forebay:{{{key_id}}}:{part}" for part in ("requests", "tokens", "flight")]
