"""The way to the gRPC server: one channel, bytes in, bytes out, cancelled when the client leaves."""

from __future__ import annotations

import asyncio
import logging
import re
import zlib
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, TypeVar

from forebay import channels
from forebay.errors import InvalidArgument, TooLarge
from forebay.methods import Method
from forebay.settings import ClientSettings
from grpc import aio
from grpc._cython import cygrpc
from starlette.datastructures import FormData, Headers
from starlette.requests import ClientDisconnect, Request

#: Headers that become metadata of the call.
FORWARDED = {
    name.encode(): name
    for name in ("authorization", "x-request-id", "traceparent", "tracestate", "idempotency-key")
}
#: A key as Anthropic's clients send it, where there is no `authorization`.
API_KEY = "x-api-key"
#: Names of a time in milliseconds; the first that is given counts.
_TIMES = ("x-forebay-timeout-ms", "connect-timeout-ms")
_READ = {*FORWARDED, *(name.encode() for name in ("grpc-timeout", API_KEY, *_TIMES))}
#: Trailing metadata that becomes headers of the answer.
RETURNED = re.compile(r"x-request-id|x-ratelimit-.*")
#: Seconds after which a call's client is watched.
WATCH_AFTER_S = 0.02
_TIMEOUT = re.compile(r"(\d{1,8})([HMSmun])")
#: gRPC's library takes a time that its clock cannot hold, such as 99999999H, for one that has passed.
LONGEST_S = 365 * 86400.0
_UNITS = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
T = TypeVar("T")
log = logging.getLogger(__name__)


class ClientGone(Exception):
    """The client has left; nobody waits for an answer."""


