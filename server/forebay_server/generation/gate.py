"""The door of an engine: so many answers at once, the rest in the fair queue."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from forebay.errors import QueueFull

from forebay_server.core.fairness import FairQueue


class Gate:
    """Lives on one loop.

    Args:
        capacity: answers at once; a request with more answers than that enters alone.
        max_queue_size: requests that may wait.
    """

    def __init__(self, capacity: int, max_queue_size: int) -> None:
        self._capacity = capacity
        self._max_queue = max_queue_size
        self._queue: FairQueue[tuple[asyncio.Future[None], int]] = FairQueue()
        self._next: tuple[asyncio.Future[None], int] | None = None
        self.running = 0

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue) + (self._next is not None)

    @asynccontextmanager
    async def enter(
        self, key: str, answers: int, tokens: int, priority: int = 0
    ) -> AsyncIterator[None]:
        """Wait for a turn; the turn ends with the block.

        Args:
            tokens: estimate of the work, by which keys take turns.

        Raises:
            QueueFull: too many wait already.
        """
        if self.waiting == 0 and self._fits(answers):
            self.running += answers
        else:
            if self.waiting >= self._max_queue:
                raise QueueFull(
                    f"{self.waiting} requests wait for this model already; come back later",
                    retry_after_s=1.0,
                )
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            ticket = self._queue.put(key, tokens, (turn, answers), priority)
            self._admit()
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._leave(answers)
                else:
                    self._queue.drop(ticket)
                    if self._next is not None and self._next[0] is turn:
                        self._next = None
                    self._admit()
                raise
        try:
            yield
        finally:
            self._leave(answers)

    def _fits(self, answers: int) -> bool:
        return self.running == 0 or self.running + answers <= self._capacity

    def _leave(self, answers: int) -> None:
        self.running -= answers
        self._admit()

    def _admit(self) -> None:
        """Let in who fits. A wide request that is next is not overtaken by narrow ones."""
        while True:
            if self._next is None:
                self._next = self._queue.get()
            if self._next is None:
                return
            turn, answers = self._next
            if turn.done():
                self._next = None
                continue
            if not self._fits(answers):
                return
            self._next = None
            self.running += answers
            turn.set_result(None)
