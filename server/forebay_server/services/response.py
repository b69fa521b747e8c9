"""ResponseService: conversations whose state the server keeps."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import cast

from forebay.errors import (
    FailedPrecondition,
    ForebayError,
    InvalidArgument,
    NotFound,
    QueueFull,
)
from forebay.methods import methods
from forebay.settings import ResponseSettings
from forebay.v1 import response_pb2 as pb
from sqlalchemy.ext.asyncio import AsyncConnection

from forebay_server.access.deferred import DeferredWork
from forebay_server.core.call import Call
from forebay_server.dataplane.generation import GenerationPipeline
from forebay_server.services.base import Service
from forebay_server.services.model import timestamp
from forebay_server.services.paging import Page
from forebay_server.services.response_items import Conversation, Event
from forebay_server.services.response_making import (
    OWNED_S,
    Making,
    ResponseMaker,
    input_of,
    response_of,
    status_of,
    without_request,
)
from forebay_server.storage.responses import UNFINISHED, ResponseRow, ResponseStore

log = logging.getLogger("forebay.services")

CREATE = methods()["/forebay.v1.ResponseService/CreateResponse"]
SWEEP_EVERY_S = 60.0
#: How often a server says that it makes its responses.
CLAIM_EVERY_S = 2.0


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
        self._maker = ResponseMaker(generation, store, settings, clock)
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
        with contextlib.suppress(ForebayError):  # else others take them after OWNED_S
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
        making = await self._maker.prepare(call, cast(pb.CreateResponseRequest, call.request), "")
        if making.request.background:
            return pb.CreateResponseResponse(response=await self._later(making))
        async with aclosing(self._maker.make(making)) as events:
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
        making = await self._maker.prepare(call, request, "request.")
        making.streamed = True
        async with aclosing(self._maker.make(making)) as events:
            async for event in events:
                yield event
        if making.error is not None:
            raise making.error

    # In the background.

    async def _later(self, making: Making) -> pb.Response:
        """Store the request, and begin."""
        await self._maker.check(making)  # what can be refused is refused now
        if len(self._background) >= self._settings.max_background:
            raise QueueFull(
                f"{len(self._background)} responses are in the background already; come back later",
                retry_after_s=5.0,
            )
        making.response.status = pb.RESPONSE_STATUS_QUEUED
        until = timestamp(self._clock() + self._settings.keep_s)
        making.response.expires_at.CopyFrom(until)
        row = self._maker.row(making, self._owner)
        await self._maker.keep(making, row)
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
        response = response_of(row)
        call: Call | None = None
        try:
            call = await self._deferred.call(CREATE, row.key_id, row.id)
            making = Making(call, request, response, Conversation())
            await self._maker.read_before(making)
            making.conversation.extend(request.input, True, "input")
            response.status = pb.RESPONSE_STATUS_IN_PROGRESS
            await self._store.update(row.id, "in_progress", without_request(response))
            async with aclosing(self._maker.make(making)) as events:
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

        async def count(db: AsyncConnection) -> None:
            if call is not None:
                # The call that left it behind was counted as a call already.
                await self._deferred.count(db, call, code, calls=0)

        while True:
            try:
                message = without_request(response)
                await self._store.update(name, status_of(response), message, count)
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
            response = response_of(row)
            response.status = pb.RESPONSE_STATUS_CANCELLED
            await self._store.update(row.id, "cancelled", without_request(response))
            row = await self._get(call, request.response)
        return pb.CancelResponseResponse(response=response_of(row))

    # What is stored.

    async def get_response(self, call: Call) -> pb.GetResponseResponse:
        """GetResponse."""
        request = cast(pb.GetResponseRequest, call.request)
        return pb.GetResponseResponse(response=response_of(await self._get(call, request.response)))

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
        # An item's place is its response and its number there.
        items: list[tuple[tuple[str, int], pb.ResponseItem]] = []
        for row in rows:
            own = input_of(row)
            if row.id != request.response:
                own.extend(pb.Response.FromString(row.response).output)
            items.extend(((row.id, n), item) for n, item in enumerate(own))
        if not request.oldest_first:
            items.reverse()
        page = Page(request, 20, str, int)
        start = 0
        if page.behind:
            places = [place for place, _ in items]
            if page.behind in places:
                start = places.index(page.behind) + 1
            elif not request.oldest_first:
                start = len(items)  # its response is gone, and with it all that were before it
        elif request.after:
            ids = [item.id for _, item in items]
            if request.after not in ids:
                raise NotFound("item", request.after)
            start = ids.index(request.after) + 1
        chosen, following = page.cut(items[start:], lambda i: i[0])
        return pb.ListInputItemsResponse(
            items=[item for _, item in chosen], next_page_token=following
        )

    async def _get(self, call: Call, name: str) -> ResponseRow:
        row = await self._store.get(call.principal.key_id, name, self._clock())
        if row is None:
            raise NotFound("response", name)
        return row
