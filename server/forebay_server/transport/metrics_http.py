"""The Prometheus exposition over plain HTTP, on loopback alone.

Others reach it through the gateway's /metrics, which asks for a key where keys are required.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

log = logging.getLogger("forebay.transport")


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
        try:
            async with asyncio.timeout(5):
                request = await reader.readuntil(b"\r\n\r\n")
                status, body = self._answer(request)
                writer.write(
                    b"HTTP/1.1 %s\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n"
                    b"Content-Length: %d\r\nConnection: close\r\n\r\n" % (status, len(body))
                )
                writer.write(body)
                await writer.drain()
        except (OSError, EOFError, asyncio.LimitOverrunError):
            pass  # too slow, gone, or no HTTP: there is nobody to answer
        finally:
            writer.close()

    def _answer(self, request: bytes) -> tuple[bytes, bytes]:
        if not request.startswith(b"GET /metrics "):
            return b"404 Not Found", b"not found\n"
        try:
            return b"200 OK", self._exposition()
        except Exception:
            log.exception("the metrics cannot be written")
            # A comment in this format: the gateway puts what comes behind its own metrics.
            return b"500 Internal Server Error", b"# cannot be written; see the log\n"
