"""Responses on their way: from a request and what came before it to an answer that is stored."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field

from forebay.errors import FailedPrecondition, ForebayError, Internal, InvalidArgument, NotFound
from forebay.settings import ResponseSettings
from forebay.v1 import generation_pb2 as generation
from forebay.v1 import response_pb2 as pb

from forebay_server.core.call import Call
from forebay_server.dataplane.generation import GenerationPipeline
from forebay_server.dataplane.generation_jobs import Job
from forebay_server.services import generation_messages as messages
from forebay_server.services.common import check_metadata, served_by
from forebay_server.services.model import timestamp
from forebay_server.services.response_items import Conversation, Event, Output, name_items, new_id
from forebay_server.storage.responses import ResponseRow, ResponseStore

log = logging.getLogger("forebay.services")

#: Seconds for which a server's word holds that it makes a response in the background.
OWNED_S = 10.0
#: How a model's answer ends, and what that makes of the response.
_ENDS = {
    "stop": pb.RESPONSE_STATUS_COMPLETED,
    "tool_calls": pb.RESPONSE_STATUS_COMPLETED,
    "length": pb.RESPONSE_STATUS_INCOMPLETE,
    "content_filter": pb.RESPONSE_STATUS_INCOMPLETE,
}


@dataclass(slots=True)
class Making:
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


class ResponseMaker:
    """See the module."""

    def __init__(
        self,
        generation: GenerationPipeline,
        store: ResponseStore,
        settings: ResponseSettings,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._generation = generation
        self._store = store
        self._settings = settings
        self._clock = clock

    async def prepare(self, call: Call, request: pb.CreateResponseRequest, path: str) -> Making:
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
        making = Making(call, request, response, Conversation(), path)
        await self.read_before(making)
        making.conversation.extend(request.input, True, f"{path}input")
        return making

    async def read_before(self, making: Making) -> None:
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
            conversation.extend(input_of(row), False, where)
            conversation.extend(pb.Response.FromString(row.response).output, False, where)

    async def make(self, making: Making) -> AsyncGenerator[Event, None]:
        """Generate and store. Errors of the start are raised; later ones end the response, and are
        left in `making.error`."""
        job = await self.check(making)
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
            await self.keep(making)
        yield Event(ended=making.response)

    async def check(self, making: Making) -> Job:
        """What is to be generated. Raises InvalidArgument in terms of the request's items."""
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

    def _ended(self, making: Making, output: Output, job: Job) -> None:
        response = making.response
        response.status = _ENDS[output.finish]
        if response.status == pb.RESPONSE_STATUS_INCOMPLETE:
            response.incomplete_reason = messages.FINISH[output.finish]
        self._fill(making, output, job)

    def _broken(self, making: Making, output: Output, job: Job, error: ForebayError) -> None:
        for _ in output.close():
            pass
        making.error = error
        making.response.status = pb.RESPONSE_STATUS_FAILED
        making.response.error.reason = error.reason
        making.response.error.message = error.message
        self._fill(making, output, job)

    def _fill(self, making: Making, output: Output, job: Job) -> None:
        response = making.response
        response.output.extend(output.items)
        response.logprobs.extend(output.logprobs)
        response.generation_usage.CopyFrom(messages.usage_of(job.tally()))
        response.completed_at.CopyFrom(timestamp(self._clock()))
        if making.stored:
            response.expires_at.CopyFrom(timestamp(self._clock() + self._settings.keep_s))

    async def keep(self, making: Making, row: ResponseRow | None = None) -> None:
        """Store the response, and let those live on that it is built upon."""
        row = row or self.row(making)
        await self._store.add(row)
        if making.earlier:
            await self._store.keep(making.earlier, row.expires_at)

    def row(self, making: Making, owner: str | None = None) -> ResponseRow:
        """What is stored."""
        now = self._clock()
        return ResponseRow(
            making.response.id,
            making.call.principal.key_id,
            making.request.previous_response or None,
            status_of(making.response),
            making.request.SerializeToString(),
            without_request(making.response),
            now,
            now + self._settings.keep_s,
            owner,
            now + OWNED_S if owner else None,
        )


def input_of(row: ResponseRow) -> list[pb.ResponseItem]:
    """The items that a response was given."""
    return list(pb.CreateResponseRequest.FromString(row.request).input)


def response_of(row: ResponseRow) -> pb.Response:
    """A stored response."""
    out = pb.Response.FromString(row.response)
    out.request.MergeFromString(row.request)
    out.request.ClearField("input")
    out.expires_at.CopyFrom(timestamp(row.expires_at))
    return out


def without_request(response: pb.Response) -> bytes:
    """A response as it is stored."""
    out = pb.Response()
    out.CopyFrom(response)
    out.ClearField("request")
    return out.SerializeToString()


def status_of(response: pb.Response) -> str:
    """A status as it is stored."""
    name = pb.ResponseStatus.Name(response.status)
    return name.removeprefix("RESPONSE_STATUS_").lower()
