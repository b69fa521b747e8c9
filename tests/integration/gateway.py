"""A gateway in the tests' own process."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path

import httpx
import uvicorn
from forebay.settings import HttpSettings
from forebay_gateway.app import create_app
from forebay_gateway.protocol import Http1

from tests.conftest import Live


class Gateway:
    """uvicorn in a thread: on a port, or where the server has the HTTP port, on the socket behind it."""

    def __init__(self, server: Live | str, server_metrics=None, names=None, **settings) -> None:
        target = server if isinstance(server, str) else server.target
        if isinstance(server, str) or not server.gateway_socket:
            self._socket = socket.socket()
            self._socket.bind(("127.0.0.1", 0))
            self.port = self._socket.getsockname()[1]
        else:
            self._socket = socket.socket(socket.AF_UNIX)
            Path(server.gateway_socket).unlink(missing_ok=True)
            self._socket.bind(server.gateway_socket)
            self.port = server.server.lanes.http_port
        app = create_app(HttpSettings(**settings), target, server_metrics, names=names)
        config = uvicorn.Config(app, http=Http1, log_level="error", access_log=False)
        if self._socket.family is socket.AF_UNIX:  # as forebay_gateway.serve has it
            config.timeout_keep_alive = 86400
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True
        )
        self._thread.start()
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.url, timeout=60)
        deadline = time.monotonic() + 10
        while not self._server.started:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def stop(self) -> None:
        self.http.close()
        self._server.should_exit = True
        self._thread.join(5)


def error_of(response: httpx.Response) -> dict:
    return response.json()["error"]
