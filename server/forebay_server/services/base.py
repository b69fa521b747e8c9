"""How services are written, and how transports find their handlers.

A service is one class per service of the contract, with one method per RPC in snake_case:

- batched unary (option `batched`):  def embed(self, calls: Sequence[Call]) -> None
  checks and submits them together and returns at once; each call is answered when it is done.
  Where many small calls come, `embed_raw` may stand beside it: it starts the calls whose bytes
  (`call.message`) it can read together, and gives back those that must be parsed one by one.
- unary:          async def get_model(self, call: Call) -> Message
- server stream:  def watch_models(self, call: Call) -> AsyncIterator[Message]
- client stream:  async def import_version(self, call: Call, requests: AsyncIterator) -> Message
- bidi stream:    def embed_stream(self, call: Call, requests: AsyncIterator) -> AsyncIterator
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from forebay.constraints import Validator
from forebay.errors import ForebayError
from forebay.methods import Method, methods
from google.protobuf.message import Message

from forebay_server.core.call import Call, CallFacts

#: Requests of one bidirectional stream that are in flight at once; more wait in the socket.
STREAM_WINDOW = 64

BatchHandler = Callable[[Sequence[Call]], None]


class Service:
    """Base of all services. `name` is the contract's full service name."""

    name: str = ""


@dataclass(frozen=True, slots=True)
class Handler:
    """A method of the contract and the functions that serve it."""

    method: Method
    function: Callable[..., Any]
    raw: Callable[[Sequence[Call]], Sequence[Call]] | None = None


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def handlers(services: Sequence[Service]) -> dict[str, Handler]:
    """Handlers by path. Raises LookupError when a service lacks one of its contract's methods."""
    by_service = {s.name: s for s in services}
    out: dict[str, Handler] = {}
    for path, method in methods().items():
        service = by_service.get(method.service)
        if service is None:
            continue
        function = getattr(service, _snake(method.name), None)
        if function is None:
            raise LookupError(f"{type(service).__name__} has no {_snake(method.name)} for {path}")
        out[path] = Handler(method, function, getattr(service, f"{_snake(method.name)}_raw", None))
    return out


async def answers_in_order(
    call: Call,
    requests: AsyncIterator[Message],
    unary_path: str,
    submit: BatchHandler,
    validator: Validator,
    unwrap: Callable[[Any], Message],
    wrap: Callable[[bytes], Message],
) -> AsyncIterator[Message]:
    """Serve a bidirectional stream by its unary method: one answer per request, in order.

    Up to STREAM_WINDOW requests are in flight, so a stream fills batches as unary calls do. The
    first error ends the stream after all earlier answers. `wrap` gets the unary answer's bytes.
    """
    loop = asyncio.get_running_loop()
    method = methods()[unary_path]
    waiting: deque[tuple[Call, asyncio.Future[Call]]] = deque()

    def start(request: Message) -> None:
        future: asyncio.Future[Call] = loop.create_future()

        def ended(child: Call) -> None:
            resolve_soon(loop, future, child)

        child = Call(
            method,
            call.metadata,
            started=time.monotonic(),
            deadline=call.deadline,
            peer=call.peer,
            on_end=ended,
        )
        child.principal = call.principal
        child.request_id = call.request_id
        child.request = request
        waiting.append((child, future))
        try:
            validator.check(request)
            submit([child])
        except ForebayError as e:
            child.fail(e)

    async def first() -> Message:
        child, future = waiting[0]
        await future
        waiting.popleft()
        add_facts(call.facts, child.facts)
        if child.error is not None:
            raise child.error
        return wrap(child.payload)

    source = aiter(requests)
    reading: asyncio.Task[Any] | None = None
    try:
        more = True
        while more or waiting:
            if more and reading is None and len(waiting) < STREAM_WINDOW:
                reading = asyncio.ensure_future(anext(source, None))
            until = [t for t in (reading, waiting[0][1] if waiting else None) if t is not None]
            await asyncio.wait(until, return_when=asyncio.FIRST_COMPLETED)
            if reading is not None and reading.done():
                request = reading.result()
                reading = None
                if request is None:
                    more = False
                else:
                    start(unwrap(request))
            while waiting and waiting[0][1].done():
                yield await first()
    finally:
        if reading is not None:
            reading.cancel()
        for child, _ in waiting:
            child.cancel()


def resolve_soon(loop: asyncio.AbstractEventLoop, future: asyncio.Future[Call], call: Call) -> None:
    """Give an ended call to the future that waits for it, from any thread."""

    def resolve() -> None:
        if not future.done():
            future.set_result(call)

    loop.call_soon_threadsafe(resolve)


def add_facts(total: CallFacts, part: CallFacts) -> None:
    """Count a part of a call, such as one request of a stream, with the whole."""
    total.model, total.version = part.model, part.version
    total.items += part.items
    total.tokens += part.tokens
    total.truncated += part.truncated
    total.cached += part.cached
    total.engine_s += part.engine_s
