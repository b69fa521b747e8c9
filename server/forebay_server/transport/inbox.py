"""Where calls wait to cross from the transport to the services, as batches.

Ingest threads take all calls that wait, whatever their method, pass them through the pipeline,
parse and check them, and hand each method's calls to its service as one list. A lone call costs
one thread hop; under load the list grows by itself and tokenising, limits and logs run per batch.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from typing import cast

from forebay.constraints import Validator
from forebay.errors import ForebayError, InvalidArgument
from google.protobuf.message import DecodeError, Message

from forebay_server.core.call import Call
from forebay_server.services.base import Handler
from forebay_server.transport.pipeline import Pipeline, guard

log = logging.getLogger("forebay.transport")

#: Calls that one ingest thread takes at once. Bounds the wait of the first of them.
MAX_TAKE = 256


class Inbox:
    """Calls with their unparsed messages, and the threads that take them."""

    def __init__(
        self,
        handlers: Mapping[str, Handler],
        pipeline: Pipeline,
        validator: Validator,
        threads: int = 1,
    ) -> None:
        self._handlers = handlers
        self._pipeline = pipeline
        self._validator = validator
        self._waiting: list[tuple[Call, bytes]] = []
        self._ready = threading.Condition(threading.Lock())
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"ingest-{i}", daemon=True)
            for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def put(self, call: Call, message: bytes) -> None:
        """Hand a call over. Never blocks."""
        with self._ready:
            self._waiting.append((call, message))
            if len(self._waiting) == 1:
                self._ready.notify()

    def close(self) -> None:
        """Let the threads end once nothing waits."""
        with self._ready:
            self._closed = True
            self._ready.notify_all()
        for thread in self._threads:
            thread.join(timeout=5)

    def _take(self) -> list[tuple[Call, bytes]]:
        with self._ready:
            while not self._waiting and not self._closed:
                self._ready.wait()
            taken = self._waiting[:MAX_TAKE]
            del self._waiting[:MAX_TAKE]
            if self._waiting:
                self._ready.notify()
            return taken

    def _run(self) -> None:
        while taken := self._take():
            try:
                self.serve(taken)
            except Exception:  # a thread that dies would leave every later caller waiting
                log.exception("ingest failed")
                for call, _ in taken:
                    call.fail(ForebayError("internal error"))

    def serve(self, taken: list[tuple[Call, bytes]]) -> None:
        """Pass calls through the pipeline to their services."""
        messages = {id(call): message for call, message in taken}
        live = self._pipeline.begin([call for call, _ in taken])
        by_path: dict[str, list[Call]] = {}
        for call in live:
            try:
                call.request = parse(call.method.request, messages[id(call)])
                self._validator.check(call.request)
            except ForebayError as e:
                call.fail(e)
                continue
            by_path.setdefault(call.method.path, []).append(call)
        for path, calls in by_path.items():
            function = self._handlers[path].function
            guard(lambda f=function, c=calls: f(c), calls)


def parse(kind: type[Message], data: bytes) -> Message:
    """The message of these bytes. Raises InvalidArgument when they are none."""
    try:
        return cast(Message, kind.FromString(data))
    except DecodeError:
        name = kind.DESCRIPTOR.full_name
        raise InvalidArgument.at("request", f"the bytes are not a {name} message") from None