class Upstream:
    """One channel of this worker.

    Args:
        target: host:port of the gRPC server.
        timeout_s: deadline of calls whose caller names none.
        max_body_bytes: bound of request bodies.
        max_upload_bytes: bound of multipart forms, which go to disk.
        client: how to call by TLS; None = in the clear.

    Raises:
        SettingsError: a file of TLS cannot be read.
    """

    def __init__(
        self,
        target: str,
        timeout_s: float,
        max_body_bytes: int,
        max_upload_bytes: int,
        client: ClientSettings | None = None,
    ) -> None:
        self._credentials = channels.credentials(client) if client is not None else None
        self._options = channels.options(client) if client is not None else []
        self._timeout_s = timeout_s
        self._max_body = max_body_bytes
        self._max_upload = max_upload_bytes
        self._target = target
        self._channel: aio.Channel | None = None
        self._stubs: dict[str, Any] = {}

    @property
    def channel(self) -> aio.Channel:
        """The channel, made at first use: it belongs to the event loop that serves."""
        if self._channel is None:
            options = [
                *self._options,
                ("grpc.max_receive_message_length", -1),
                ("grpc.max_send_message_length", -1),
                ("grpc.initial_reconnect_backoff_ms", 100),
                ("grpc.max_reconnect_backoff_ms", 1000),
                # A name with several addresses is a pool: calls spread over all of it.
                ("grpc.lb_policy_name", "round_robin"),
            ]
            if self._credentials is None:
                self._channel = aio.insecure_channel(self._target, options)
            else:
                self._channel = aio.secure_channel(self._target, self._credentials, options)
        return self._channel

    async def close(self) -> None:
        """Close the channel."""
        if self._channel is not None:
            await self._channel.close()

    def _stub(self, method: Method) -> Any:
        stub = self._stubs.get(method.path)
        if stub is None:
            makers = {
                "unary": self.channel.unary_unary,
                "server_stream": self.channel.unary_stream,
                "client_stream": self.channel.stream_unary,
                "bidi_stream": self.channel.stream_stream,
            }
            stub = self._stubs[method.path] = makers[method.kind](method.path)
        return stub

    def start(self, method: Method, headers: Headers, messages: Any) -> Any:
        """Begin a call. `messages` is the message's bytes, or an iterator of them for streams."""
        # One look through them: each `headers.get` would be one. Of a name given twice the first counts.
        known = {k: v.decode("latin-1") for k, v in reversed(headers.raw) if k in _READ}
        if (key := known.get(API_KEY.encode())) and not known.get(b"authorization"):
            known[b"authorization"] = f"Bearer {key}"
        metadata = [
            (name, v) for k, name in FORWARDED.items() if (v := known.get(k)) and _printable(v)
        ]
        stub, timeout = self._stub(method), self._timeout(known)
        if method.kind in ("unary", "server_stream"):
            return stub(messages, metadata=metadata, timeout=timeout)
        call = stub(metadata=metadata, timeout=timeout)
        writer = asyncio.ensure_future(_write(call, messages))
        call.add_done_callback(lambda _: writer.cancel())
        return call

    def _timeout(self, headers: Mapping[bytes, str]) -> float:
        text = headers.get(b"grpc-timeout")
        if text is not None:
            match = _TIMEOUT.fullmatch(text)
            if match is None:
                raise InvalidArgument.at("grpc-timeout", "is not a number and one of H M S m u n")
            return min(int(match[1]) * _UNITS[match[2]], LONGEST_S)
        for name in _TIMES:
            text = headers.get(name.encode())
            if not text:
                continue
            if not text.isascii() or not text.isdigit() or len(text) > 10:
                raise InvalidArgument.at(name, "is not a number of milliseconds")
            return int(text) / 1e3
        return self._timeout_s

    async def unary(
        self, method: Method, request: Request, message: bytes
    ) -> tuple[bytes, dict[str, str]]:
        """One unary call: the answer's bytes, and headers for it.

        Raises:
            grpc.aio.AioRpcError: the upstream's error.
            ClientGone: the client left; the call was cancelled.
        """
        call = self.start(method, request.headers, message)
        data = await unless_gone(request, call)
        return data, returned(await call.trailing_metadata())

    async def upload(
        self, method: Method, request: Request, messages: AsyncIterator[bytes]
    ) -> tuple[bytes, dict[str, str]]:
        """One call with a stream of messages and one answer; as `unary` otherwise."""
        call = self.start(method, request.headers, messages)
        data = await unless_gone(request, call)
        return data, returned(await call.trailing_metadata())

    async def stream(
        self, method: Method, request: Request, message: bytes
    ) -> tuple[Any, AsyncIterator[bytes], bytes | None]:
        """Begin a server stream: the call, its messages, and the first of them, None where there is
        none. An error of the start is a real HTTP status, then.

        Raises:
            grpc.aio.AioRpcError: the upstream's error.
            ClientGone: the client left before the first message; the call was cancelled.
        """
        call = self.start(method, request.headers, message)
        messages = aiter(call)
        try:
            first = await unless_gone(request, asyncio.ensure_future(anext(messages, None)))
        except BaseException:
            call.cancel()
            raise
        return call, messages, first

    async def body(self, request: Request) -> bytes:
        """The request's body without its content encoding, refused as soon as it is over the bound.

        Raises:
            TooLarge: see above.
            InvalidArgument: it is not encoded as it says.
            ClientGone: the client left before its end.
        """
        length = request.headers.get("content-length")
        if length and length.isdigit() and int(length) > self._max_body:
            raise TooLarge("body", size=int(length), limit=self._max_body, unit="bytes")
        parts, size = [], 0
        try:
            async for part in request.stream():
                size += len(part)
                if size > self._max_body:
                    raise TooLarge("body", size=size, limit=self._max_body, unit="bytes")
                parts.append(part)
        except ClientDisconnect:
            raise ClientGone from None
        encoding = ", ".join(request.headers.getlist("content-encoding")).lower() or "identity"
        return self.unpacked(encoding, b"".join(parts))

    def unpacked(self, encoding: str, body: bytes) -> bytes:
        """A body, or a part of it, without its encoding. Raises InvalidArgument, TooLarge."""
        if encoding == "identity":
            return body
        if encoding not in ("gzip", "deflate"):
            raise InvalidArgument.at(
                "content-encoding", f"is {encoding!r}; allowed are gzip, deflate"
            )
        inflater = zlib.decompressobj(31 if encoding == "gzip" else 15)
        try:
            out = inflater.decompress(body, self._max_body + 1)
        except zlib.error as e:
            raise InvalidArgument.at("body", f"is not {encoding}: {e}") from None
        if len(out) > self._max_body:
            raise TooLarge("body", size=len(out), limit=self._max_body, unit="bytes")
        if not inflater.eof:
            raise InvalidArgument.at("body", f"is not {encoding}: it ends too early")
        return out

    async def form(self, request: Request) -> FormData:
        """The request's multipart form. Raises InvalidArgument, TooLarge."""
        kind = request.headers.get("content-type", "")
        if not kind.lower().startswith("multipart/form-data"):
            raise InvalidArgument.at("content-type", f"is {kind!r}; multipart/form-data is needed")
        receive, limit, size = request.receive, self._max_upload, 0
        length = request.headers.get("content-length")
        if length and length.isdigit() and int(length) > limit:
            raise TooLarge("body", size=int(length), limit=limit, unit="bytes")

        async def counted() -> Any:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > limit:
                raise TooLarge("body", size=size, limit=limit, unit="bytes")
            return message

        try:
            return await Request(request.scope, counted).form(max_files=256, max_fields=64)
        except TooLarge:
            raise
        except Exception as e:
            raise InvalidArgument.at("body", f"is no multipart form: {e}") from None


