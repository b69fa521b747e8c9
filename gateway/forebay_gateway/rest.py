"""REST from the contract: one route per annotated method, by its kind.

unary: JSON in, JSON out. Server stream: SSE, or NDJSON by Accept. Client stream: multipart, whose
form fields are the header message and whose files are sent as chunks. Bidirectional: WebSocket.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from typing import Any, cast
from urllib.parse import quote

import orjson
from forebay.errors import ForebayError, InvalidArgument
from forebay.methods import Method
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.rpc import status_pb2
from grpc import aio
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from forebay_gateway import http_errors
from forebay_gateway.contract import Binding, bindings
from forebay_gateway.json_codec import parse_json, response_json, to_message
from forebay_gateway.route_table import Listed
from forebay_gateway.upstream import ClientGone, Upstream, returned, with_heartbeats

HEARTBEAT_S = 10.0
#: Bytes of a file per message of an upload.
CHUNK = 256 << 10
#: Messages whose JSON is a string.
_TEXTS = ("google.protobuf.Duration", "google.protobuf.Timestamp")
Rename = Callable[[status_pb2.Status], status_pb2.Status]
Endpoint = Callable[[Request], Awaitable[Response]]


def routes(upstream: Upstream) -> list[Listed]:
    """All routes of the contract."""
    out: list[Listed] = []
    for binding in bindings():
        if binding.method.kind == "bidi_stream":
            out.append(WebSocketRoute(binding.path, websocket(upstream, binding)))
            continue
        kinds = {"unary": unary, "server_stream": server_stream, "client_stream": upload}
        endpoint = guarded(kinds[binding.method.kind](upstream, binding))
        out.append(Route(binding.path, endpoint, methods=[binding.verb]))
    return out


def guarded(endpoint: Endpoint, rename: Rename = lambda s: s) -> Endpoint:
    """Errors of every kind become the contract's error object.

    `rename` puts the contract's field paths into the words of a door whose shape is somebody else's. An
    endpoint that has read which of several words the caller used puts its own into
    `request.state.rename`.
    """

    async def run(request: Request) -> Response:
        try:
            return await endpoint(request)
        except aio.AioRpcError as e:
            headers = returned(e.trailing_metadata())
            words: Rename = getattr(request.state, "rename", rename)
            return http_errors.response(words(http_errors.from_rpc(e)), headers)
        except ForebayError as e:
            return http_errors.response(http_errors.from_error(e))
        except ClientGone:
            return Response(status_code=499)
        except Exception:
            return http_errors.response(*http_errors.our_fault(request))

    return run


def unary(upstream: Upstream, binding: Binding) -> Endpoint:
    """JSON in, JSON out."""
    method = binding.method

    async def endpoint(request: Request) -> Response:
        message = await read(upstream, binding, request)
        data, headers = await upstream.unary(method, request, message.SerializeToString())
        return Response(
            response_json(method.response, data), media_type="application/json", headers=headers
        )

    return endpoint


async def read(upstream: Upstream, binding: Binding, request: Request) -> Message:
    """The request message: the body or the query, then what the path says."""
    data: dict[str, Any] = {}
    if binding.body:
        body = await upstream.body(request)  # all of it first: else the refusal races with it
        _no_query(request, "body")
        data = parse_json(body)
    elif request.query_params:
        data = _from_query(binding.method, request)
    return with_places(binding.method, data, request.path_params)


def with_places(method: Method, data: dict[str, Any], places: Mapping[str, str]) -> Message:
    """The request message of a body and its path. Raises InvalidArgument."""
    known = cast(Any, method.request.DESCRIPTOR).fields_by_name
    for name, value in places.items():
        for own in (name, known[name].json_name):
            given = data.pop(own, None)
            if given not in (None, "", value):
                raise InvalidArgument.at(own, f"is {given!r} in the body and {value!r} in the path")
        data[name] = value
    return to_message(method.request, data)


def _no_query(request: HTTPConnection, place: str) -> None:
    """Refuse parameters where fields are read from another place: they would be passed over."""
    for name in request.query_params:
        raise InvalidArgument.at(
            name,
            f"is a query parameter; this method has none, and reads its fields from the {place}",
        )


def _from_query(method: Method, request: Request) -> dict[str, Any]:
    fields = cast(Any, method.request.DESCRIPTOR).fields
    by_name = _by_name(fields)
    out: dict[str, Any] = {}
    for name in request.query_params:
        field = by_name.get(name)
        if field is None:
            known = ", ".join(f.name for f in fields) or "none"
            raise InvalidArgument.at(name, f"is no parameter of this method; known are {known}")
        _once(field, name, out)
        values = request.query_params.getlist(name)
        if field.message_type is not None:
            raise InvalidArgument.at(name, "cannot be given in the query")
        if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
            values = [_boolean(name, v) for v in values]
        out[name] = values if field.is_repeated else values[-1]
    return out


def _by_name(fields: Iterable[FieldDescriptor]) -> dict[str, FieldDescriptor]:
    """Fields by the contract's names and by protobuf's own for JSON, as bodies have them."""
    return {name: f for f in fields for name in (f.name, f.json_name)}


def _once(field: FieldDescriptor, name: str, given: Mapping[str, Any]) -> None:
    for other in (field.name, field.json_name):
        if other != name and other in given:
            raise InvalidArgument.at(name, f"is given beside {other}; one of them is allowed")


def _boolean(name: str, text: str) -> bool:
    if text not in ("true", "false"):
        raise InvalidArgument.at(name, f"is {text!r:.40}; allowed are true and false")
    return text == "true"


def server_stream(upstream: Upstream, binding: Binding) -> Endpoint:
    """SSE or NDJSON. The first message is read before 200 is said."""
    method = binding.method

    async def endpoint(request: Request) -> Response:
        message = await read(upstream, binding, request)
        call, stream, first = await upstream.stream(method, request, message.SerializeToString())
        if method.content_type:
            return raw(request, call, stream, first, method)
        ndjson = "application/x-ndjson" in request.headers.get("accept", "")

        async def body() -> AsyncIterator[bytes]:
            try:
                if first is not None:
                    yield frame(response_json(method.response, first), ndjson)
                async for part in with_heartbeats(stream, HEARTBEAT_S, lambda: b""):
                    if part:
                        yield frame(response_json(method.response, part), ndjson)
                    else:
                        yield b"\n" if ndjson else b": heartbeat\n\n"
            except aio.AioRpcError as e:
                _, error = http_errors.error_object(http_errors.from_rpc(e))
                text = orjson.dumps(error)
                yield text + b"\n" if ndjson else b"event: error\ndata: " + text + b"\n\n"
            finally:
                call.cancel()

        kind = "application/x-ndjson" if ndjson else "text/event-stream"
        return streamed(request, call, body(), kind, {"cache-control": "no-cache"})

    return endpoint


def streamed(
    request: Request, call: Any, body: AsyncIterator[bytes], kind: str, headers: dict[str, str]
) -> Response:
    """The answer with a call's stream as its body. That to HEAD is over at once: it has no body, and
    the next request on the connection waits for its end."""
    if request.method == "HEAD":
        call.cancel()
        return Response(media_type=kind, headers=headers)
    return StreamingResponse(body, media_type=kind, headers=headers)


def raw(
    request: Request,
    call: Any,
    stream: AsyncIterator[bytes],
    first: bytes | None,
    method: Method,
    name: str = "",
) -> Response:
    """The bytes of a stream's `data` fields. An error in the middle breaks the connection off: the
    body has no length that it could be taken for whole by."""

    async def body() -> AsyncIterator[bytes]:
        part = first
        try:
            while part is not None:
                yield cast(Any, method.response.FromString(part)).data
                part = await anext(stream, None)
        finally:
            call.cancel()

    headers = {
        "content-disposition": f"attachment; filename*=UTF-8''{quote(name)}"
        if name
        else "attachment",
        # A caller's file is never a page of ours.
        "x-content-type-options": "nosniff",
    }
    return streamed(request, call, body(), method.content_type, headers)


def frame(text: bytes, ndjson: bool) -> bytes:
    """One message of a stream."""
    return text + b"\n" if ndjson else b"data: " + text + b"\n\n"


def upload(upstream: Upstream, binding: Binding) -> Endpoint:
    """Multipart: the form's fields are the header message, its files follow as chunks."""
    method = binding.method
    parts = cast(Any, method.request.DESCRIPTOR).fields_by_name
    header_fields = parts["header"].message_type.fields
    by_name = _by_name(header_fields)
    header_kind = type(cast(Any, method.request()).header)

    async def endpoint(request: Request) -> Response:
        form = await upstream.form(request)
        try:
            _no_query(request, "form")
            header: dict[str, Any] = {}
            files = []
            for name, value in form.multi_items():
                if isinstance(value, str):
                    if name not in by_name:
                        known = ", ".join(f.name for f in header_fields)
                        raise InvalidArgument.at(
                            name, f"is no field of this upload; known are {known}"
                        )
                    _once(by_name[name], name, header)
                    header[name] = _form_value(by_name[name], name, value)
                else:
                    files.append((value.filename or name, value))
            first = method.request(header=to_message(header_kind, header)).SerializeToString()

            async def messages() -> AsyncIterator[bytes]:
                yield first
                for path, file in files:
                    while data := await file.read(CHUNK):
                        part = method.request(chunk={"path": path, "data": data})
                        yield part.SerializeToString()

            data, headers = await upstream.upload(method, request, messages())
            return Response(
                response_json(method.response, data), media_type="application/json", headers=headers
            )
        finally:
            await form.close()

    return endpoint


