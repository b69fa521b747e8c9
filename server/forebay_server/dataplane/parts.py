"""Work that is part of a call: awaited on the event loop, done by a call of its own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

from forebay.errors import ForebayError

from forebay_server.core.call import Call

T = TypeVar("T")


def child_of(call: Call, on_end: Callable[[Call], None]) -> Call:
    """A call that is part of another: the same key and deadline, facts of its own."""
    child = Call(
        call.method,
        call.metadata,
        started=time.monotonic(),
        deadline=call.deadline,
        peer=call.peer,
        on_end=on_end,
    )
    child.principal = call.principal
    child.request_id = call.request_id
    return child


async def as_part(call: Call, start: Callable[[Call, Callable[[T], None]], None]) -> tuple[T, Call]:
    """The outcome of a part of a call, and the part's own call with its facts. Raises the error that
    ended it; whoever stops waiting cancels it.

    Args:
        start: begins the work, on another thread. It gets the part's call, which it ends when it fails,
            and what takes the outcome, on whatever thread.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def succeed(outcome: T) -> None:
        if not future.done():
            future.set_result(outcome)

    def fail(error: ForebayError) -> None:
        if not future.done():
            future.set_exception(error)

    def ended(child: Call) -> None:
        if child.error is not None:
            loop.call_soon_threadsafe(fail, child.error)

    child = child_of(call, ended)

    def done(outcome: T) -> None:
        child.finish()
        loop.call_soon_threadsafe(succeed, outcome)

    try:
        await asyncio.to_thread(start, child, done)
        return await future, child
    except asyncio.CancelledError:
        child.cancel()
        raise
