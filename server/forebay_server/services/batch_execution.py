"""Items of batches as calls of the services that serve them, and what comes of them as results."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from forebay.constraints import Validator
from forebay.errors import ForebayError, InvalidArgument
from forebay.methods import methods
from forebay.v1 import batch_pb2 as pb
from forebay.v1 import embedding_pb2, generation_pb2

from forebay_server.access.deferred import DeferredWork
from forebay_server.batches.runner import Executed
from forebay_server.core.call import Call
from forebay_server.services.embedding import EMBED, EmbeddingService
from forebay_server.services.generation import GenerationService
from forebay_server.services.model import timestamp
from forebay_server.storage.batches import BatchRow, ItemRow

METHODS = {
    "chat": methods()["/forebay.v1.GenerationService/Chat"],
    "complete": methods()["/forebay.v1.GenerationService/Complete"],
    "embed": methods()[EMBED],
}
MAX_NAME, MAX_NOTE = 512, 1000


class BatchExecution:
    """See batches.runner.Executor."""

    def __init__(self, generation: GenerationService, embedding: EmbeddingService) -> None:
        self._generation = generation
        self._embedding = embedding

    async def call(self, work: DeferredWork, row: BatchRow, item: ItemRow) -> Call:
        """The call that an item becomes."""
        request = pb.BatchItem.FromString(item.item)
        kind = request.WhichOneof("request")
        assert kind in METHODS  # others had their result when they were stored
        loop, done = asyncio.get_running_loop(), asyncio.Event()

        def ended(_: Call) -> None:
            loop.call_soon_threadsafe(done.set)

        call = await work.call(METHODS[kind], row.key_id, request_id(item), ended)
        call.background = True
        call.request = getattr(request, kind)
        call.origin = done
        return call

    async def run(self, call: Call, item: ItemRow) -> Executed:
        """Run an item to its answer."""
        name = call.method.name
        result = _result(item)
        if name == "Chat":
            result.chat.CopyFrom(await self._generation.chat(call))
            return _good(result, result.chat.generation_usage)
        if name == "Complete":
            result.complete.CopyFrom(await self._generation.complete(call))
            return _good(result, result.complete.generation_usage)
        result.embed.CopyFrom(await self._embed(call))
        tokens = generation_pb2.GenerationUsage(prompt_tokens=result.embed.usage.tokens)
        return _good(result, tokens)

    async def _embed(self, call: Call) -> embedding_pb2.EmbedResponse:
        done: Any = call.origin
        try:
            await asyncio.to_thread(self._embedding.embed, [call])
            await done.wait()
        except asyncio.CancelledError:
            call.cancel()
            raise
        if call.error is not None:
            raise call.error
        return embedding_pb2.EmbedResponse.FromString(call.payload)

    def failed(self, item: ItemRow, error: ForebayError) -> Executed:
        """The result of an item that failed."""
        result = _result(item)
        result.error.CopyFrom(error_of(error))
        return Executed(result.SerializeToString(), False, (0, 0, 0, 0))

    def expired(self, item: ItemRow) -> Executed:
        """The result of an item whose batch's time ran out."""
        result = _result(item)
        result.error.CopyFrom(
            pb.BatchError(
                code="DEADLINE_EXCEEDED",
                reason="BATCH_EXPIRED",
                message="the batch's completion window passed before this item was run",
            )
        )
        return Executed(result.SerializeToString(), False, (0, 0, 0, 0))


def request_id(item: ItemRow) -> str:
    """The request id of an item."""
    return f"{item.batch_id}-{item.number}"


def _result(item: ItemRow) -> pb.BatchResult:
    return pb.BatchResult(
        number=item.number,
        custom_id=item.custom_id,
        request_id=request_id(item),
        ended_at=timestamp(time.time()),
        note=pb.BatchItem.FromString(item.item).note,
    )


def _good(result: pb.BatchResult, u: generation_pb2.GenerationUsage) -> Executed:
    tokens = (u.prompt_tokens, u.completion_tokens, u.cached_tokens, u.reasoning_tokens)
    return Executed(result.SerializeToString(), True, tokens)


def error_of(error: ForebayError) -> pb.BatchError:
    """An error as results hold it."""
    violations = error.violations if isinstance(error, InvalidArgument) else []
    return pb.BatchError(
        code=error.code,
        reason=error.reason,
        message=error.message[:4000],
        field=violations[0].field[:256] if violations else "",
    )


class Intake:
    """Items on their way into a batch: numbered, checked, and failed at once where they are bad."""

    def __init__(self, batch: str, validator: Validator) -> None:
        self._batch = batch
        self._validator = validator
        self._names: set[str] = set()
        self.total = 0
        self.failed = 0

    def take(self, item: pb.BatchItem) -> ItemRow:
        """The row of one more item."""
        number, self.total = self.total, self.total + 1
        name = item.custom_id[:MAX_NAME].replace("\0", "\ufffd")  # for PostgreSQL
        item.note = item.note[:MAX_NOTE]
        error = self._fault(item)
        self._names.add(name)
        row = ItemRow(self._batch, number, name, item.SerializeToString(), "waiting")
        if error is None:
            return row
        self.failed += 1
        result = _result(row)
        result.error.CopyFrom(error)
        return ItemRow(self._batch, number, name, b"", "failed", result.SerializeToString())

    def unreadable(self, error: ForebayError) -> ItemRow:
        """The row of an item that is none."""
        return self.take(pb.BatchItem(invalid=error_of(error)))

    def _fault(self, item: pb.BatchItem) -> pb.BatchError | None:
        kind = item.WhichOneof("request")
        if kind == "invalid":
            said = item.invalid
            return pb.BatchError(
                code=said.code[:32] or "INVALID_ARGUMENT",
                reason=said.reason[:64],
                message=said.message[:4000],
                field=said.field[:256],
            )
        try:
            if not item.custom_id:
                raise InvalidArgument.at("custom_id", "is required")
            if len(item.custom_id) > MAX_NAME:
                raise InvalidArgument.at("custom_id", f"has more than {MAX_NAME} characters")
            if item.custom_id in self._names:
                raise InvalidArgument.at(
                    "custom_id",
                    "names another item of this batch already",
                    reason="DUPLICATE_CUSTOM_ID",
                )
            if kind is None:
                raise InvalidArgument.at("request", "is required")
            request = getattr(item, kind)
            self._validator.check(request)
            if kind != "embed":
                request.priority = 0
        except ForebayError as e:
            return error_of(e)
        return None
