"""From calls with their bytes to the services: pipeline, parsing, checks; all per batch.

Both lanes end here, so a call is treated the same whichever lane it came by.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from forebay.constraints import Validator
from forebay.errors import ForebayError, InvalidArgument
from forebay.twins import read_request
from google.protobuf.message import DecodeError, Message

from forebay_server.core.call import Call
from forebay_server.core.collector import together
from forebay_server.services.base import Handler
from forebay_server.transport.http_port import Direct
from forebay_server.transport.pipeline import Pipeline, guard, internal
from forebay_server.transport.streams import Streams

log = logging.getLogger("forebay.transport")


class Dispatcher:
    """Passes calls of batched methods, and of server streams, to their services."""

    def __init__(
        self, handlers: Mapping[str, Handler], pipeline: Pipeline, validator: Validator
    ) -> None:
        self._handlers = handlers
        self._pipeline = pipeline
        self._validator = validator
        #: Takes calls whose answers are streams; set by the lane that passes such calls.
        self.streams: Streams | None = None

    def serve(self, calls: Sequence[Call]) -> None:
        """Start calls, of any methods. Never raises: what goes wrong ends calls."""
        try:
            with together():
                self._serve(calls)
        except Exception:  # a thread that dies would leave every later caller waiting
            log.exception("dispatching failed")
            for call in calls:
                call.fail(ForebayError("internal error"))

    def _serve(self, calls: Sequence[Call]) -> None:
        by_path: dict[str, list[Call]] = {}
        for call in self._pipeline.begin(calls):
            if isinstance(call.origin, Direct) and not _read(call, call.origin):
                continue
            by_path.setdefault(call.method.path, []).append(call)
        for path, own in by_path.items():
            handler = self._handlers[path]
            guard(lambda h=handler, c=own: self._start(h, c), own)

    def _start(self, handler: Handler, calls: list[Call]) -> None:
        rest = calls if handler.raw is None else handler.raw(calls)
        parsed = []
        for call in rest:
            try:
                call.request = parse(call.method.request, call.message)
                self._validator.check(call.request)
            except ForebayError as e:
                call.fail(e)
                continue
            parsed.append(call)
        if not parsed:
            return
        if handler.method.batched:
            handler.function(parsed)
        else:
            assert self.streams is not None
            self.streams.start(handler, parsed)


def _read(call: Call, direct: Direct) -> bool:
    """Read a call that came by HTTP; False when that has ended it."""
    try:
        direct.read(call)
        return True
    except ForebayError as e:
        call.fail(e)
    except Exception as e:
        log.exception("reading a request of %s failed", direct.route.path)
        call.fail(internal(call), cause=e)
    return False


def parse(kind: type[Message], data: bytes) -> Message:
    """The message of these bytes, or its twin. Raises InvalidArgument when they are none."""
    try:
        return read_request(kind, data)
    except DecodeError:
        name = kind.DESCRIPTOR.full_name
        raise InvalidArgument.at("request", f"the bytes are not a {name} message") from None
