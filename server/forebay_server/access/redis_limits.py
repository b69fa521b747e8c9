"""Limits per key that all servers share, in Redis or Valkey: each decision is one atomic script.

While Redis is away, each server's own buckets decide.
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
from typing import Any

from forebay_server.access.keys import Limits
from forebay_server.access.limits import (
    Admitted,
    LimitSpent,
    Loan,
    ProcessLimiter,
    capacity,
    standing_of,
)
from forebay_server.access.shared import connect

log = logging.getLogger("forebay.access")

#: Seconds for which a call in flight holds its permit in Redis, and how often that is renewed meanwhile.
LEASE_S, RENEWALS = 60.0, 4
#: Seconds without trying after Redis failed: else each call would wait for its timeout.
REST_S = 2.0

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
        standing = standing_of(limits, float(requests), float(tokens))
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
