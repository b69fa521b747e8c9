"""`forebay gateway`: the HTTP process."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import uvicorn
from forebay.settings import Settings

from forebay_gateway.app import create_app


def run(settings: Settings) -> None:
    """Serve until a signal, then let running requests end."""
    http = settings.http
    target = http.upstream or f"{settings.grpc.host}:{settings.grpc.port}"
    port = settings.observability.metrics_port
    app = create_app(http, target, scraper(port) if port > 0 else None)
    uvicorn.run(
        app,
        host=http.host,
        port=http.port,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=int(settings.grpc.drain_s),
        server_header=False,
        proxy_headers=False,  # nothing here asks for the address or the scheme of a client
    )


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
