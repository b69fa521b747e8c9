"""The ordinary lane: every method of every service on grpc.aio.

Messages stay bytes at gRPC's door, so that a message that cannot be parsed is answered by our own
error, and answers written by engine threads are passed on as they are.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, cast

import grpc
from forebay.constraints import Validator
from forebay.errors import Cancelled, ForebayError
from google.protobuf.message import Message
from grpc import aio

from forebay_server.access.idempotency import IdempotencyStore
from forebay_server.core.call import Call
from forebay_server.services.base import Handler
from forebay_server.transport.dispatch import parse
from forebay_server.transport.inbox import Inbox
from forebay_server.transport.pipeline import (
    Pipeline,
    given_id,
    internal,
    too_late,
    too_many,
    trailers_of,
)

log = logging.getLogger("forebay.transport")

#: Metadata by which the fast lane says whose call it passes on. It drops a caller's own.
PEER = "forebay-peer"
#: Name of the trailer that carries a google.rpc.Status.
DETAILS = "grpc-status-details-bin"
_STATUS = {code.name: code for code in grpc.StatusCode}


class Wakeups:
    """Ends of calls on their way from engine threads to the event loop.

    One wake-up of the loop serves all calls that ended before it ran: a write to the loop's pipe
    costs more than the rest of the hand-over.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._ended: deque[asyncio.Future[None]] = deque()
        self._scheduled = False

    def wake(self, future: asyncio.Future[None]) -> None:
        """Resolve `future` on its loop, soon. Callable from any thread."""
        self._ended.append(future)
        # A missed race means one wake-up too many, never one too few: _drain clears the flag first.
        if not self._scheduled:
            self._scheduled = True
            try:
                self._loop.call_soon_threadsafe(self._drain)
            except RuntimeError:  # the loop is closed: nobody waits any more
                return

    def _drain(self) -> None:
        self._scheduled = False
        while self._ended:
            future = self._ended.popleft()
            if not future.done():
                future.set_result(None)


