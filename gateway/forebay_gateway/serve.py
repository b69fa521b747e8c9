"""`forebay gateway`: the HTTP process."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Awaitable, Callable

import uvicorn
from forebay.addresses import listening
from forebay.settings import Settings
from forebay.tls import tls_files

from forebay_gateway.app import create_app
from forebay_gateway.origins import names
from forebay_gateway.protocol import Http1
from forebay_gateway.tls import Certificates


def run(settings: Settings, shared: bool = False) -> None:
    """Serve until a signal, then let running requests end.

    Args:
        shared: other workers listen on the same port; the kernel gives each its share of connections.

    Raises:
        SettingsError: a file of TLS cannot be read, or is not what it should be.
    """
    http = settings.http
    target = http.upstream or settings.grpc.address
    port = settings.observability.metrics_port
    if shared and (not http.upstream or settings.grpc.gateway_socket):
        # Whether one of several workers is ready says nothing of the others: a channel that was refused
        # once waits before it tries again, and its worker would answer 503 meanwhile.
        _wait_for(settings.grpc.host.strip("[]"), settings.grpc.port)
    # Without an upstream it is this machine's server, whose settings are these. Sockets are in the clear.
    secure = settings.client.secure if http.upstream else settings.grpc.secure
    client = settings.client if secure and not target.startswith("unix:") else None
    metrics = scraper(port) if port > 0 else None
    app = create_app(http, target, metrics, client, names(settings))
    # The socket behind the server is in the clear: the server has the port, and its TLS.
    files = tls_files("http", http) if not http.gateway else None
    config = uvicorn.Config(
        app,
        http=Http1,
        host=http.host,
        port=http.port,
        uds=http.gateway or None,
        # The server keeps its connections: one that ends as it is used would cost a request.
        timeout_keep_alive=86400 if http.gateway else int(http.idle_timeout_s),
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=int(settings.grpc.drain_s),
        server_header=False,
        proxy_headers=False,  # nothing here asks for the address or the scheme of a client
    )
    ended = threading.Event()
    if files is not None:
        certificates = Certificates(files)
        config.ssl_context_factory = lambda _config, _default: certificates.context
        follow = (certificates.take, ended)
        threading.Thread(target=files.follow, args=follow, daemon=True).start()
    uvicorn.Server(config).run(sockets=sockets(http.host, http.port) if shared else None)
    ended.set()


def _wait_for(host: str, port: int) -> None:
    """Until somebody listens there, a minute at most."""
    ends = time.monotonic() + 60
    while time.monotonic() < ends:
        with contextlib.suppress(OSError), socket.create_connection((host, port), 1):
            return
        time.sleep(0.05)


def sockets(host: str, port: int) -> list[socket.socket]:
    """A socket for each address of the host, on a port that others may take as well.

    Raises:
        OSError: the host is unknown, or a program has the port for itself.
    """
    made = []
    for address in listening(host, port):
        sock = socket.socket(address.family)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(address.place)
        made.append(sock)
    return made


def scraper(port: int) -> Callable[[], Awaitable[bytes]]:
    """Reads the server's own exposition, on loopback."""

    async def scrape() -> bytes:
        async with asyncio.timeout(2):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
            data = await reader.read()
            writer.close()
        return data.partition(b"\r\n\r\n")[2]

    return scrape
