"""The fast lane: the Rust extension `forebay_native` terminates gRPC, and hands over all calls of
batched methods and of server streams that wait, as one list. It passes all others to the ordinary lane.

Its sources are in server/native. Without it the ordinary lane serves alone: all works, only slower.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import grpc
from forebay.addresses import listening
from forebay.errors import MessageTooLarge, QueueFull
from forebay.methods import Method
from forebay.settings import GrpcSettings, SettingsError
from forebay.tls import Pem, TlsFiles, tls_files

from forebay_server.core.call import Call
from forebay_server.core.collector import Collector
from forebay_server.services.base import Handler
from forebay_server.transport.dispatch import Dispatcher
from forebay_server.transport.http_port import Direct, HttpPort
from forebay_server.transport.inbox import MAX_TAKE
from forebay_server.transport.leasing import Leasing
from forebay_server.transport.pipeline import (
    REQUEST_ID,
    TOO_MANY_RETRY_S,
    Pipeline,
    pushback_s,
    too_late,
    too_many,
    trailers_of,
)
from forebay_server.transport.streams import Streams

if TYPE_CHECKING:
    import forebay_native

log = logging.getLogger("forebay.transport")

#: The kind of methods whose answers are streams.
STREAM = "server_stream"
#: Seconds between two looks at what the extension has refused by itself.
COUNT_S = 0.5
_CODES = {code.name: int(code.value[0]) for code in grpc.StatusCode}


def available() -> bool:
    """Whether the extension is installed."""
    return importlib.util.find_spec("forebay_native") is not None


class FastLane:
    """Listens on the server's port.

    Args:
        ordinary: path of the ordinary lane's Unix socket.
        refused: hears of calls of a method that the extension refused because too much waits.
        http: a second port, for HTTP.
        http_ended: hears of its answers: route, status, and how long each took.
        leasing: lets the extension answer some calls by itself; None: it answers none.

    Raises:
        OSError: it cannot listen there.
        SettingsError: the TLS files cannot be read, or are not what they should be.
    """

    def __init__(
        self,
        settings: GrpcSettings,
        handlers: Mapping[str, Handler],
        pipeline: Pipeline,
        dispatcher: Dispatcher,
        loop: asyncio.AbstractEventLoop,
        ordinary: str,
        refused: Callable[[str, int], None],
        http: HttpPort | None = None,
        http_ended: Callable[[str, int, Sequence[float]], None] = lambda route, status, took: None,
        leasing: Leasing | None = None,
    ) -> None:
        import forebay_native

        self._settings = settings
        self._pipeline = pipeline
        self._dispatcher = dispatcher
        self._refused = refused
        self._count_at = 0.0
        self.streams = Streams(loop, forebay_native.Server.send)
        dispatcher.streams = self.streams
        self._methods = [
            h.method for h in handlers.values() if h.method.batched or h.method.kind == STREAM
        ]
        self._http = http
        self._http_ended = http_ended
        self._routes = list(http.routes) if http is not None else []
        full = too_many()
        tls = tls_files("grpc", settings)
        http_tls = http.tls if http is not None else None
        try:
            self._server = forebay_native.Server(
                _addresses(settings),
                [(m.path, _telling(m), m.kind == STREAM) for m in self._methods],
                ordinary,
                threads=settings.transport_threads,
                max_message_bytes=settings.max_message_bytes,
                max_header_bytes=settings.max_header_bytes,
                max_connections=settings.max_connections,
                max_streams=settings.max_streams,
                max_waiting_calls=settings.max_waiting_calls,
                max_waiting_bytes=settings.max_waiting_bytes,
                max_waiting_s=settings.max_waiting_s,
                keepalive_s=settings.keepalive_s,
                keepalive_timeout_s=settings.keepalive_timeout_s,
                max_age_s=settings.max_connection_age_s,
                age_grace_s=settings.drain_s,
                receive_timeout_s=settings.receive_timeout_s,
                overload=(full.message, full.to_status().SerializeToString(), TOO_MANY_RETRY_S),
                too_large=_too_large(settings.max_message_bytes),
                id_prefix=secrets.token_hex(8),
                tls=tls.read() if tls is not None else None,
                http=http.config() if http is not None else None,
                http_tls=http_tls.read() if http_tls is not None else None,
            )
        except ValueError as e:  # what it says of the TLS files
            raise SettingsError(str(e)) from None
        self.port = self._server.port
        self.http_port = self._server.http_port
        self._leasing = leasing
        if leasing is not None:
            leasing.start(self._server)
        self._on_end = Collector(self._end).add
        self._ending = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, name=f"fast-ingest-{i}", daemon=True)
            for i in range(settings.ingest_threads)
        ]
        for files, of_http in ((tls, False), (http_tls, True)):
            if files is not None:
                renew = (files, of_http)
                self._threads.append(threading.Thread(target=self._renew, args=renew, daemon=True))
        for thread in self._threads:
            thread.start()

    def leave(self) -> None:
        """Take no more HTTP connections, and end those that there are after their requests."""
        self._server.drain_http()

    def drain(self, timeout_s: float) -> None:
        """Stop listening, and answer what has been accepted. Blocks."""
        if not self._server.drain(timeout_s):
            log.warning("%d connections were still open", self.stats()["connections"])

    def close(self) -> None:
        """End connections and threads."""
        self._ending.set()
        if self._leasing is not None:
            self._leasing.close()
        self._server.close()
        for thread in self._threads:
            thread.join(timeout=5)

    def stats(self) -> Mapping[str, int]:
        """Counters of the transport; see forebay_native.pyi."""
        return self._server.stats()

    def _run(self) -> None:
        while not self._ending.is_set():
            taken, gone = self._server.take(MAX_TAKE, 1.0)
            now = time.monotonic()
            if now >= self._count_at:
                self._count_at = now + COUNT_S
                self._count_refusals()
            for call, news in gone:
                assert isinstance(call, Call)
                if news == "ready":
                    self.streams.ready(call)
                elif call.method.kind == STREAM:
                    self.streams.gone(call)
                else:
                    call.cancel(too_late(call))
            if taken:
                self._dispatcher.serve([self._call(arrival, now) for arrival in taken])

    def _call(self, arrival: forebay_native.Arrival, now: float) -> Call:
        native, index, message, metadata, peer, waited, left, places = arrival
        route = None
        if index < len(self._methods):
            method = self._methods[index]
        else:  # they are numbered behind
            route = self._routes[index - len(self._methods)]
            method = route.method
        call = Call(
            method,
            metadata,
            started=now - waited,
            deadline=None if left is None else now + left,
            peer=peer,
            on_end=self._on_end,
        )
        call.message = message
        call.origin = native if route is None else Direct(native, route, places)
        native.set_owner(call)
        return call

    def _end(self, calls: list[Call]) -> None:
        """Send the answers of calls that ended together."""
        watch = self._pipeline.end_first(calls)
        try:
            self._answer(calls)
        finally:
            watch()

    def _answer(self, calls: Sequence[Call]) -> None:
        # Calls that were admitted together mostly have the same trailers, but for their ids.
        alike: dict[int, list[Call]] = {}
        failed, direct = [], []
        for call in calls:
            if isinstance(call.origin, Direct):
                direct.append(call)
            elif call.error is None:
                alike.setdefault(id(call.trailers), []).append(call)
            else:
                failed.append(call)
        for group in alike.values():
            self._server.answer_well(
                cast(Any, [c.origin for c in group]),
                [c.payload for c in group],
                REQUEST_ID,
                [c.request_id for c in group],
                group[0].trailers,
            )
            if self._leasing is not None:
                for call in group:
                    if call.recipe is not None:
                        self._leasing.offer(call)
        if direct:
            self._answer_http(direct)
        if failed:
            self._refuse_alike(failed)
            self._server.answer(cast(Any, [self._failure(c) for c in failed]))

    def _answer_http(self, calls: Sequence[Call]) -> None:
        assert self._http is not None
        now = time.monotonic()
        answers, took = [], dict[tuple[str, int], list[float]]()
        for call in calls:
            direct = cast(Direct, call.origin)
            status, headers, body = direct.answer(call, self._http.returned)
            answers.append((direct.native, status, body, headers))
            took.setdefault((direct.route.path, status), []).append(now - call.started)
        self._server.answer_http(answers)
        for (path, status), seconds in took.items():
            self._http_ended(path, status, seconds)

    def _refuse_alike(self, failed: Sequence[Call]) -> None:
        """Have the extension refuse calls that ask the same as one that was just refused."""
        told: set[int] = set()  # calls that were refused together share the error
        for call in failed:
            error = call.error
            if isinstance(error, QueueFull) and error.holds_s > 0 and id(error) not in told:
                told.add(id(error))
                self._server.refuse_alike(
                    cast(Any, call.origin),
                    error.holds_s,
                    error.gap_s,
                    error.within_s,
                    error.by_size,
                    error.message,
                    error.to_status().SerializeToString(),
                    pushback_s(error),
                )

    def _count_refusals(self) -> None:
        methods = [*self._methods, *(r.method for r in self._routes)]
        for method, count in zip(methods, self._server.take_refusals(), strict=True):
            if count:
                self._refused(method.path, count)

    def _failure(self, call: Call) -> tuple[object, int, bytes, str, list[tuple[str, str]]]:
        error = call.error
        assert error is not None
        details = error.to_status().SerializeToString()
        return call.origin, _CODES[error.code], details, error.message, trailers_of(call)

    def _renew(self, files: TlsFiles, http: bool) -> None:
        """Take renewed certificates without a restart."""

        def take(pem: Pem) -> None:
            self._server.set_tls(*pem, http=http)

        files.follow(take, self._ending)


def _addresses(settings: GrpcSettings) -> list[str]:
    if settings.host.startswith("unix:"):
        return [settings.host]
    return [str(a) for a in listening(settings.host, settings.port)]


def _too_large(limit: int) -> bytes:
    status = MessageTooLarge(limit).to_status()
    status.ClearField("message")  # the extension says how large each is
    return status.SerializeToString()


def _telling(method: Method) -> list[int]:
    """The fields of a method's requests that tell which model, and so which queue, is meant."""
    if not method.batched:
        return []
    fields = method.request.DESCRIPTOR.fields_by_name
    return [fields[n].number for n in ("model", "model_name", "model_version") if n in fields]
