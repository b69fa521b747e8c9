"""What happens in the repository, for those who watch it. Lives on one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Event:
    """A change of the repository, for watchers."""

    event: str
    model: str
    version: int = 0
    reason: str = ""
    time: float = 0.0


class Events:
    """See the module."""

    def __init__(self) -> None:
        self._watchers: set[asyncio.Queue[Event]] = set()
        #: Is called, on the loop, as soon as the versions that calls reach have changed.
        self.on_change: Callable[[], None] = lambda: None

    @contextlib.contextmanager
    def watch(self) -> Iterator[asyncio.Queue[Event]]:
        """Changes from now on. A watcher that falls 1000 behind loses the oldest."""
        queue: asyncio.Queue[Event] = asyncio.Queue(1000)
        self._watchers.add(queue)
        try:
            yield queue
        finally:
            self._watchers.discard(queue)

    def publish(self, event: str, model: str, version: int = 0, reason: str = "") -> None:
        """Tell all that watch."""
        for queue in self._watchers:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(Event(event, model, version, reason, time.time()))
