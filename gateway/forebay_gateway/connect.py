"""The Connect protocol: `POST /<service>/<method>`, JSON or binary, for unary calls and server streams.

So that generated browser clients (connect-es, connect-kotlin, connect-swift) work unchanged.
Source: the protocol's reference at connectrpc.com, sections "Unary-Response", "Streaming-Response" and
"Error Codes". Messages of answers are never compressed, which every client takes.
"""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from typing import Any

import orjson
from forebay.errors import ForebayError, InvalidArgument, Unimplemented, http_error
from forebay.methods import Method, methods
from google.protobuf import json_format
from google.rpc import code_pb2, status_pb2
from grpc import aio
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from forebay_gateway import http_errors
from forebay_gateway.json_codec import parse_json, to_message
from forebay_gateway.route_table import Listed
from forebay_gateway.upstream import ClientGone, Upstream, returned

#: The protocol's own table; it differs from google.rpc's in a few places.
HTTP = {
    "CANCELLED": 499,
    "INVALID_ARGUMENT": 400,
    "DEADLINE_EXCEEDED": 504,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "PERMISSION_DENIED": 403,
    "RESOURCE_EXHAUSTED": 429,
    "FAILED_PRECONDITION": 400,
    "ABORTED": 409,
    "OUT_OF_RANGE": 400,
    "UNIMPLEMENTED": 501,
    "UNAVAILABLE": 503,
    "UNAUTHENTICATED": 401,
}


#: Content types, and whether their messages are JSON.
UNARY = {"application/json": True, "application/proto": False}
STREAM = {"application/connect+json": True, "application/connect+proto": False}
#: Flags of an envelope: its message is compressed; it is the last one, and holds no message.
COMPRESSED, END = 1, 2
#: Bytes before an envelope's message: flags, and the message's length.
PREFIX = 5


def routes(upstream: Upstream) -> list[Listed]:
    """A route per unary and per server-streaming method."""
    kinds = {"unary": _unary, "server_stream": _server_stream}
    return [
        Route(m.path, kinds[m.kind](upstream, m), methods=["POST"])
        for m in methods().values()
        if m.kind in kinds
    ]


def _unary(upstream: Upstream, method: Method) -> Any:
    async def endpoint(request: Request) -> Response:
        kind = _content_type(request)
        if kind not in UNARY:
            return _unsupported(UNARY)
        try:
            _known_encoding(request, "content-encoding", ("identity", "gzip", "deflate"))
            message = _read(method, await upstream.body(request), UNARY[kind])
            data, headers = await upstream.unary(method, request, message)
            data = _written(method, data, UNARY[kind])
        except aio.AioRpcError as e:
            return _error(http_errors.from_rpc(e), returned(e.trailing_metadata()))
        except ForebayError as e:
            return _error(e.to_status(), {})
        except ClientGone:
            return Response(status_code=499)
        except Exception:
            return _error(*http_errors.our_fault(request))
        return Response(data, media_type=kind, headers=headers)

    return endpoint


def _server_stream(upstream: Upstream, method: Method) -> Any:
    """The answer is 200 always: how the call ended is said by the last envelope."""

    async def endpoint(request: Request) -> Response:
        kind = _content_type(request)
        if kind not in STREAM:
            return _unsupported(STREAM)
        try:
            packed = _known_encoding(request, "connect-content-encoding", ("identity", "gzip"))
            body = await upstream.body(request)
            message = _read(method, _opened(upstream, body, packed), STREAM[kind])
        except ForebayError as e:
            return Response(_end(e.to_status(), {}), media_type=kind)
        except ClientGone:
            return Response(status_code=499)
        except Exception:
            return Response(_end(*http_errors.our_fault(request)), media_type=kind)
        return StreamingResponse(_envelopes(request, message, STREAM[kind]), media_type=kind)

    async def _envelopes(request: Request, message: bytes, json: bool) -> AsyncIterator[bytes]:
        call: Any = None
        status = status_pb2.Status()
        try:
            call = upstream.start(method, request.headers, message)
            async for data in call:
                yield _envelope(0, _written(method, data, json))
            headers = returned(await call.trailing_metadata())
        except aio.AioRpcError as e:
            status, headers = http_errors.from_rpc(e), returned(e.trailing_metadata())
        except ForebayError as e:
            status, headers = e.to_status(), {}
        except Exception:
            status, headers = http_errors.our_fault(request)
        finally:
            if call is not None:  # cancelled, where the client has left
                call.cancel()
        yield _end(status, headers)

    return endpoint


def _content_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _unsupported(known: dict[str, bool]) -> Response:
    return Response(status_code=415, headers={"accept-post": ", ".join(known)})


def _known_encoding(request: Request, header: str, known: tuple[str, ...]) -> str:
    """How a body is packed, as a header says. The protocol asks for UNIMPLEMENTED and the list."""
    given = request.headers.get(header, "").lower() or "identity"
    if given not in known:
        raise Unimplemented(f"{header} is {given!r:.40}; supported are {', '.join(known)}")
    return given


def _read(method: Method, body: bytes, json: bool) -> bytes:
    return to_message(method.request, parse_json(body)).SerializeToString() if json else body


def _written(method: Method, data: bytes, json: bool) -> bytes:
    """A message as it is sent; the protocol asks for protobuf's own JSON: camelCase, int64 as strings."""
    if not json:
        return data
    return json_format.MessageToJson(method.response.FromString(data), indent=None).encode()


def _envelope(flags: int, data: bytes) -> bytes:
    return bytes([flags]) + len(data).to_bytes(4, "big") + data


def _opened(upstream: Upstream, body: bytes, encoding: str) -> bytes:
    """The one message of a body. Raises InvalidArgument, Unimplemented, TooLarge."""
    end = PREFIX + int.from_bytes(body[1:PREFIX], "big")
    if not body:
        raise Unimplemented("the body has no message; a server stream takes exactly one")
    if len(body) < end:
        raise InvalidArgument.at("body", f"ends within an envelope, at byte {len(body)}")
    if body[0] & ~COMPRESSED:
        raise InvalidArgument.at(
            "body", f"has an envelope with flags {body[0]}; allowed are 0 and 1"
        )
    if len(body) > end:
        raise Unimplemented("the body has several messages; a server stream takes exactly one")
    if not body[0]:
        return body[PREFIX:]
    if encoding == "identity":
        raise InvalidArgument.at("body", "is compressed, and connect-content-encoding is not given")
    return upstream.unpacked(encoding, body[PREFIX:])


def _end(status: status_pb2.Status, headers: dict[str, str]) -> bytes:
    """The last envelope: trailers, and how the call ended."""
    out: dict[str, Any] = {}
    if status.code:
        headers = {**headers, **http_errors.headers_of(http_error(status))}
        out["error"] = _error_body(status)
    if headers:
        out["metadata"] = {name: [value] for name, value in headers.items()}
    return _envelope(END, orjson.dumps(out))


def _error_body(status: status_pb2.Status) -> dict[str, Any]:
    name = code_pb2.Code.Name(status.code)
    details = [
        {
            "type": d.type_url.rpartition("/")[2],
            "value": base64.b64encode(d.value).decode().rstrip("="),
        }
        for d in status.details
    ]
    code = "canceled" if name == "CANCELLED" else name.lower()
    return {"code": code, "message": status.message, "details": details}


def _error(status: status_pb2.Status, headers: dict[str, str]) -> Response:
    return Response(
        orjson.dumps(_error_body(status)),
        status_code=HTTP.get(code_pb2.Code.Name(status.code), 500),
        media_type="application/json",
        headers={**headers, **http_errors.headers_of(http_error(status))},
    )
