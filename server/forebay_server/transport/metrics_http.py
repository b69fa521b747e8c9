"""The Prometheus exposition over plain HTTP, on loopback alone.

Others reach it through the gateway's /metrics, which asks for a key where keys are required. A page that a
browser shows on this machine is such another: its site may have its own name mean 127.0.0.1 (DNS rebinding),
so requests for other names than this machine's are refused.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable

from forebay.addresses import is_here, name_of

_HOST = re.compile(rb"\r\nhost:[ \t]*([^\r\n]*?)[ \t]*\r\n", re.IGNORECASE)
log = logging.getLogger("forebay.transport")


class MetricsListener:
    """Answers `GET /metrics`; everything else is 404, and a request for a strange host 403."""

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
        host = _HOST.search(request)  # no browser leaves it out
        if host is not None and host[1] and not is_here(name_of(host[1].decode("latin-1"))):
            return b"403 Forbidden", b"the host is not a name of this machine, such as localhost\n"
        if not request.startswith(b"GET /metrics "):
            return b"404 Not Found", b"not found\n"
        try:
            return b"200 OK", self._exposition()
        except Exception:
            log.exception("the metrics cannot be written")
            # A comment in this format: the gateway puts what comes behind its own metrics.
            return b"500 Internal Server Error", b"# cannot be written; see the log\n"
