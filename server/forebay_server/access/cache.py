"""The response cache, by item: model, version and the hash of what the model sees.

In process (least recently used goes first, bounded by bytes), or in Redis or Valkey, shared by all
servers. A new version has keys of its own, so an answer never crosses versions. A cache that is
away costs a metric and nothing else.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from forebay_server.access.shared import connect

log = logging.getLogger("forebay.access")

#: What an entry costs beside its value: key, dictionary slot, object headers. Measured.
ENTRY_BYTES = 300
#: Seconds without trying after Redis failed.
REST_S = 5.0
#: Puts that may wait for the writer; beyond it they are dropped: a cache may forget.
MAX_PUTS = 1000

Observe = Callable[[str, int, int], None]


class ResponseCache(Protocol):
    """See dataplane.models.ItemCache."""

    @property
    def enabled(self) -> bool: ...

    def get_many(
        self, model: str, version: int, keys: Sequence[bytes]
    ) -> Sequence[bytes | None]: ...

    def put_many(self, model: str, version: int, values: Mapping[bytes, bytes]) -> None: ...


class ProcessCache:
    """Bounded by bytes. `observe` is told model, hits and misses of each look-up."""

    def __init__(self, max_bytes: int, observe: Observe = lambda m, h, x: None) -> None:
        self._max = max_bytes
        self._observe = observe
        self._entries: OrderedDict[tuple[str, int, bytes], bytes] = OrderedDict()
        self._lock = threading.Lock()
        self.size_bytes = 0

    @property
    def enabled(self) -> bool:
        """Whether it may hold anything."""
        return self._max > 0

    def get_many(self, model: str, version: int, keys: Sequence[bytes]) -> list[bytes | None]:
        """Values in the order of the keys; None where there is none."""
        out: list[bytes | None] = []
        with self._lock:
            for key in keys:
                full = (model, version, key)
                value = self._entries.get(full)
                if value is not None:
                    self._entries.move_to_end(full)
                out.append(value)
        hits = sum(v is not None for v in out)
        self._observe(model, hits, len(out) - hits)
        return out

    def put_many(self, model: str, version: int, values: Mapping[bytes, bytes]) -> None:
        """Keep values; the least recently used ones go when there is no room."""
        if not self._max:
            return
        with self._lock:
            for key, value in values.items():
                full = (model, version, key)
                old = self._entries.pop(full, None)
                if old is not None:
                    self.size_bytes -= len(old) + ENTRY_BYTES
                self._entries[full] = value
                self.size_bytes += len(value) + ENTRY_BYTES
            while self.size_bytes > self._max and self._entries:
                _, gone = self._entries.popitem(last=False)
                self.size_bytes -= len(gone) + ENTRY_BYTES


class RedisCache:
    """Values in Redis, each with an expiry. Short timeouts; after a failure it rests a while.

    Look-ups run on ingest threads; values are written by a thread of its own, so that no engine
    waits for the network.

    Args:
        ttl_s: seconds for which a value is kept.
        observe: told model, hits and misses of each look-up.
        bypassed: told of each look-up or write that failed or was left out.
    """

    def __init__(
        self,
        url: str,
        ttl_s: int,
        observe: Observe = lambda m, h, x: None,
        clock: Callable[[], float] = time.monotonic,
        bypassed: Callable[[], None] = lambda: None,
    ) -> None:
        self._redis: Any = connect(url, 0.1)
        import redis

        self._error = redis.RedisError
        self._ttl = ttl_s
        self._observe = observe
        self._bypassed = bypassed
        self._clock = clock
        self._resting_until = 0.0
        self._puts: queue.Queue[dict[bytes, bytes] | None] = queue.Queue(MAX_PUTS)
        self._writer = threading.Thread(target=self._write, name="cache-writer", daemon=True)
        self._writer.start()

    @property
    def enabled(self) -> bool:
        """False while it rests after a failure."""
        return self._clock() >= self._resting_until

    def get_many(self, model: str, version: int, keys: Sequence[bytes]) -> Sequence[bytes | None]:
        """Values in the order of the keys; None where there is none."""
        out: Sequence[bytes | None] = [None] * len(keys)
        if not self.enabled:
            self._bypassed()
        elif keys:
            try:
                out = self._redis.mget([_name(model, version, k) for k in keys])
            except self._error as e:
                self._rest(e)
        hits = sum(v is not None for v in out)
        self._observe(model, hits, len(out) - hits)
        return out

    def put_many(self, model: str, version: int, values: Mapping[bytes, bytes]) -> None:
        """Hand values to the writer. Never blocks."""
        if not values:
            return
        try:
            self._puts.put_nowait({_name(model, version, k): v for k, v in values.items()})
        except queue.Full:
            self._bypassed()

    def flush(self) -> None:
        """Wait until all values so far are written or given up."""
        self._puts.join()

    def close(self) -> None:
        """Write what waits, and end the writer."""
        self._puts.put(None)
        self._writer.join(timeout=5)
        self._redis.close()

    def _write(self) -> None:
        while (values := self._puts.get()) is not None:
            try:
                if self.enabled:
                    with self._redis.pipeline(transaction=False) as pipe:
                        for name, value in values.items():
                            pipe.set(name, value, ex=self._ttl)
                        pipe.execute()
                else:
                    self._bypassed()
            except self._error as e:
                self._rest(e)
            finally:
                self._puts.task_done()
        self._puts.task_done()

    def _rest(self, error: Exception) -> None:
        self._bypassed()
        self._resting_until = self._clock() + REST_S
        log.warning("the shared cache is away (%s); it is left alone for %g s", error, REST_S)


def _name(model: str, version: int, key: bytes) -> bytes:
    return f"forebay:cache:{model}:{version}:".encode() + key
