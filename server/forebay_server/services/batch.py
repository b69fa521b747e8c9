"""BatchService: many requests that nobody waits for."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterator
from typing import cast

import orjson
from forebay import proto_json
from forebay.constraints import Validator
from forebay.errors import FailedPrecondition, InvalidArgument, NotFound, RateLimited, TooLarge
from forebay.errors import QuotaViolation as Quota
from forebay.settings import BatchSettings
from forebay.v1 import batch_pb2 as pb

from forebay_server.batches.runner import BatchRunner
from forebay_server.core.call import Call
from forebay_server.services.base import Service
from forebay_server.services.batch_execution import Intake
from forebay_server.services.common import check_metadata
from forebay_server.services.file import seconds
from forebay_server.services.model import timestamp
from forebay_server.services.paging import Page
from forebay_server.storage.batches import OPEN, BatchRow, ItemRow

#: Items that are stored in one transaction, by their number and their bytes.
GROUP, GROUP_BYTES = 500, 8 << 20
#: Bytes of one line of NDJSON.
MAX_LINE = 16 << 20
#: Results that are read at once.
PIECE = 100
DAY = 86400.0
_FILTERS = {
    pb.RESULT_FILTER_UNSPECIFIED: "",
    pb.RESULT_FILTER_COMPLETED: "completed",
    pb.RESULT_FILTER_FAILED: "failed",
}


class BatchService(Service):
    """See protos/forebay/v1/batch.proto."""

    name = "forebay.v1.BatchService"

    def __init__(self, runner: BatchRunner, settings: BatchSettings, validator: Validator) -> None:
        self._runner = runner
        self._store = runner.store
        self._settings = settings
        self._validator = validator

    async def create_batch(
        self, call: Call, requests: AsyncIterator[pb.CreateBatchRequest]
    ) -> pb.CreateBatchResponse:
        """CreateBatch."""
        first = await anext(requests, None)
        if first is None or first.WhichOneof("part") != "header":
            raise InvalidArgument.at("header", "must be the first message of the stream")
        row = self._row(call, first.header)
        most = self._settings.max_open_per_key
        if not await self._store.create(row, most):
            raise RateLimited(
                f"this key has {most} batches that have not ended, the limit",
                violations=[Quota(f"key:{row.key_id}", f"{most} open batches")],
                retry_after_s=60.0,
            )
        try:
            intake = Intake(row.id, self._validator)
            await self._take_all(intake, requests)
            if not intake.total:
                raise InvalidArgument.at("item", "is missing: the batch has no items")
            await self._store.seal(row.id, intake.total, intake.failed)
        except BaseException:
            await asyncio.shield(self._store.discard(row.id))
            raise
        self._runner.wake()
        return pb.CreateBatchResponse(batch=_batch(await self._get(call, row.id)))

    def _row(self, call: Call, header: pb.BatchHeader) -> BatchRow:
        check_metadata(header.metadata, "header.metadata")
        window = DAY
        if header.HasField("completion_window"):
            window = seconds(header.completion_window, "header.completion_window", 60, 30 * DAY)
        keep = None
        if header.HasField("results_expire_after"):
            where = "header.results_expire_after"
            keep = seconds(header.results_expire_after, where, 3600, 365 * DAY)
        now = self._runner.clock()
        return BatchRow(
            f"batch_{secrets.token_hex(16)}",
            call.principal.key_id,
            "receiving",
            header.SerializeToString(),
            now,
            now + window,
            results_expire_at=keep,
        )

    async def _take_all(
        self, intake: Intake, requests: AsyncIterator[pb.CreateBatchRequest]
    ) -> None:
        """Store all items, as they come."""
        group: list[ItemRow] = []
        size = 0
        lines = _Lines()

        async def store() -> None:
            nonlocal size
            if group:
                await self._store.add_items(group)
                group.clear()
                size = 0

        async def take(rows: Iterator[ItemRow]) -> None:
            nonlocal size
            for row in rows:
                if intake.total > self._settings.max_items:
                    limit = self._settings.max_items
                    raise TooLarge("item", size=intake.total, limit=limit, unit="items")
                group.append(row)
                size += len(row.item) + len(row.result or b"")
                if len(group) >= GROUP or size >= GROUP_BYTES:
                    await store()

        async for request in requests:
            part = request.WhichOneof("part")
            if part == "item":
                await take(iter((intake.take(request.item),)))
            elif part == "chunk":
                found = lines.feed(request.chunk.path, request.chunk.data)
                await take(_item(intake, line) for line in found)
            else:
                raise InvalidArgument.at("header", "may only be the first message")
        await take(_item(intake, line) for line in lines.end())
        await store()

    async def get_batch(self, call: Call) -> pb.GetBatchResponse:
        """GetBatch."""
        request = cast(pb.GetBatchRequest, call.request)
        return pb.GetBatchResponse(batch=_batch(await self._get(call, request.batch)))

    async def list_batches(self, call: Call) -> pb.ListBatchesResponse:
        """ListBatches."""
        r, key_id = cast(pb.ListBatchesRequest, call.request), call.principal.key_id
        page = Page(r, 20, float, str)
        behind = page.behind
        if r.after and not behind:
            behind = _place(await self._get(call, r.after))
        chosen, token = page.cut(await self._store.page(key_id, behind, page.size + 1), _place)
        return pb.ListBatchesResponse(batches=[_batch(x) for x in chosen], next_page_token=token)

    async def cancel_batch(self, call: Call) -> pb.CancelBatchResponse:
        """CancelBatch."""
        name = cast(pb.CancelBatchRequest, call.request).batch
        await self._get(call, name)
        now = self._runner.clock()
        open_ = ("validating", "in_progress")
        if await self._store.move(name, open_, status="cancelling", cancelling_at=now):
            self._runner.wake()
        return pb.CancelBatchResponse(batch=_batch(await self._get(call, name)))

    async def delete_batch(self, call: Call) -> pb.DeleteBatchResponse:
        """DeleteBatch."""
        row = await self._get(call, cast(pb.DeleteBatchRequest, call.request).batch)
        if row.status in OPEN:
            raise FailedPrecondition(
                f"batch {row.id} is {row.status}; cancel it first", reason="BATCH_OPEN"
            )
        await self._store.discard(row.id)
        return pb.DeleteBatchResponse()

    async def read_results(self, call: Call) -> AsyncIterator[pb.ReadResultsResponse]:
        """ReadResults."""
        request = cast(pb.ReadResultsRequest, call.request)
        row = await self._get(call, request.batch)
        status, after = _FILTERS[request.filter], -1
        while found := await self._store.results(row.id, status, after, PIECE):
            for number, data in found:
                yield pb.ReadResultsResponse(result=pb.BatchResult.FromString(data))
                after = number

    async def _get(self, call: Call, batch: str) -> BatchRow:
        row = await self._store.get(call.principal.key_id, batch)
        if row is None:
            raise NotFound("batch", batch)
        return row


class _Lines:
    """Lines of files that come in pieces."""

    def __init__(self) -> None:
        self._rest = b""
        self._path = ""

    def feed(self, path: str, data: bytes) -> list[bytes]:
        """Whole lines after one more piece. Raises TooLarge."""
        out: list[bytes] = []
        if path != self._path:
            out, self._path, self._rest = self.end(), path, b""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > MAX_LINE:
            raise TooLarge("chunk", size=len(self._rest), limit=MAX_LINE, unit="bytes in a line")
        return out + [x for x in lines if x.strip()]

    def end(self) -> list[bytes]:
        """What is left."""
        rest, self._rest = self._rest, b""
        return [rest] if rest.strip() else []


def _item(intake: Intake, line: bytes) -> ItemRow:
    """The item of a line of NDJSON; a line that is none fails alone."""
    item = pb.BatchItem()
    try:
        proto_json.parse(orjson.loads(line), item)
    except (ValueError, InvalidArgument) as e:
        number = intake.total + 1
        return intake.unreadable(InvalidArgument.at(f"line {number}", f"is no item: {e}"[:500]))
    return intake.take(item)


def _place(row: BatchRow) -> tuple[float, str]:
    return row.created_at, row.id


def _batch(row: BatchRow) -> pb.Batch:
    header = pb.BatchHeader.FromString(row.header)
    out = pb.Batch(
        id=row.id,
        status=cast(pb.BatchStatus, pb.BatchStatus.Value(f"BATCH_STATUS_{row.status.upper()}")),
        metadata=header.metadata,
        input_file=header.input_file,
        endpoint=header.endpoint,
        created_at=timestamp(row.created_at),
        expires_at=timestamp(row.expires_at),
    )
    out.counts.total, out.counts.completed, out.counts.failed = row.total, row.completed, row.failed
    out.completion_window.FromNanoseconds(round((row.expires_at - row.created_at) * 1e3) * 10**6)
    u = out.usage
    u.prompt_tokens, u.completion_tokens = row.prompt_tokens, row.completion_tokens
    u.cached_tokens, u.reasoning_tokens = row.cached_tokens, row.reasoning_tokens
    for name in ("in_progress_at", "finalizing_at", "cancelling_at", "ended_at"):
        at = getattr(row, name)
        if at is not None:
            getattr(out, name).CopyFrom(timestamp(at))
    if row.ended_at is not None and row.results_expire_at is not None:
        out.results_expire_at.CopyFrom(timestamp(row.results_expire_at))
    return out
