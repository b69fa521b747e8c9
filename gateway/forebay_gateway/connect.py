"""The Connect protocol for unary calls: `POST /<service>/<method>`, JSON or binary.

So that generated browser clients (connect-es, connect-kotlin, connect-swift) work unchanged.
Source: the protocol's reference at connectrpc.com, sections "Unary-Response" and "Error Codes".
"""

from __future__ import annotations

import base64
from typing import Any

import orjson
from forebay.errors import ForebayError, http_error
from forebay.methods import Method, methods
from google.protobuf import json_format
from google.rpc import code_pb2, status_pb2
from grpc import aio
from starlette.requests import Request
from starlette.responses import Response
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


def routes(upstream: Upstream) -> list[Listed]:
    """A route per unary method."""
    return [
        Route(m.path, _endpoint(upstream, m), methods=["POST"])
        for m in methods().values()
        if m.kind == "unary"
    ]


def _endpoint(upstream: Upstream, method: Method) -> Any:
    async def endpoint(request: Request) -> Response:
        kind = request.headers.get("content-type", "").partition(";")[0].strip()
        try:
            body = await upstream.body(request)
            if kind == "application/proto":
                message = body
            elif kind == "application/json":
                message = to_message(method.request, parse_json(body)).SerializeToString()
            else:
                return Response(
                    status_code=415, headers={"accept-post": "application/json, application/proto"}
                )
            data, headers = await upstream.unary(method, request, message)
            if kind == "application/json":
                # The protocol asks for protobuf's own JSON mapping: camelCase, int64 as strings.
                answer = method.response.FromString(data)
                data = json_format.MessageToJson(answer, indent=None).encode()
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


def _error(status: status_pb2.Status, headers: dict[str, str]) -> Response:
    name = code_pb2.Code.Name(status.code)
    details = [
        {
            "type": d.type_url.rpartition("/")[2],
            "value": base64.b64encode(d.value).decode().rstrip("="),
        }
        for d in status.details
    ]
    code = "canceled" if name == "CANCELLED" else name.lower()
    body = {"code": code, "message": status.message, "details": details}
    return Response(
        orjson.dumps(body),
        status_code=HTTP.get(name, 500),
        media_type="application/json",
        headers={**headers, **http_errors.headers_of(http_error(status))},
    )
