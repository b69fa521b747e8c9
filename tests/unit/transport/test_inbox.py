"""The bounds of what waits on the ordinary lane."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Sequence
from typing import Any, cast

import grpc
from forebay.constraints import Validator
from forebay.methods import methods
from forebay.settings import GrpcSettings
from forebay.v1 import embedding_pb2 as em
from forebay_server.access.idempotency import IdempotencyStore
from forebay_server.core.call import Call
from forebay_server.services.base import Handler
from forebay_server.transport.dispatch import Dispatcher
from forebay_server.transport.inbox import Inbox
from forebay_server.transport.ordinary import OrdinaryLane
from forebay_server.transport.pipeline import Pipeline
from google.rpc import error_details_pb2, status_pb2
from grpc import aio

METHOD = methods()["/forebay.v1.EmbeddingService/Embed"]
#: It is not read.
MESSAGE = bytes(400_000)


class Busy:
    """A service that holds the inbox's only thread up until it is let go on."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.go_on = threading.Event()
        self.served = 0

    def __call__(self, calls: Sequence[Call]) -> Sequence[Call]:
        self.entered.set()
        self.go_on.wait(20)
        self.served += len(calls)
        for call in calls:
            call.reply(em.EmbedResponse())
        return ()


Ask = Any


@contextlib.asynccontextmanager
async def lane(**bounds: Any) -> AsyncIterator[tuple[Busy, Ask, list[str]]]:
    """A server by that lane alone, what calls it, and the methods of calls that were refused."""
    busy, refused = Busy(), list[str]()
    settings = GrpcSettings(**bounds)
    handlers = {METHOD.path: Handler(METHOD, busy, raw=busy)}
    pipeline, validator = Pipeline([]), Validator()
    inbox = Inbox(Dispatcher(handlers, pipeline, validator), settings)
    ordinary = OrdinaryLane(
        handlers,
        pipeline,
        inbox,
        validator,
        cast(IdempotencyStore, None),  # for methods that change something
        asyncio.get_running_loop(),
        lambda path, count: refused.extend([path] * count),
    )
    server = aio.server()
    server.add_generic_rpc_handlers((ordinary,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = channel.unary_unary(METHOD.path)

        def ask() -> Any:
            return stub(MESSAGE, timeout=20, metadata=(("x-request-id", "one"),))

        yield busy, ask, refused
        busy.go_on.set()
    await server.stop(1)
    inbox.close()


async def occupied(busy: Busy, ask: Ask) -> asyncio.Task[Any]:
    """One call that is being served."""
    first = asyncio.ensure_future(ask())
    await asyncio.to_thread(busy.entered.wait, 10)
    return first


async def refusal(ask: Ask) -> aio.AioRpcError:
    try:
        await ask()
    except aio.AioRpcError as e:
        return e
    raise AssertionError("it was answered")


async def test_calls_beyond_the_bound_are_refused_and_the_others_answered() -> None:
    async with lane(max_waiting_calls=2) as (busy, ask, refused):
        kept = [await occupied(busy, ask)]
        asked = [asyncio.ensure_future(ask()) for _ in range(5)]
        done, waiting = await asyncio.wait(asked, timeout=10, return_when=asyncio.FIRST_COMPLETED)
        while len(done) < 3:
            more, waiting = await asyncio.wait(
                waiting, timeout=10, return_when=asyncio.FIRST_COMPLETED
            )
            assert more
            done |= more
        codes = [cast(aio.AioRpcError, task.exception()).code() for task in done]
        assert codes == [grpc.StatusCode.RESOURCE_EXHAUSTED] * 3
        assert refused == [METHOD.path] * 3
        busy.go_on.set()
        kept += waiting
        await asyncio.gather(*kept)
        assert busy.served == 3


async def test_a_refusal_says_why_when_to_come_back_and_whose_it_is() -> None:
    async with lane(max_waiting_calls=1, max_waiting_s=0.01) as (busy, ask, _):
        kept = [await occupied(busy, ask), asyncio.ensure_future(ask())]
        await asyncio.sleep(0.2)
        e = await refusal(ask)
        trailers = dict(cast(Any, e.trailing_metadata()))
        assert trailers["x-request-id"] == "one"
        status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
        found = {d.type_url.rpartition(".")[2]: d for d in status.details}
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        assert found["ErrorInfo"].Unpack(info) and found["RetryInfo"].Unpack(retry)
        assert info.reason == "QUEUE_FULL"
        assert retry.retry_delay.ToTimedelta().total_seconds() == 0.1
        busy.go_on.set()
        await asyncio.gather(*kept)


async def test_while_a_call_waits_too_long_no_more_are_taken() -> None:
    async with lane(max_waiting_s=0.05) as (busy, ask, refused):
        kept = [await occupied(busy, ask), asyncio.ensure_future(ask())]
        await asyncio.sleep(0.3)
        assert (await refusal(ask)).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        busy.go_on.set()
        await asyncio.gather(*kept)
        await ask()
        assert len(refused) == 1


async def test_bytes_are_held_until_a_call_has_ended_or_left() -> None:
    assert 2 < (1 << 20) / len(MESSAGE) < 3
    async with lane(max_waiting_bytes=1 << 20) as (busy, ask, _):
        kept = [await occupied(busy, ask)]
        leaver = asyncio.ensure_future(ask())
        await asyncio.sleep(0.2)
        assert (await refusal(ask)).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        leaver.cancel()
        await asyncio.sleep(0.2)
        kept.append(asyncio.ensure_future(ask()))
        await asyncio.sleep(0.2)
        assert (await refusal(ask)).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        busy.go_on.set()
        await asyncio.gather(*kept)
        await asyncio.gather(ask(), ask())
        assert busy.served == 4, "who left was not served"
