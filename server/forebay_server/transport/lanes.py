"""Both lanes of the transport on one port, from listening to the orderly end.

With the extension, the fast lane has the port, and the ordinary lane a Unix socket behind it.
Without, the ordinary lane has the port.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import grpc
from forebay.addresses import listening
from forebay.constraints import Validator
from forebay.settings import GrpcSettings
from forebay.sockets import SocketFolder
from forebay.tls import tls_files
from grpc import aio

from forebay_server.access.idempotency import IdempotencyStore
from forebay_server.services.base import Handler
from forebay_server.transport.dispatch import Dispatcher
from forebay_server.transport.fast import FastLane, available
from forebay_server.transport.http_port import HttpPort
from forebay_server.transport.inbox import Inbox
from forebay_server.transport.leasing import Leasing
from forebay_server.transport.ordinary import OrdinaryLane
from forebay_server.transport.pipeline import Pipeline
from forebay_server.transport.unknown import UnknownMethods


def choose(settings: GrpcSettings) -> Literal["fast", "ordinary"]:
    """The lane that serves the port. Raises OSError when the one asked for is not installed."""
    if settings.lane == "fast" and not available():
        raise OSError("grpc.lane is 'fast', but the extension forebay_native is not installed")
    return "ordinary" if settings.lane == "ordinary" or not available() else "fast"


class Lanes:
    """The server's gRPC port, and the HTTP port where the server has it."""

    def __init__(
        self,
        settings: GrpcSettings,
        handlers: Mapping[str, Handler],
        pipeline: Pipeline,
        validator: Validator,
        idempotency: IdempotencyStore,
        refused: Callable[[str, int], None],
        http: HttpPort | None,
        http_ended: Callable[[str, int, Sequence[float]], None],
        leasing: Leasing | None = None,
    ) -> None:
        self.lane = choose(settings)
        if http is not None and self.lane == "ordinary":
            raise OSError("http.gateway is set, but only the fast lane can have the HTTP port")
        self.port = self.http_port = 0
        self._http = http
        self._http_ended = http_ended
        self._leasing = leasing
        self._settings = settings
        self._handlers = handlers
        self._pipeline = pipeline
        self._refused = refused
        self._dispatcher = Dispatcher(handlers, pipeline, validator)
        self._inbox = Inbox(self._dispatcher, settings)
        self._ordinary = OrdinaryLane(
            handlers,
            pipeline,
            self._inbox,
            validator,
            idempotency,
            asyncio.get_running_loop(),
            refused,
            behind=self.lane == "fast",
        )
        self._grpc: aio.Server | None = None
        self._fast: FastLane | None = None
        self._folder: SocketFolder | None = None

    async def start(self, servicers: Iterable[Any]) -> None:
        """Listen.

        Args:
            servicers: functions that add standard services (health, reflection) to a server.

        Raises:
            OSError: the address is taken.
            SettingsError: the TLS files cannot be read, or are not what they should be.
        """
        s = self._settings
        server = self._grpc = aio.server(options=self._options())
        server.add_generic_rpc_handlers((self._ordinary,))
        for add in servicers:
            add(server)
        server.add_generic_rpc_handlers((UnknownMethods(),))
        if s.gateway_socket:
            self._bind(server, f"unix:{s.gateway_socket}", None)
        if self.lane == "ordinary":
            self.port = self._listen(server)
            await server.start()
            return
        self._folder = SocketFolder()
        socket = str(self._folder.path / "ordinary.sock")
        self._bind(server, f"unix:{socket}", None)
        await server.start()
        self._fast = FastLane(
            s,
            self._handlers,
            self._pipeline,
            self._dispatcher,
            asyncio.get_running_loop(),
            socket,
            self._refused,
            self._http,
            self._http_ended,
            self._leasing,
        )
        self.port, self.http_port = self._fast.port, self._fast.http_port

    async def wait(self) -> None:
        """Until the server has stopped."""
        assert self._grpc is not None
        await self._grpc.wait_for_termination()

    def leave(self) -> None:
        """Take no more HTTP connections; gRPC goes on."""
        if self._fast is not None:
            self._fast.leave()

    async def stop(self) -> None:
        """Refuse new calls, answer those that were accepted, close. Also what a start that failed has opened."""
        drain_s = self._settings.drain_s
        if self._fast is not None:
            # First: the ordinary lane still serves what the fast lane's connections bring.
            await asyncio.to_thread(self._fast.drain, drain_s)
            await self._fast.streams.close()  # those that are open still hear of the end
            assert self._grpc is not None
            await self._grpc.stop(0.2)
            await asyncio.to_thread(self._fast.close)
        elif self._grpc is not None:
            await self._grpc.stop(drain_s)
        await asyncio.to_thread(self._inbox.close)
        if self._folder is not None:
            self._folder.remove()

    def stats(self) -> Mapping[str, int]:
        """Counters of the fast lane; empty without it."""
        return self._fast.stats() if self._fast is not None else {}

    def _options(self) -> list[tuple[str, int]]:
        s = self._settings
        alone = self.lane == "ordinary"
        # The fast lane has looked already, and adds a caller's address.
        header_bytes = s.max_header_bytes + (0 if alone else 1024)
        options = [
            ("grpc.max_receive_message_length", s.max_message_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.keepalive_time_ms", int(s.keepalive_s * 1000)),
            ("grpc.keepalive_timeout_ms", int(s.keepalive_timeout_s * 1000)),
            # Idle connections are pinged and may ping; else gRPC ends those that do, as too_many_pings.
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", 1000),
            ("grpc.so_reuseport", 0),
            # The first alone is where gRPC begins to refuse some, by chance.
            ("grpc.max_metadata_size", header_bytes),
            ("grpc.absolute_max_metadata_size", header_bytes),
        ]
        if alone:
            options.append(("grpc.max_concurrent_streams", s.max_streams))
        if s.max_connection_age_s and alone:
            options.append(("grpc.max_connection_age_ms", int(s.max_connection_age_s * 1000)))
            options.append(("grpc.max_connection_age_grace_ms", int(s.drain_s * 1000)))
        return options

    def _listen(self, server: aio.Server) -> int:
        """Take the port, at all addresses of its host."""
        s, credentials = self._settings, self._credentials()
        if s.host.startswith("unix:"):
            return self._bind(server, s.host, credentials)
        port = s.port
        for address in listening(s.host, port):
            port = self._bind(server, str(address.at(port)), credentials)
        return port

    def _bind(
        self, server: aio.Server, address: str, credentials: grpc.ServerCredentials | None
    ) -> int:
        try:
            if credentials is not None:
                return server.add_secure_port(address, credentials)
            return server.add_insecure_port(address)
        except RuntimeError as e:
            raise OSError(f"cannot listen on {address}") from e

    def _credentials(self) -> grpc.ServerCredentials | None:
        files = tls_files("grpc", self._settings)
        if files is None:
            return None
        certificate, key, roots = files.read()
        return grpc.ssl_server_credentials(
            [(key, certificate)],
            root_certificates=roots,
            require_client_auth=roots is not None,
        )