async def _write(call: Any, messages: AsyncIterator[bytes]) -> None:
    """Write the messages of a stream until they or the call end.

    `call.write`, and a call that is given an iterator, put INTERNAL in place of a status that the
    server has sent before the last message (https://github.com/grpc/grpc/issues/36066): one upload in
    eight that was refused at its header was a 500. Written below it, a write that comes too late only
    ends the writing, and the call keeps the server's status.
    """
    try:
        async for message in messages:
            if not await _written(call, message):
                return
        await call.done_writing()
    except Exception:  # of the messages' source, such as a download that broke off
        log.warning("the messages of a stream ended with an error", exc_info=True)
        call.cancel()


async def _written(call: Any, message: bytes) -> bool:
    try:
        await call.wait_for_connection()
        await call._cython_call.send_serialized_message(message)
    except (aio.AioRpcError, cygrpc.InternalError):
        return False
    return True


async def unless_gone(request: Request, call: Any) -> Any:
    """The call's answer; the call is cancelled when the client leaves first.

    Whether the client is still there is looked at only once an answer takes longer than most do: two
    tasks for every call would be a good part of what a small one costs.
    """
    gone = False

    async def watch() -> None:
        nonlocal gone
        await _disconnected(request)
        gone = True
        call.cancel()

    def start() -> None:
        nonlocal watcher
        watcher = asyncio.ensure_future(watch())

    watcher: asyncio.Future[None] | None = None
    timer = asyncio.get_running_loop().call_later(WATCH_AFTER_S, start)
    try:
        return await call
    except asyncio.CancelledError:
        call.cancel()
        task = asyncio.current_task()
        if gone and not (task and task.cancelling()):
            raise ClientGone from None
        raise
    finally:
        timer.cancel()
        if watcher is not None:
            watcher.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def returned(trailers: Any) -> dict[str, str]:
    """Headers of an answer, from the call's trailing metadata."""
    return {k: v for k, v in trailers or () if isinstance(v, str) and RETURNED.fullmatch(k)}


def _printable(value: str) -> bool:
    return value.isascii() and value.isprintable()


async def with_heartbeats(
    stream: AsyncIterator[T], every_s: float, beat: Callable[[], T]
) -> AsyncIterator[T]:
    """A stream's values, and a heartbeat whenever none has come for a while."""
    source = aiter(stream)
    pending: asyncio.Future[T] | None = None
    try:
        while True:
            if pending is None:
                pending = asyncio.ensure_future(anext(source))
            done, _ = await asyncio.wait((pending,), timeout=every_s)
            if not done:
                yield beat()
                continue
            try:
                value = pending.result()
            except StopAsyncIteration:
                return
            pending = None
            yield value
    finally:
        if pending is not None:
            pending.cancel()
