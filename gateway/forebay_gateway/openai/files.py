"""/v1/files: FileService in OpenAI's shape, and batches' results as files.

A batch's output and error file are not stored: they are the batch's results, written in OpenAI's
shape as they are read. Their ids say whose they are: `file-<batch>-output`, `file-<batch>-errors`.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Any

from forebay.errors import FailedPrecondition, InvalidArgument
from forebay.methods import methods
from forebay.v1 import batch_pb2, file_pb2
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import Response

from forebay_gateway import rest
from forebay_gateway.json_codec import dumps
from forebay_gateway.openai import batch_lines, fields
from forebay_gateway.upstream import Upstream

_SERVICE = "/forebay.v1.FileService/"
UPLOAD, GET, LIST, DELETE, DOWNLOAD = (
    methods()[_SERVICE + n]
    for n in ("UploadFile", "GetFile", "ListFiles", "DeleteFile", "DownloadFile")
)
GET_BATCH = methods()["/forebay.v1.BatchService/GetBatch"]
RESULTS = methods()["/forebay.v1.BatchService/ReadResults"]
PURPOSES = ("assistants", "batch", "fine-tune", "vision", "user_data", "evals")
_RESULTS = re.compile(r"file-(batch_[0-9a-f]{32})-(output|errors)")
_FILTERS = {
    "output": batch_pb2.RESULT_FILTER_COMPLETED,
    "errors": batch_pb2.RESULT_FILTER_FAILED,
}


def results_file(batch: str, kind: str) -> str:
    """Id of the file that a batch's results make: `output` or `errors`."""
    return f"file-{batch}-{kind}"


def upload_endpoint(upstream: Upstream) -> Any:
    """POST /v1/files."""

    async def upload(request: Request) -> Response:
        form = await upstream.form(request)
        try:
            file, header = _form(form.multi_items())

            async def messages() -> AsyncIterator[bytes]:
                yield file_pb2.UploadFileRequest(header=header).SerializeToString()
                path, empty = file.filename or "file", True
                while (data := await file.read(rest.CHUNK)) or empty:
                    empty = False
                    part = file_pb2.UploadFileRequest(chunk={"path": path, "data": data})
                    yield part.SerializeToString()

            data, headers = await upstream.upload(UPLOAD, request, messages())
        finally:
            await form.close()
        out = _object(file_pb2.UploadFileResponse.FromString(data).file)
        return Response(dumps(out), media_type="application/json", headers=headers)

    return upload


def _form(parts: list[tuple[str, Any]]) -> tuple[UploadFile, file_pb2.UploadFileHeader]:
    header = file_pb2.UploadFileHeader()
    file: UploadFile | None = None
    for name, value in parts:
        if name == "file" and isinstance(value, UploadFile):
            file = value
        elif name == "purpose" and value in PURPOSES:
            header.purpose = value
        elif name == "purpose":
            raise InvalidArgument.at(
                "purpose", f"is {value!r:.40}; allowed are {', '.join(PURPOSES)}"
            )
        elif name == "expires_after[anchor]" and value == "created_at":
            continue
        elif name == "expires_after[seconds]" and str(value).isdigit() and len(value) < 12:
            header.expires_after.FromSeconds(int(value))
        else:
            raise InvalidArgument.at(
                name, "is not supported here; supported are file, purpose, expires_after"
            )
    if file is None:
        raise InvalidArgument.at("file", "is required")
    if not header.purpose:
        raise InvalidArgument.at("purpose", "is required")
    return file, header


def _object(file: file_pb2.File) -> dict[str, Any]:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.size_bytes,
        "created_at": file.created_at.seconds,
        "expires_at": file.expires_at.seconds if file.HasField("expires_at") else None,
        "filename": file.name,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
    }


def list_endpoint(upstream: Upstream) -> Any:
    """GET /v1/files."""

    async def list_files(request: Request) -> Response:
        query = fields.query(request, ("purpose", "limit", "order", "after"))
        message = file_pb2.ListFilesRequest(
            purpose=query.get("purpose", ""),
            oldest_first=fields.order(query),
            page_size=fields.limit(query, 10_000, 10_000),
            after=query.get("after", ""),
        )
        data, headers = await upstream.unary(LIST, request, message.SerializeToString())
        page = file_pb2.ListFilesResponse.FromString(data)
        out = fields.listed([_object(f) for f in page.files], bool(page.next_page_token))
        return Response(dumps(out), media_type="application/json", headers=headers)

    return list_files


