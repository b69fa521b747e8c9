"""The Prometheus exposition over plain HTTP, on loopback alone.

Others reach it through the gateway's /metrics, which asks for a key where keys are required.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable


class MetricsListener:
    """Answers `GET /metrics`; everything else is 404."""

    def __init__(self, exposition: Callable[[], bytes]) -> None:
        self._exposition = exposition
        self._server: asyncio.Server | None = None

    async def start(self, port: int) -> int:
        """Listen; gives the port (0 = any free one)."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", port)
        return int(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(Exception):
            async with asyncio.timeout(5):
                request = await reader.readuntil(b"\r\n\r\n")
                good = request.startswith(b"GET /metrics ")
                body = self._exposition() if good else b"not found\n"
                status = b"200 OK" if good else b"404 Not Found"
                writer.write(
                    b"HTTP/1.1 %s\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n"
                    b"Content-Length: %d\r\nConnection: close\r\n\r\n" % (status, len(body))
                )
                writer.write(body)
                await writer.drain()
        writer.close()