def _form_value(field: FieldDescriptor, name: str, text: str) -> Any:
    """A form field as JSON has it; messages are written as JSON objects."""
    if field.message_type is not None:
        if field.message_type.full_name in _TEXTS:
            return text
        try:
            return parse_json(text.encode())
        except InvalidArgument as e:
            raise InvalidArgument.at(name, e.violations[0].description) from None
    return _boolean(name, text) if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL else text


def websocket(upstream: Upstream, binding: Binding) -> Callable[[WebSocket], Awaitable[None]]:
    """JSON messages both ways; an error is a last message with `error`, then a close."""
    method = binding.method

    async def endpoint(socket: WebSocket) -> None:
        await socket.accept()
        fault: list[ForebayError] = []

        async def requests() -> AsyncIterator[bytes]:
            while True:
                frame = await socket.receive()
                if frame["type"] == "websocket.disconnect":
                    return
                text = frame.get("text")
                if text is None:
                    fault.append(InvalidArgument.at("frame", "is binary; JSON in text is needed"))
                    return
                if not text.strip():  # an empty message is the client's half-close
                    return
                try:
                    yield to_message(method.request, parse_json(text.encode())).SerializeToString()
                except ForebayError as e:
                    fault.append(e)
                    return

        call: Any = None
        try:
            _no_query(socket, "messages")
            call = upstream.start(method, socket.headers, requests())
            async for data in call:
                await socket.send_text(response_json(method.response, data).decode())
            if fault:
                raise fault[0]
            await socket.close(1000)
        except (aio.AioRpcError, ForebayError) as e:
            status = http_errors.from_rpc(e) if isinstance(e, aio.AioRpcError) else e.to_status()
            _, body = http_errors.error_object(status)
            await _close(socket, body)
        except (WebSocketDisconnect, RuntimeError):
            return
        finally:
            if call is not None:
                call.cancel()

    return endpoint


async def _close(socket: WebSocket, body: dict[str, Any]) -> None:
    try:
        await socket.send_text(orjson.dumps(body).decode())
        # A reason has 123 bytes at most.
        await socket.close(1011, body["error"]["message"].encode()[:120].decode(errors="ignore"))
    except (WebSocketDisconnect, RuntimeError):
        return
