"""/v1/batches: BatchService in OpenAI's shape. The lines of files are in batch_lines.py."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from forebay.errors import InvalidArgument
from forebay.methods import methods
from forebay.v1 import batch_pb2 as pb
from forebay.v1 import file_pb2
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import status_pb2
from starlette.requests import Request
from starlette.responses import Response

from forebay_gateway.json_codec import dumps, parse_json
from forebay_gateway.openai import batch_lines, fields, files, generation
from forebay_gateway.upstream import Upstream

_SERVICE = "/forebay.v1.BatchService/"
CREATE, GET, LIST, CANCEL = (
    methods()[_SERVICE + n] for n in ("CreateBatch", "GetBatch", "ListBatches", "CancelBatch")
)
KNOWN = (
    "input_file_id",
    "endpoint",
    "completion_window",
    "metadata",
    "output_expires_after",
)
UNITS = {"m": 60, "h": 3600, "d": 86400}
STATUS = {
    number: name.removeprefix("BATCH_STATUS_").lower() for name, number in pb.BatchStatus.items()
}
#: The contract's paths in OpenAI's words.
_PATHS = (
    ("header.results_expire_after", "output_expires_after.seconds"),
    ("header.", ""),
    ("item", "input_file_id"),
)


def renamed(status: status_pb2.Status) -> status_pb2.Status:
    """The status with the contract's field paths in this door's words."""
    return generation.renamed(status, _PATHS)


def endpoint(upstream: Upstream) -> Any:
    """POST /v1/batches."""

    async def create(request: Request) -> Response:
        body = parse_json(await upstream.body(request))
        header = _header(body)
        ask = file_pb2.DownloadFileRequest(file=header.input_file).SerializeToString()
        # A file that is not there is an error of its own.
        download, pieces, first = await upstream.stream(files.DOWNLOAD, request, ask)

        async def contents() -> AsyncIterator[bytes]:
            data = first
            while data is not None:
                yield file_pb2.DownloadFileResponse.FromString(data).data
                data = await anext(pieces, None)

        async def messages() -> AsyncIterator[bytes]:
            yield pb.CreateBatchRequest(header=header).SerializeToString()
            number = 0
            async for line in batch_lines.split(contents()):
                number += 1
                item = batch_lines.read(line, number, header.endpoint)
                yield pb.CreateBatchRequest(item=item).SerializeToString()

        try:
            data, headers = await upstream.upload(CREATE, request, messages())
        finally:
            download.cancel()
        out = _object(pb.CreateBatchResponse.FromString(data).batch)
        return Response(dumps(out), media_type="application/json", headers=headers)

    return create


def _header(body: dict[str, Any]) -> pb.BatchHeader:
    fields.only(body, KNOWN)
    where = fields.text(body, "endpoint")
    if where not in batch_lines.ENDPOINTS:
        known = ", ".join(batch_lines.ENDPOINTS)
        raise InvalidArgument.at("endpoint", f"is {where!r:.60}; supported are {known}")
    header = pb.BatchHeader(
        input_file=fields.text(body, "input_file_id"),
        endpoint=where,
        metadata=fields.metadata(body),
    )
    header.completion_window.FromSeconds(_window(fields.text(body, "completion_window")))
    expiry = body.get("output_expires_after")
    if expiry is not None:
        if not isinstance(expiry, dict) or expiry.get("anchor") != "created_at":
            raise InvalidArgument.at("output_expires_after.anchor", "allowed is created_at")
        header.results_expire_after.FromSeconds(fields.number(expiry, "seconds") or 0)
    return header


def _window(text: str) -> int:
    number, unit = text[:-1], text[-1:]
    if not number.isascii() or not number.isdigit() or len(number) > 6 or unit not in UNITS:
        raise InvalidArgument.at(
            "completion_window", f"is {text!r:.20}; a number and m, h or d is needed: 24h"
        )
    return int(number) * UNITS[unit]


def get_endpoint(upstream: Upstream) -> Any:
    """GET /v1/batches/{batch}."""

    async def get(request: Request) -> Response:
        message = pb.GetBatchRequest(batch=request.path_params["batch"])
        data, headers = await upstream.unary(GET, request, message.SerializeToString())
        out = _object(pb.GetBatchResponse.FromString(data).batch)
        return Response(dumps(out), media_type="application/json", headers=headers)

    return get


def list_endpoint(upstream: Upstream) -> Any:
    """GET /v1/batches."""

    async def list_batches(request: Request) -> Response:
        query = fields.query(request, ("limit", "after"))
        message = pb.ListBatchesRequest(
            page_size=fields.limit(query, 100), after=query.get("after", "")
        )
        data, headers = await upstream.unary(LIST, request, message.SerializeToString())
        page = pb.ListBatchesResponse.FromString(data)
        out = fields.listed([_object(b) for b in page.batches], bool(page.next_page_token))
        return Response(dumps(out), media_type="application/json", headers=headers)

    return list_batches


def cancel_endpoint(upstream: Upstream) -> Any:
    """POST /v1/batches/{batch}/cancel."""

    async def cancel(request: Request) -> Response:
        message = pb.CancelBatchRequest(batch=request.path_params["batch"])
        data, headers = await upstream.unary(CANCEL, request, message.SerializeToString())
        out = _object(pb.CancelBatchResponse.FromString(data).batch)
        return Response(dumps(out), media_type="application/json", headers=headers)

    return cancel


def _object(batch: pb.Batch) -> dict[str, Any]:
    status, counts = STATUS[batch.status], batch.counts
    ended = _seconds(batch, "ended_at")
    over = ended is not None
    failed = batch.status == pb.BATCH_STATUS_FAILED
    error = {
        "code": "key_inactive",
        "message": "the batch's key was revoked or has expired",
        "line": None,
        "param": None,
    }
    u = batch.usage
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "errors": {"object": "list", "data": [error]} if failed else None,
        "input_file_id": batch.input_file,
        "completion_window": _shown(batch.completion_window.seconds),
        "status": status,
        "output_file_id": files.results_file(batch.id, "output")
        if over and counts.completed
        else None,
        "error_file_id": files.results_file(batch.id, "errors") if over and counts.failed else None,
        "created_at": batch.created_at.seconds,
        "in_progress_at": _seconds(batch, "in_progress_at"),
        "expires_at": batch.expires_at.seconds,
        "finalizing_at": _seconds(batch, "finalizing_at"),
        "completed_at": ended if status == "completed" else None,
        "failed_at": ended if failed else None,
        "expired_at": ended if status == "expired" else None,
        "cancelling_at": _seconds(batch, "cancelling_at"),
        "cancelled_at": ended if status == "cancelled" else None,
        "request_counts": {
            "total": counts.total,
            "completed": counts.completed,
            "failed": counts.failed,
        },
        "usage": {
            "input_tokens": u.prompt_tokens,
            "input_tokens_details": {"cached_tokens": u.cached_tokens},
            "output_tokens": u.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": u.reasoning_tokens},
            "total_tokens": u.prompt_tokens + u.completion_tokens,
        },
        "metadata": dict(batch.metadata),
    }


def _seconds(batch: pb.Batch, name: str) -> int | None:
    at: Timestamp = getattr(batch, name)
    return at.seconds if batch.HasField(name) else None


def _shown(seconds: int) -> str:
    return f"{seconds // 3600}h" if seconds % 3600 == 0 else f"{seconds // 60}m"