class OrdinaryLane(grpc.GenericRpcHandler):
    """Routes gRPC calls to handlers. Build it on the loop that serves."""

    def __init__(
        self,
        handlers: Mapping[str, Handler],
        pipeline: Pipeline,
        inbox: Inbox,
        validator: Validator,
        idempotency: IdempotencyStore,
        loop: asyncio.AbstractEventLoop,
        refused: Callable[[str, int], None],
        behind: bool = False,
    ) -> None:
        """`refused`: hears of calls of a method that were refused because too much waits.
        `behind`: calls come through the fast lane, which names their peers."""
        self._refused = refused
        self._behind = behind
        self._pipeline = pipeline
        self._inbox = inbox
        self._validator = validator
        self._idempotency = idempotency
        self._wakeups = Wakeups(loop)
        self._routes = {path: self._route(h) for path, h in handlers.items()}

    def service(
        self, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler | None:
        """See grpc.GenericRpcHandler; None answers UNIMPLEMENTED."""
        return self._routes.get(cast(str, handler_call_details.method))

    def _route(self, handler: Handler) -> grpc.RpcMethodHandler:
        """The lane's function for this kind of method, as grpc.aio wants it."""
        kinds: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
            "unary": (self._unary, grpc.unary_unary_rpc_method_handler),
            "client_stream": (self._client_stream, grpc.stream_unary_rpc_method_handler),
            "server_stream": (self._server_stream, grpc.unary_stream_rpc_method_handler),
            "bidi_stream": (self._bidi_stream, grpc.stream_stream_rpc_method_handler),
        }
        serve, wrap = kinds[handler.method.kind]
        if handler.method.batched:
            serve = self._batched

        async def behaviour(incoming: Any, context: aio.ServicerContext) -> Any:
            return await serve(handler, incoming, context)

        return wrap(behaviour)

    def _call(
        self, handler: Handler, context: aio.ServicerContext, on_end: Callable[[Call], None]
    ) -> Call:
        pairs = cast(Any, context.invocation_metadata() or ())
        metadata = {key: value for key, value in pairs if isinstance(value, str)}
        peer = metadata.pop(PEER, "") if self._behind else ""
        now = time.monotonic()
        left = context.time_remaining()

        def end(call: Call) -> None:
            self._pipeline.end([call])
            on_end(call)

        return Call(
            handler.method,
            metadata,
            started=now,
            deadline=None if left is None else now + left,
            peer=peer or context.peer(),
            on_end=end,
        )

    async def _batched(
        self, handler: Handler, message: bytes, context: aio.ServicerContext
    ) -> bytes:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        call = self._call(handler, context, lambda _: self._wakeups.wake(done))
        call.message = message
        if self._inbox.put(call):
            try:
                await done
            except asyncio.CancelledError:
                _gone(call)
                raise
            finally:
                self._inbox.leave(call, len(message))
        else:
            self._refused(call.method.path, 1)
            call.request_id = given_id(call)
            call.fail(too_many())
        await _send_status(call, context)
        return call.payload

    async def _begin(self, call: Call) -> bool:
        """Pass the pipeline; False when the call has ended there."""
        begin = self._pipeline.begin
        return bool(
            await asyncio.to_thread(begin, [call]) if self._pipeline.waits else begin([call])
        )

    async def _run(
        self, call: Call, context: aio.ServicerContext, work: Callable[[], Awaitable[Any]]
    ) -> Any:
        """Run a handler that is not batched to its end, and send the status."""
        result = None
        try:
            if await self._begin(call):
                result = await work()
        except asyncio.CancelledError:
            _gone(call)
            raise
        except ForebayError as e:
            call.fail(e)
        except Exception as e:
            log.exception("handler of %s failed (request %s)", call.method.path, call.request_id)
            call.fail(internal(call), cause=e)
        await _send_status(call, context)
        return result

    async def _unary(self, handler: Handler, message: bytes, context: aio.ServicerContext) -> bytes:
        call = self._call(handler, context, _nothing)

        async def work() -> None:
            call.request = parse(call.method.request, message)
            self._validator.check(cast(Message, call.request))
            token = call.metadata.get("idempotency-key", "")
            if token and handler.method.mutates:

                async def act() -> bytes:
                    return (await handler.function(call)).SerializeToString()

                data = await self._idempotency.once(
                    call.principal.key_id, call.method.path, token, message, act
                )
                call.reply(handler.method.response.FromString(data))
            else:
                call.reply(await handler.function(call))

        await self._run(call, context, work)
        return call.payload

    async def _client_stream(
        self, handler: Handler, messages: AsyncIterator[bytes], context: aio.ServicerContext
    ) -> bytes:
        call = self._call(handler, context, _nothing)

        async def work() -> None:
            call.reply(await handler.function(call, self._parsed(call, messages)))

        await self._run(call, context, work)
        return call.payload

    async def _server_stream(
        self, handler: Handler, message: bytes, context: aio.ServicerContext
    ) -> None:
        call = self._call(handler, context, _nothing)

        async def work() -> None:
            call.request = parse(call.method.request, message)
            self._validator.check(cast(Message, call.request))
            await self._write_all(call, handler.function(call), context)

        await self._run(call, context, work)

    async def _bidi_stream(
        self, handler: Handler, messages: AsyncIterator[bytes], context: aio.ServicerContext
    ) -> None:
        call = self._call(handler, context, _nothing)

        async def work() -> None:
            answers = handler.function(call, self._parsed(call, messages))
            await self._write_all(call, answers, context)

        await self._run(call, context, work)

    async def _write_all(
        self, call: Call, answers: AsyncIterator[Message], context: aio.ServicerContext
    ) -> None:
        try:
            async for answer in answers:
                data = answer.SerializeToString()
                try:
                    await context.write(data)
                except Exception as e:  # how grpc.aio says that the connection is gone
                    raise asyncio.CancelledError from e
        finally:
            await cast(Any, answers).aclose()
        call.finish()

    async def _parsed(self, call: Call, messages: AsyncIterator[bytes]) -> AsyncIterator[Message]:
        async for data in messages:
            message = parse(call.method.request, data)
            self._validator.check(message)
            yield message


def _nothing(_: Call) -> None:
    return None


def _gone(call: Call) -> None:
    """gRPC cancels handlers for both reasons."""
    call.cancel(too_late(call))


async def _send_status(call: Call, context: aio.ServicerContext) -> None:
    trailers: list[tuple[str, str | bytes]] = [*trailers_of(call)]
    if call.error is None:
        if trailers:
            context.set_trailing_metadata(tuple(trailers))
        return
    if isinstance(call.error, Cancelled) and call.cancelled:
        raise asyncio.CancelledError
    trailers.append((DETAILS, call.error.to_status().SerializeToString()))
    await context.abort(_STATUS[call.error.code], call.error.message, tuple(trailers))