def get_endpoint(upstream: Upstream) -> Any:
    """GET /v1/files/{file}."""

    async def get(request: Request) -> Response:
        name = request.path_params["file"]
        match = _RESULTS.fullmatch(name)
        if match is not None:
            out = await _results_object(upstream, request, name, match[1], match[2])
            return Response(dumps(out), media_type="application/json")
        message = file_pb2.GetFileRequest(file=name)
        data, headers = await upstream.unary(GET, request, message.SerializeToString())
        out = _object(file_pb2.GetFileResponse.FromString(data).file)
        return Response(dumps(out), media_type="application/json", headers=headers)

    return get


async def _results_object(
    upstream: Upstream, request: Request, name: str, batch: str, kind: str
) -> dict[str, Any]:
    message = batch_pb2.GetBatchRequest(batch=batch)
    data, _ = await upstream.unary(GET_BATCH, request, message.SerializeToString())
    found = batch_pb2.GetBatchResponse.FromString(data).batch
    size = 0  # it has one only when it is written
    async for line in _lines(*await _results(upstream, request, batch, kind)):
        size += len(line)
    expires = found.HasField("results_expire_at")
    return {
        "id": name,
        "object": "file",
        "bytes": size,
        "created_at": (found.ended_at if found.HasField("ended_at") else found.created_at).seconds,
        "expires_at": found.results_expire_at.seconds if expires else None,
        "filename": f"{batch}_{kind}.jsonl",
        "purpose": "batch_output",
        "status": "processed",
        "status_details": None,
    }


async def _results(
    upstream: Upstream, request: Request, batch: str, kind: str
) -> tuple[Any, AsyncIterator[bytes], bytes | None]:
    """The stream of a batch's results, begun."""
    message = batch_pb2.ReadResultsRequest(batch=batch, filter=_FILTERS[kind])
    return await upstream.stream(RESULTS, request, message.SerializeToString())


async def _lines(
    call: Any, results: AsyncIterator[bytes], first: bytes | None
) -> AsyncIterator[bytes]:
    part = first
    try:
        while part is not None:
            yield batch_lines.line(batch_pb2.ReadResultsResponse.FromString(part).result)
            part = await anext(results, None)
    finally:
        call.cancel()


def content_endpoint(upstream: Upstream) -> Any:
    """GET /v1/files/{file}/content."""

    async def content(request: Request) -> Response:
        name = request.path_params["file"]
        match = _RESULTS.fullmatch(name)
        if match is not None:
            begun = await _results(upstream, request, match[1], match[2])
            headers = {"x-content-type-options": "nosniff"}
            return rest.streamed(request, begun[0], _lines(*begun), "application/jsonl", headers)
        message = file_pb2.GetFileRequest(file=name)
        data, _ = await upstream.unary(GET, request, message.SerializeToString())
        file = file_pb2.GetFileResponse.FromString(data).file
        ask = file_pb2.DownloadFileRequest(file=name).SerializeToString()
        begun = await upstream.stream(DOWNLOAD, request, ask)
        return rest.raw(request, *begun, DOWNLOAD, file.name)

    return content


def delete_endpoint(upstream: Upstream) -> Any:
    """DELETE /v1/files/{file}."""

    async def delete(request: Request) -> Response:
        name = request.path_params["file"]
        if _RESULTS.fullmatch(name):
            raise FailedPrecondition(
                f"{name} is a batch's results, which go with the batch: "
                "DELETE /api/v1/batches/{batch}",
                reason="BATCH_RESULTS",
            )
        message = file_pb2.DeleteFileRequest(file=name)
        _, headers = await upstream.unary(DELETE, request, message.SerializeToString())
        out = {"id": name, "object": "file", "deleted": True}
        return Response(dumps(out), media_type="application/json", headers=headers)

    return delete
