"""HTTP/1.1 for clients that offer HTTP/2 in clear text.

Java's HttpClient makes the offer (`Upgrade: h2c`) with every request to an http:// address. A server may
ignore it. httptools' parser ends at it instead, and the body is lost: the client gets 400. h11 reads on.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

_OFFER = re.compile(rb"\r\nupgrade:[ \t]*h2c", re.IGNORECASE)


class _Patient(H11Protocol):
    def _unsupported_upgrade_warning(self) -> None:
        """An offer that is not taken is worth no line in the log, with every request."""


class Http1(HttpToolsProtocol):
    """A connection by httptools, and by h11 from the first request with an offer on."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._slower = lambda: _Patient(config, server_state, app_state, _loop)

    def data_received(self, data: bytes) -> None:
        """Bytes of requests, as they come."""
        between = self.cycle is None or self.cycle.response_complete
        if between and _OFFER.search(data, 0, data.find(b"\r\n\r\n")):
            self._unset_keepalive_if_required()
            self.connections.discard(self)
            protocol = self._slower()
            protocol.connection_made(self.transport)
            self.transport.set_protocol(protocol)
            protocol.data_received(data)
        else:
            super().data_received(data)
