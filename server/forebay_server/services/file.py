"""FileService: callers' files."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import cast

from forebay.errors import InvalidArgument
from forebay.v1 import file_pb2 as pb
from google.protobuf.duration_pb2 import Duration

from forebay_server.core.call import Call
from forebay_server.files.library import FileLibrary, Upload
from forebay_server.services.base import Service
from forebay_server.services.model import timestamp
from forebay_server.services.paging import Page
from forebay_server.storage.files import FileRow


class FileService(Service):
    """See protos/forebay/v1/file.proto."""

    name = "forebay.v1.FileService"

    def __init__(self, library: FileLibrary) -> None:
        self._library = library

    async def upload_file(
        self, call: Call, requests: AsyncIterator[pb.UploadFileRequest]
    ) -> pb.UploadFileResponse:
        """UploadFile."""
        first = await anext(requests, None)
        if first is None or first.WhichOneof("part") != "header":
            raise InvalidArgument.at("header", "must be the first message of the stream")
        header = first.header
        keep_s = None
        if header.HasField("expires_after"):
            keep_s = seconds(header.expires_after, "header.expires_after", 3600, 10 * 365 * 86400)
        upload: Upload | None = None
        name = ""
        try:
            async for request in requests:
                if request.WhichOneof("part") != "chunk":
                    raise InvalidArgument.at("chunk", "must be every message after the first")
                if upload is None:
                    name = request.chunk.path
                    if not name.isprintable():
                        raise InvalidArgument.at("chunk.path", "has characters that are no text")
                    upload = await self._library.upload(call.principal.key_id)
                elif request.chunk.path != name:
                    raise InvalidArgument.at("chunk.path", "names a second file; one is taken")
                await asyncio.to_thread(upload.write, request.chunk.data)
            if upload is None:
                raise InvalidArgument.at("chunk", "is missing: the upload has no file")
            row = await self._library.add(
                call.principal.key_id, upload, name, header.purpose or "user_data", keep_s
            )
        except BaseException:
            if upload is not None:
                upload.abort()
            raise
        return pb.UploadFileResponse(file=_file(row))

    async def get_file(self, call: Call) -> pb.GetFileResponse:
        """GetFile."""
        request = cast(pb.GetFileRequest, call.request)
        row = await self._library.get(call.principal.key_id, request.file)
        return pb.GetFileResponse(file=_file(row))

    async def list_files(self, call: Call) -> pb.ListFilesResponse:
        """ListFiles."""
        r = cast(pb.ListFilesRequest, call.request)
        key_id, page = call.principal.key_id, Page(r, 100, float, str)
        behind = page.behind
        if r.after and not behind:
            behind = _place(await self._library.get(key_id, r.after))
        rows = await self._library.page(key_id, r.purpose, r.oldest_first, behind, page.size + 1)
        chosen, token = page.cut(rows, _place)
        return pb.ListFilesResponse(files=[_file(x) for x in chosen], next_page_token=token)

    async def delete_file(self, call: Call) -> pb.DeleteFileResponse:
        """DeleteFile."""
        request = cast(pb.DeleteFileRequest, call.request)
        await self._library.delete(call.principal.key_id, request.file)
        return pb.DeleteFileResponse()

    async def download_file(self, call: Call) -> AsyncIterator[pb.DownloadFileResponse]:
        """DownloadFile."""
        request = cast(pb.DownloadFileRequest, call.request)
        row = await self._library.get(call.principal.key_id, request.file)
        async with aclosing(self._library.read(row)) as pieces:
            async for data in pieces:
                yield pb.DownloadFileResponse(data=data)


def seconds(value: Duration, path: str, low: float, high: float) -> float:
    """A duration within bounds. Raises InvalidArgument."""
    out = value.seconds + value.nanos / 1e9
    if not low <= out <= high:
        raise InvalidArgument.at(path, f"is {out:g} s; allowed is from {low:g} to {high:g} s")
    return out


def _place(row: FileRow) -> tuple[float, str]:
    return row.created_at, row.id


def _file(row: FileRow) -> pb.File:
    out = pb.File(
        id=row.id,
        name=row.name,
        purpose=row.purpose,
        size_bytes=row.size_bytes,
        sha256=row.sha256,
        created_at=timestamp(row.created_at),
    )
    if row.expires_at is not None:
        out.expires_at.CopyFrom(timestamp(row.expires_at))
    return out
