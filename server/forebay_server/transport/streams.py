"""Answers that are streams, on the fast lane: handlers run on the event loop, and what they have to say
in one turn of it goes to the extension as one list.

An engine's step brings tokens for all answers that it makes. Written by grpc.aio and relayed, each of
them costs six times what it costs here.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from forebay.errors import ForebayError, Unavailable
from google.protobuf.message import Message

from forebay_server.core.call import Call
from forebay_server.services.base import Handler
from forebay_server.transport.pipeline import internal, too_late

log = logging.getLogger("forebay.transport")

#: Sends messages, in order; gives the places of those whose readers are behind.
Send = Callable[[Sequence[tuple[Any, bytes]]], Sequence[int]]


class Streams:
    """See the module. `start`, `gone` and `ready` may be called on any thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, send: Send) -> None:
        self._loop = loop
        self._send_all = send
        self._tasks: dict[Call, asyncio.Task[None]] = {}
        #: Why a call's task was cancelled; None: its client is gone.
        self._causes: dict[Call, ForebayError | None] = {}
        self._unsent: list[tuple[Call, bytes]] = []
        #: Calls whose readers are behind, and what wakes their handlers.
        self._behind: dict[Call, asyncio.Event] = {}

    def start(self, handler: Handler, calls: Sequence[Call]) -> None:
        """Run the handler for calls that were admitted and whose requests are good."""
        self._loop.call_soon_threadsafe(self._start, handler, calls)

    def gone(self, call: Call) -> None:
        """The client left, or the deadline passed: the handler is stopped, then the call ends."""
        self._loop.call_soon_threadsafe(self._stop, call, too_late(call))

    def ready(self, call: Call) -> None:
        """The reader has caught up."""
        self._loop.call_soon_threadsafe(self._caught_up, call)

    async def close(self) -> None:
        """End what still runs."""
        tasks = list(self._tasks.items())
        for call, _ in tasks:
            self._stop(call, Unavailable("the server is shutting down", reason="DRAINING"))
        await asyncio.gather(*(task for _, task in tasks), return_exceptions=True)

    def _start(self, handler: Handler, calls: Sequence[Call]) -> None:
        for call in calls:
            if call.ended:
                continue  # its client left before it was begun
            task = self._loop.create_task(self._run(handler, call))
            self._tasks[call] = task
            # The extension looks at the clock only while the reader reads.
            timer = None
            if call.deadline is not None:
                left = call.deadline - time.monotonic()
                timer = self._loop.call_later(max(0.0, left), self._expired, call)
            task.add_done_callback(lambda _, c=call, t=timer: self._forget(c, t))

    def _expired(self, call: Call) -> None:
        self._stop(call, too_late(call))

    def _forget(self, call: Call, timer: asyncio.TimerHandle | None) -> None:
        if timer is not None:
            timer.cancel()
        del self._tasks[call]
        self._behind.pop(call, None)
        cause = self._causes.pop(call, None)
        if not call.ended:
            call.cancel(cause)  # it was stopped before its first step

    def _stop(self, call: Call, cause: ForebayError | None) -> None:
        task = self._tasks.get(call)
        if task is None:
            call.cancel(cause)
        elif call not in self._causes:  # a second time would interrupt what puts things in order
            self._causes[call] = cause
            task.cancel()

    async def _run(self, handler: Handler, call: Call) -> None:
        try:
            answers: AsyncGenerator[Message, None] = handler.function(call)
            try:
                async for answer in answers:
                    behind = self._behind.get(call)
                    if behind is not None:
                        await behind.wait()
                    self._send(call, answer.SerializeToString())
            finally:
                await answers.aclose()
        except asyncio.CancelledError:
            call.cancel(self._causes.get(call))
        except ForebayError as e:
            self._flush()
            call.fail(e)
        except Exception as e:
            log.exception("handler of %s failed (request %s)", call.method.path, call.request_id)
            self._flush()
            call.fail(internal(call), cause=e)
        else:
            self._flush()  # what was said goes before the status
            call.finish()

    def _send(self, call: Call, data: bytes) -> None:
        """Send in this turn of the loop, with what others send in it."""
        if not self._unsent:
            self._loop.call_soon(self._flush)
        self._unsent.append((call, data))

    def _flush(self) -> None:
        unsent, self._unsent = self._unsent, []
        if not unsent:
            return
        for at in self._send_all([(call.origin, data) for call, data in unsent]):
            call = unsent[at][0]
            if call in self._tasks and call not in self._behind:
                self._behind[call] = asyncio.Event()

    def _caught_up(self, call: Call) -> None:
        behind = self._behind.pop(call, None)
        if behind is not None:
            behind.set()
