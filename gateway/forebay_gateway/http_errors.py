"""Errors on HTTP doors: the contract's table, in the OpenAI error object's shape."""

from __future__ import annotations

import logging
import math
import uuid
from typing import Any

import orjson
from forebay.errors import DeadlineExceeded, ForebayError, HttpError, Internal, http_error
from google.rpc import code_pb2, status_pb2
from grpc import aio
from starlette.requests import Request
from starlette.responses import Response

log = logging.getLogger(__name__)

DETAILS = "grpc-status-details-bin"


def from_rpc(error: aio.AioRpcError) -> status_pb2.Status:
    """The google.rpc.Status of an upstream's error."""
    for key, value in error.trailing_metadata() or ():
        if key == DETAILS and isinstance(value, bytes):
            return status_pb2.Status.FromString(value)
    code: Any = error.code()
    if code.name == "DEADLINE_EXCEEDED":  # by this side's clock, which is as good as the server's
        return DeadlineExceeded.during_call().to_status()
    text = error.details() or ""
    if code.name == "UNAVAILABLE":
        text = "the inference server cannot be reached"
    return status_pb2.Status(code=code_pb2.Code.Value(code.name), message=text)


def from_error(error: ForebayError) -> status_pb2.Status:
    """The google.rpc.Status of an error of the gateway's own."""
    return error.to_status()


def our_fault(request: Request) -> tuple[status_pb2.Status, dict[str, str]]:
    """What a door answers, and with which headers, to an error that nobody foresaw; called where it is
    caught. Nothing of the inside leaks; the log has the traceback.

    An exception that went on would be answered too, but end the connection: behind the server's HTTP
    port that one is shared, and somebody else's next request would meet its end.
    """
    given = request.headers.get("x-request-id", "")
    known = given.isascii() and given.isprintable() and 0 < len(given) <= 128
    number = given if known else uuid.uuid4().hex
    log.exception("%s %r failed; request id %s", request.method, request.scope["path"], number)
    error = Internal(f"internal error of the gateway; the log has more under request id {number}")
    return error.to_status(), {"x-request-id": number}


def error_object(status: status_pb2.Status) -> tuple[HttpError, dict[str, Any]]:
    """The error as HTTP sees it, and its JSON object."""
    e = http_error(status)
    return e, {
        "error": {
            "message": e.message,
            "type": e.type,
            "code": e.reason.lower(),
            "param": e.param,
            "details": [{"field": v.field, "description": v.description} for v in e.violations],
        }
    }


def headers_of(e: HttpError) -> dict[str, str]:
    """Retry-After in whole seconds, rounded up; the exact one beside it."""
    if e.retry_after_s is None:
        return {}
    return {
        "retry-after": str(max(1, math.ceil(e.retry_after_s))),
        "retry-after-ms": str(max(1, math.ceil(e.retry_after_s * 1000))),
    }


def response(status: status_pb2.Status, headers: dict[str, str] | None = None) -> Response:
    """The whole HTTP answer."""
    e, body = error_object(status)
    return Response(
        orjson.dumps(body),
        status_code=e.status,
        media_type="application/json",
        headers={**(headers or {}), **headers_of(e)},
    )
