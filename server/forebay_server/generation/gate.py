"""The door of an engine: so many answers at once, the rest in the fair queue.

Work that nobody waits for (`background`) has a queue of its own behind the other and fills what is
idle: it enters only when nobody else waits, always leaves HEADROOM of the places free, and has few
places while anybody else is being served, because every answer that runs slows the others down.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from forebay.errors import QueueFull

from forebay_server.core.fairness import FairQueue

#: Share of the places that background work never takes: who comes next need not wait for its end.
HEADROOM = 0.25
#: Share of the places that background work may take while others are served.
BESIDE = 0.125

_Turn = tuple[asyncio.Future[None], int]


class Gate:
    """Lives on one loop.

    Args:
        capacity: answers at once; a request with more answers than that enters alone.
        max_queue_size: requests that may wait; those in the background have no bound here.
    """

    def __init__(self, capacity: int, max_queue_size: int) -> None:
        self._capacity = capacity
        self._max_queue = max_queue_size
        self._queue: FairQueue[_Turn] = FairQueue()
        self._background: FairQueue[_Turn] = FairQueue()
        self._next: _Turn | None = None
        self._next_background: _Turn | None = None
        #: Answers that run, of which in the background.
        self.running = 0
        self.background = 0

    @property
    def waiting(self) -> int:
        """Requests in the queue, without those in the background."""
        return len(self._queue) + (self._next is not None)

    @property
    def background_waiting(self) -> int:
        """Requests in the background's queue."""
        return len(self._background) + (self._next_background is not None)

    @asynccontextmanager
    async def enter(
        self, key: str, answers: int, tokens: int, priority: int = 0, background: bool = False
    ) -> AsyncIterator[None]:
        """Wait for a turn; the turn ends with the block.

        Args:
            tokens: estimate of the work, by which keys take turns.
            background: nobody waits for it.

        Raises:
            QueueFull: too many wait already.
        """
        if not background and self.waiting == 0 and self._fits(answers):
            self.running += answers
        else:
            if not background and self.waiting >= self._max_queue:
                raise QueueFull(
                    f"{self.waiting} requests wait for this model already; come back later",
                    retry_after_s=1.0,
                )
            await self._turn(key, answers, tokens, priority, background)
        try:
            yield
        finally:
            self._leave(answers, background)

    async def _turn(
        self, key: str, answers: int, tokens: int, priority: int, background: bool
    ) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue = self._background if background else self._queue
        ticket = queue.put(key, tokens, (turn, answers), priority)
        self._admit()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._leave(answers, background)
            else:
                queue.drop(ticket)
                if self._next is not None and self._next[0] is turn:
                    self._next = None
                if self._next_background is not None and self._next_background[0] is turn:
                    self._next_background = None
                self._admit()
            raise

    def _fits(self, answers: int) -> bool:
        return self.running == 0 or self.running + answers <= self._capacity

    def _fits_background(self, answers: int) -> bool:
        if self.running == 0:
            return True
        share = BESIDE if self.running > self.background else 1 - HEADROOM
        most = max(1, int(self._capacity * share))
        return self.background + answers <= most and self._fits(answers)

    def _leave(self, answers: int, background: bool) -> None:
        self.running -= answers
        if background:
            self.background -= answers
        self._admit()

    def _admit(self) -> None:
        """Let in who fits. A wide request that is next is not overtaken by narrow ones."""
        while True:
            if self._next is None:
                self._next = self._queue.get()
            if self._next is None:
                break
            turn, answers = self._next
            if turn.done():
                self._next = None
                continue
            if not self._fits(answers):
                return
            self._next = None
            self.running += answers
            turn.set_result(None)
        self._admit_background()

    def _admit_background(self) -> None:
        """Nobody else waits: let background work in where it fits."""
        while True:
            if self._next_background is None:
                self._next_background = self._background.get()
            if self._next_background is None:
                return
            turn, answers = self._next_background
            if turn.done():
                self._next_background = None
                continue
            if not self._fits_background(answers):
                return
            self._next_background = None
            self.running += answers
            self.background += answers
            turn.set_result(None)
