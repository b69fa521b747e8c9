"""ResponseService: conversations whose state the server keeps."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import cast

from forebay.errors import (
    FailedPrecondition,
    ForebayError,
    Internal,
    InvalidArgument,
    NotFound,
    QueueFull,
)
from forebay.methods import methods
from forebay.settings import ResponseSettings
from forebay.v1 import generation_pb2 as generation
from forebay.v1 import response_pb2 as pb

from forebay_server.access.deferred import DeferredWork
from forebay_server.core.call import Call
from forebay_server.dataplane.generation import GenerationPipeline, Job
from forebay_server.services import generation_messages as messages
from forebay_server.services.base import Service
from forebay_server.services.common import check_metadata, served_by
from forebay_server.services.model import timestamp
from forebay_server.services.paging import offset, page_size, token
from forebay_server.services.response_items import Conversation, Event, Output, name_items, new_id
from forebay_server.storage.responses import UNFINISHED, ResponseRow, ResponseStore

log = logging.getLogger("forebay.services")

CREATE = methods()["/forebay.v1.ResponseService/CreateResponse"]
SWEEP_EVERY_S = 60.0
#: How long a server's word holds that it makes a response, and how often it says so.
OWNED_S, CLAIM_EVERY_S = 10.0, 2.0
#: How a model's answer ends, and what that makes of the response.
_ENDS = {
    "stop": pb.RESPONSE_STATUS_COMPLETED,
    "tool_calls": pb.RESPONSE_STATUS_COMPLETED,
    "length": pb.RESPONSE_STATUS_INCOMPLETE,
    "content_filter": pb.RESPONSE_STATUS_INCOMPLETE,
}


@dataclass(slots=True)
class _Making:
    """A response on its way."""

    call: Call
    request: pb.CreateResponseRequest
    response: pb.Response
    conversation: Conversation
    path: str = ""
    streamed: bool = False
    earlier: list[str] = field(default_factory=list)
    error: ForebayError | None = None

    @property
    def stored(self) -> bool:
        """Whether it is kept."""
        return not self.request.HasField("store") or self.request.store


class ResponseService(Service):
    """See protos/forebay/v1/response.proto."""

    name = "forebay.v1.ResponseService"

    def __init__(
        self,
        generation: GenerationPipeline,
        store: ResponseStore,
        deferred: DeferredWork,
        settings: ResponseSettings,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._generation = generation
        self._store = store
        self._deferred = deferred
        self._settings = settings
        self._clock = clock
        self._background: dict[str, asyncio.Task[None]] = {}
        self._stopping: set[str] = set()
        self._ends: set[asyncio.Task[None]] = set()
        #: Those of the last look at the database, and those that have ended since.
        self._seen: set[str] = set()
        self._lately: set[str] = set()
        self._owner = secrets.token_hex(8)
        self._closing = False

    # Life of the service.

    async def keep(self) -> None:
        """For ever: make what is in the background, what an earlier process left included, and
        remove responses whose time is over."""
        swept = 0.0
        while True:
            try:
                await self._claim()
                if time.monotonic() - swept >= SWEEP_EVERY_S:
                    swept = time.monotonic()
                    await self._store.sweep(self._clock())
            except Exception:
                log.exception("looking after stored responses failed; it is tried again")
            await asyncio.sleep(CLAIM_EVERY_S)

    async def _claim(self) -> None:
        now = self._clock()
        self._lately.clear()
        rows = {r.id: r for r in await self._store.claim(self._owner, now, now + OWNED_S)}
        for name in [n for n in self._background if n not in rows]:
            # It was ended by another server. One that has just begun is in the next look.
            if name in self._seen:
                await self._stop(name)
        for row in rows.values():
            if row.id not in self._background and row.id not in self._lately:
                self._begin_background(row)
        self._seen = set(rows)

    async def close(self) -> None:
        """Stop what runs; it goes on at the next start."""
        self._closing = True
        for name in list(self._background):
            await self._stop(name)
        await asyncio.gather(*self._ends, return_exceptions=True)
        with contextlib.suppress(ForebayError):
            await self._store.release(self._owner)

    async def _stop(self, name: str) -> None:
        """Stop a response in the background, once, and wait for its end."""
        task = self._background.get(name)
        if task is None:
            return
        if name not in self._stopping:
            self._stopping.add(name)
            task.cancel()
        await asyncio.wait((task,))
        if self._ends:
            await asyncio.wait(self._ends)

    # Making responses.

    async def create_response(self, call: Call) -> pb.CreateResponseResponse:
        """CreateResponse."""
        making = await self._prepare(call, cast(pb.CreateResponseRequest, call.request), "")
        if making.request.background:
            return pb.CreateResponseResponse(response=await self._later(making))
        async with aclosing(self._make(making)) as events:
            async for _ in events:
                pass
        if making.error is not None:
            raise making.error
        return pb.CreateResponseResponse(response=making.response)

    async def create_response_stream(self, call: Call) -> AsyncIterator[Event]:
        """CreateResponseStream."""
        request = cast(pb.CreateResponseStreamRequest, call.request).request
        if request.background:
            raise InvalidArgument.at("request.background", "has no stream; read the response later")
        making = await self._prepare(call, request, "request.")
        making.streamed = True
        async with aclosing(self._make(making)) as events:
            async for event in events:
                yield event
        if making.error is not None:
            raise making.error

    async def _prepare(self, call: Call, request: pb.CreateResponseRequest, path: str) -> _Making:
        """Check a request and read what came before it. Raises InvalidArgument, NotFound."""
        if request.sampling.HasField("n") and request.sampling.n != 1:
            raise InvalidArgument.at(f"{path}sampling.n", "must be 1: a response has one answer")
        check_metadata(request.metadata, f"{path}metadata")
        if request.background and request.HasField("store") and not request.store:
            raise InvalidArgument.at(f"{path}store", "must be true in the background")
        if not request.input and not request.previous_response:
            raise InvalidArgument.at(f"{path}input", "is required")
        name_items(request.input, f"{path}input")
        response = pb.Response(
            id=new_id("resp"),
            status=pb.RESPONSE_STATUS_IN_PROGRESS,
            created_at=timestamp(self._clock()),
        )
        response.request.CopyFrom(request)
        response.request.ClearField("input")
        making = _Making(call, request, response, Conversation(), path)
        await self._read_before(making)
        making.conversation.extend(request.input, True, f"{path}input")
        return making

    async def _read_before(self, making: _Making) -> None:
        """The conversation so far: instructions, then all earlier items."""
        request, conversation = making.request, making.conversation
        if request.instructions:
            conversation.instructions(request.instructions)
        if not request.previous_response:
            return
        most = self._settings.max_turns
        rows = await self._store.chain(
            making.call.principal.key_id, request.previous_response, self._clock(), most
        )
        where = f"{making.path}previous_response"
        if not rows:
            raise NotFound("response", request.previous_response)
        if len(rows) > most:
            raise InvalidArgument.at(where, f"follows more than {most} responses, the limit")
        if rows[0].previous_id:
            raise NotFound("response", rows[0].previous_id)
        if rows[-1].status not in ("completed", "incomplete"):
            raise FailedPrecondition(
                f"response {rows[-1].id} is {rows[-1].status}; only one that has been completed "
                "can be followed",
                reason="RESPONSE_NOT_COMPLETED",
            )
        making.earlier = [row.id for row in rows]
        for row in rows:
            conversation.extend(_input(row), False, where)
            conversation.extend(pb.Response.FromString(row.response).output, False, where)

    async def _make(self, making: _Making) -> AsyncGenerator[Event, None]:
        """Generate and store. Errors of the start are raised; later ones end the response, and are
        left in `making.error`."""
        job = await self._job(making)
        making.response.served_by.CopyFrom(served_by(making.call))
        making.response.dropped_messages = job.dropped_messages
        yield Event(created=making.response)
        output = Output()
        try:
            async with aclosing(self._generation.run(job)) as deltas:
                async for delta in deltas:
                    for event in output.add(delta):
                        yield event
            for event in output.end():
                yield event
            self._ended(making, output, job)
        except ForebayError as e:
            self._broken(making, output, job, e)
        except Exception as e:
            log.exception("response %s failed", making.response.id)
            said = "internal error; the log has more under request id "
            error = Internal(said + making.call.request_id)
            error.__cause__ = e
            self._broken(making, output, job, error)
        # Who waited for the whole hears of an error by the call's status, and of no id.
        heard = making.error is None or making.streamed
        if making.stored and heard and not making.request.background:
            await self._keep(making)
        yield Event(ended=making.response)

    async def _job(self, making: _Making) -> Job:
        r, path = making.request, making.path
        chat = generation.ChatRequest(
            model=r.model,
            messages=making.conversation.messages,
            tools=r.tools,
            adapter=r.adapter,
            truncate_prompt=r.truncate_prompt,
            priority=r.priority,
            user=r.user,
            sticky_key=r.sticky_key,
            template_values=r.template_values,
        )
        for name in ("tool_choice", "response_format", "sampling"):
            if r.HasField(name):
                getattr(chat, name).CopyFrom(getattr(r, name))
        for name in ("parallel_tool_calls", "cache"):
            if r.HasField(name):
                setattr(chat, name, getattr(r, name))
        try:
            ask = messages.chat_ask(chat, path)
            return await self._generation.prepare_chat(making.call, ask)
        except InvalidArgument as e:
            raise making.conversation.blamed(e, path) from None

    def _ended(self, making: _Making, output: Output, job: Job) -> None:
        response = making.response
        response.status = _ENDS[output.finish]
        if response.status == pb.RESPONSE_STATUS_INCOMPLETE:
            response.incomplete_reason = messages.FINISH[output.finish]
        self._fill(making, output, job)

    def _broken(self, making: _Making, output: Output, job: Job, error: ForebayError) -> None:
        for _ in output.close():
            pass
        making.error = error
        making.response.status = pb.RESPONSE_STATUS_FAILED
        making.response.error.reason = error.reason
        making.response.error.message = error.message
        self._fill(making, output, job)

    def _fill(self, making: _Making, output: Output, job: Job) -> None:
        response = making.response
        response.output.extend(output.items)
        response.logprobs.extend(output.logprobs)
        response.generation_usage.CopyFrom(messages.usage_of(job.tally()))
        response.completed_at.CopyFrom(timestamp(self._clock()))
        if making.stored:
            response.expires_at.CopyFrom(timestamp(self._clock() + self._settings.keep_s))

    async def _keep(self, making: _Making, row: ResponseRow | None = None) -> None:
        """Store the response, and let those live on that it is built upon."""
        row = row or self._row(making)
        await self._store.add(row)
        if making.earlier:
            await self._store.keep(making.earlier, row.expires_at)

    def _row(self, making: _Making, owner: str | None = None) -> ResponseRow:
        now = self._clock()
        return ResponseRow(
            making.response.id,
            making.call.principal.key_id,
            making.request.previous_response or None,
            _status(making.response),
            making.request.SerializeToString(),
            _without_request(making.response),
            now,
            now + self._settings.keep_s,
            owner,
            now + OWNED_S if owner else None,
        )

    # In the background.

    async def _later(self, making: _Making) -> pb.Response:
        """Store the request, and begin."""
        await self._job(making)  # what can be refused is refused now
        if len(self._background) >= self._settings.max_background:
            raise QueueFull(
                f"{len(self._background)} responses are in the background already; come back later",
                retry_after_s=5.0,
            )
        making.response.status = pb.RESPONSE_STATUS_QUEUED
        until = timestamp(self._clock() + self._settings.keep_s)
        making.response.expires_at.CopyFrom(until)
        row = self._row(making, self._owner)
        await self._keep(making, row)
        if row.id not in self._background and row.id not in self._lately:
            self._begin_background(row)
        return making.response

    def _begin_background(self, row: ResponseRow) -> None:
        task = asyncio.create_task(self._in_background(row))
        self._background[row.id] = task

        def done(_: object) -> None:
            self._background.pop(row.id, None)
            self._stopping.discard(row.id)
            self._lately.add(row.id)

        task.add_done_callback(done)

    async def _in_background(self, row: ResponseRow) -> None:
        request = pb.CreateResponseRequest.FromString(row.request)
        response = _response(row)
        call: Call | None = None
        try:
            call = await self._deferred.call(CREATE, row.key_id, row.id)
            making = _Making(call, request, response, Conversation())
            await self._read_before(making)
            making.conversation.extend(request.input, True, "input")
            response.status = pb.RESPONSE_STATUS_IN_PROGRESS
            await self._store.update(row.id, "in_progress", _without_request(response))
            async with aclosing(self._make(making)) as events:
                async for _ in events:
                    pass
            code = making.error.code if making.error is not None else "OK"
        except asyncio.CancelledError:
            if self._closing:  # it begins again at the next start
                if call is not None:
                    self._deferred.settle(call)
                raise
            response.status, code = pb.RESPONSE_STATUS_CANCELLED, "CANCELLED"
        except ForebayError as e:
            response.status, code = pb.RESPONSE_STATUS_FAILED, e.code
            response.error.reason, response.error.message = e.reason, e.message
        except Exception:
            log.exception("response %s failed in the background", row.id)
            response.status, code = pb.RESPONSE_STATUS_FAILED, "INTERNAL"
            response.error.reason, response.error.message = "INTERNAL", "internal error"
        if call is not None:
            self._deferred.settle(call)
        # Whoever stops it now is too late: what has ended is stored.
        end = asyncio.create_task(self._store_end(row.id, response, call, code))
        self._ends.add(end)
        end.add_done_callback(self._ends.discard)
        await asyncio.shield(end)

    async def _store_end(
        self, name: str, response: pb.Response, call: Call | None, code: str
    ) -> None:
        """Store the end, and what it used, however long the database is away."""

        async def count(db: object) -> None:
            if call is not None:
                # The call that left it behind was counted as a call already.
                await self._deferred.count(db, call, code, calls=0)  # type: ignore[arg-type]

        while True:
            try:
                message = _without_request(response)
                await self._store.update(name, _status(response), message, count)
                return
            except ForebayError as e:
                log.error("response %s cannot be stored yet: %s", name, e.message)
                await asyncio.sleep(1.0)

    async def cancel_response(self, call: Call) -> pb.CancelResponseResponse:
        """CancelResponse."""
        request = cast(pb.CancelResponseRequest, call.request)
        row = await self._get(call, request.response)
        if not pb.CreateResponseRequest.FromString(row.request).background:
            raise FailedPrecondition(
                "only responses in the background can be cancelled", reason="NOT_IN_BACKGROUND"
            )
        if row.status in UNFINISHED:
            await self._stop(row.id)
            # One that another server makes is ended here; it will notice.
            response = _response(row)
            response.status = pb.RESPONSE_STATUS_CANCELLED
            await self._store.update(row.id, "cancelled", _without_request(response))
            row = await self._get(call, request.response)
        return pb.CancelResponseResponse(response=_response(row))

    # What is stored.

    async def get_response(self, call: Call) -> pb.GetResponseResponse:
        """GetResponse."""
        request = cast(pb.GetResponseRequest, call.request)
        return pb.GetResponseResponse(response=_response(await self._get(call, request.response)))

    async def delete_response(self, call: Call) -> pb.DeleteResponseResponse:
        """DeleteResponse."""
        name = cast(pb.DeleteResponseRequest, call.request).response
        row = await self._get(call, name)
        await self._stop(row.id)
        if not await self._store.delete(call.principal.key_id, name):
            raise NotFound("response", name)
        return pb.DeleteResponseResponse()

    async def list_input_items(self, call: Call) -> pb.ListInputItemsResponse:
        """ListInputItems."""
        request = cast(pb.ListInputItemsRequest, call.request)
        await self._get(call, request.response)
        rows = await self._store.chain(
            call.principal.key_id, request.response, self._clock(), self._settings.max_turns
        )
        items: list[pb.ResponseItem] = []
        for row in rows:
            items.extend(_input(row))
            if row.id != request.response:
                items.extend(pb.Response.FromString(row.response).output)
        if not request.oldest_first:
            items.reverse()
        start = offset(request.page_token)
        if request.after:
            ids = [i.id for i in items]
            if request.after not in ids:
                raise NotFound("item", request.after)
            start = ids.index(request.after) + 1
        end = start + page_size(request.page_size, 20)
        return pb.ListInputItemsResponse(
            items=items[start:end], next_page_token=token(end) if end < len(items) else ""
        )

    async def _get(self, call: Call, name: str) -> ResponseRow:
        row = await self._store.get(call.principal.key_id, name, self._clock())
        if row is None:
            raise NotFound("response", name)
        return row


def _input(row: ResponseRow) -> list[pb.ResponseItem]:
    return list(pb.CreateResponseRequest.FromString(row.request).input)


def _response(row: ResponseRow) -> pb.Response:
    out = pb.Response.FromString(row.response)
    out.request.MergeFromString(row.request)
    out.request.ClearField("input")
    out.expires_at.CopyFrom(timestamp(row.expires_at))
    return out


def _without_request(response: pb.Response) -> bytes:
    out = pb.Response()
    out.CopyFrom(response)
    out.ClearField("request")
    return out.SerializeToString()


def _status(response: pb.Response) -> str:
    name = pb.ResponseStatus.Name(response.status)
    return name.removeprefix("RESPONSE_STATUS_").lower()
