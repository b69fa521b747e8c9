"""Fair queueing between keys: one key's ten thousand prompts do not starve another's one.

Start-time fair queueing over estimated tokens. Each entry gets a start tag, the later of the
queue's virtual time and its key's last finish tag; the lowest start tag goes first. A key that has
been away starts at the present and cannot save up. Within a key the order is first come, first
served; a higher priority goes before all lower ones.
"""

from __future__ import annotations

import heapq
import itertools
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Entries of many keys. Not thread-safe: it lives on one loop."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, float, int]] = []
        self._entries: dict[int, tuple[str, float, T]] = {}
        #: Of each key, where its last entry will end, and where the last that was served did.
        self._finish: dict[str, float] = {}
        self._served: dict[str, float] = {}
        self._waiting: dict[str, int] = {}
        self._virtual = 0.0
        self._sequence = itertools.count()

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, key: str, cost: float, value: T, priority: int = 0) -> int:
        """Queue an entry; gives the ticket that `drop` takes. `cost` in tokens, at least 1."""
        start = max(self._virtual, self._finish.get(key, 0.0))
        self._finish[key] = start + max(cost, 1.0)
        ticket = next(self._sequence)
        self._entries[ticket] = (key, self._finish[key], value)
        self._waiting[key] = self._waiting.get(key, 0) + 1
        heapq.heappush(self._heap, (-priority, start, ticket))
        return ticket

    def get(self) -> T | None:
        """The next entry; None when there is none."""
        while self._heap:
            _, start, ticket = heapq.heappop(self._heap)
            entry = self._entries.pop(ticket, None)
            if entry is None:
                continue
            key, finish, value = entry
            self._virtual = max(self._virtual, start)
            self._served[key] = max(finish, self._served.get(key, 0.0))
            self._left(key)
            return value
        return None

    def drop(self, ticket: int) -> None:
        """Take an entry back; nothing when it has left. A key of which nothing else waits owes nothing
        for what was taken back."""
        entry = self._entries.pop(ticket, None)
        if entry is not None:
            key = entry[0]
            if self._waiting[key] == 1:
                self._finish[key] = self._served.get(key, 0.0)
            self._left(key)

    def _left(self, key: str) -> None:
        self._waiting[key] -= 1
        if not self._waiting[key]:
            del self._waiting[key]
            # What lies behind the present says nothing any more: keys must not pile up for ever.
            for stale in [
                k for k, f in self._finish.items() if f <= self._virtual and k not in self._waiting
            ]:
                del self._finish[stale]
                self._served.pop(stale, None)
