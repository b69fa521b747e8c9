"""Writes that are finished, also when the caller goes away in the middle of one."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from forebay.errors import FailedPrecondition

T = TypeVar("T")


class Writes:
    """The writes of one part of the server: what is in memory must not part from what is stored.

    Lives on one event loop.
    """

    def __init__(self) -> None:
        self._tasks: set[asyncio.Future[Any]] = set()
        self._closing = False

    async def finish(self, work: Coroutine[Any, Any, T]) -> T:
        """Run to the end, whatever becomes of the caller. Raises FailedPrecondition (DRAINING) when
        the server shuts down."""
        if self._closing:
            work.close()
            raise FailedPrecondition("the server is shutting down", reason="DRAINING")
        return await asyncio.shield(self.keep(work))

    def keep(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run in the background; `close` waits for it."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def close(self) -> None:
        """Take no more, and wait for those that run."""
        self._closing = True
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)
