"""The HTTP port where the server has it: some routes are answered here, in batches with the calls of
gRPC; the extension passes all others to the gateway over a Unix socket.

What JSON means is the routes' affair: the gateway's package has them (`forebay_gateway.direct`), and the
command line brings both together.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from forebay.addresses import listening
from forebay.errors import (
    DeadlineExceeded,
    ForebayError,
    Internal,
    TooLarge,
    Unavailable,
)
from forebay.methods import Method
from forebay.tls import TlsFiles
from google.rpc import status_pb2

from forebay_server.core.call import Call
from forebay_server.transport.pipeline import too_many, trailers_of

log = logging.getLogger("forebay.transport")

#: Status, headers, body.
Answer = tuple[int, list[tuple[str, str]], bytes]
#: From a response's bytes and the request's id to headers and body.
Writer = Callable[[bytes, str], tuple[Mapping[str, str], bytes]]
#: An error's status with the contract's field paths in the words of the request that it answers.
Rename = Callable[[status_pb2.Status], status_pb2.Status]
#: The extension's key for the answer to a body that is too large; the others are gRPC's codes.
_TOO_LARGE = 0


class Route(Protocol):
    """A path whose POST requests are calls of a method."""

    path: str
    method: Method

    def read(
        self, body: bytes, places: Sequence[str], headers: Mapping[str, str]
    ) -> tuple[bytes, Writer, Rename]:
        """The call's message, what writes its answer, and what puts its errors into its words.

        Args:
            places: what stands in the path's places.

        Raises:
            ForebayError: the request makes no call.
        """
        ...

    def refuse(self, status: status_pb2.Status) -> tuple[int, Mapping[str, str], bytes]:
        """An error's status, headers and body."""
        ...


@dataclass(frozen=True, slots=True)
class HttpPort:
    """What is served there.

    Attributes:
        gateway: path of the gateway's Unix socket.
        forwarded: headers that become a call's metadata.
        returned: which of a call's trailers become headers of its answer.
        aside: requests with one of these headers go to the gateway.
        timeout_s: deadline of calls whose callers name none.
        idle_timeout_s: a connection that has no request, or whose headers do not end, ends then;
            so does a request for the gateway whose body is waited for as long, of which each 500
            bytes give back a second.
        tls: None: the port is in the clear.
    """

    host: str
    port: int
    gateway: str
    routes: Sequence[Route]
    forwarded: Sequence[str]
    returned: Callable[[str], object]
    aside: Sequence[str]
    max_body_bytes: int
    timeout_s: float
    idle_timeout_s: float
    tls: TlsFiles | None = None

    def config(self) -> dict[str, object]:
        """As the extension takes it. Raises OSError: the host is unknown."""
        first = self.routes[0]
        return {
            "addresses": [str(a) for a in listening(self.host, self.port)],
            "gateway": self.gateway,
            "routes": [(r.path, self._errors(r)) for r in self.routes],
            "forwarded": list(self.forwarded),
            "aside": list(self.aside),
            "max_body_bytes": self.max_body_bytes,
            "timeout_s": self.timeout_s,
            "idle_timeout_s": self.idle_timeout_s,
            "unreachable": _canned(first, Unavailable("the gateway does not answer")),
            "stalled": _canned(
                first, DeadlineExceeded("the request did not come in whole", stage="server")
            ),
        }

    def _errors(self, route: Route) -> list[tuple[int, Answer]]:
        """Answers that the extension gives without Python. The first is for all that has none."""
        limit = self.max_body_bytes
        return [
            (14, _canned(route, Unavailable("the server is not ready for this call"))),
            (8, _canned(route, too_many())),
            (4, _canned(route, DeadlineExceeded.during_call())),
            (
                _TOO_LARGE,
                _canned(route, TooLarge("body", size=limit + 1, limit=limit, unit="bytes")),
            ),
        ]


class Direct:
    """What the transport keeps of a call that came by HTTP; the call's `origin`."""

    __slots__ = ("native", "places", "rename", "route", "write")

    def __init__(self, native: Any, route: Route, places: Sequence[str]) -> None:
        self.native = native
        self.route = route
        self.places = places
        self.write: Writer | None = None
        self.rename: Rename | None = None

    def read(self, call: Call) -> None:
        """Put the method's message in the place of the body. Raises ForebayError."""
        call.message, self.write, self.rename = self.route.read(
            call.message, self.places, call.metadata
        )

    def answer(self, call: Call, returned: Callable[[str], object]) -> Answer:
        """What goes to the client."""
        headers = [(k, v) for k, v in trailers_of(call) if returned(k)]
        if call.error is None and self.write is not None:
            try:
                own, body = self.write(call.payload, call.request_id)
                return 200, [*headers, *own.items()], body
            except Exception:
                log.exception("writing an answer of %s failed", self.route.path)
        error: ForebayError = call.error or Internal("the answer could not be written")
        told = error.to_status()
        status, more, body = self.route.refuse(self.rename(told) if self.rename else told)
        return status, [*headers, *more.items()], body


def _canned(route: Route, error: ForebayError) -> Answer:
    status, headers, body = route.refuse(error.to_status())
    return status, list(headers.items()), body
