"""Errors that nobody foresaw: each door answers in its shape, and the connection goes on."""

from __future__ import annotations

import http.client
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, cast

import pytest
import uvicorn
from forebay.methods import methods
from forebay_gateway import connect, open_inference, rest
from forebay_gateway.anthropic import messages
from forebay_gateway.protocol import Http1
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

METHOD = methods()["/forebay.v1.ModelService/ListModels"]


async def broken(request: Request) -> Response:
    """An endpoint with a mistake in it."""
    raise TypeError("something of the inside")


async def good(request: Request) -> Response:
    return PlainTextResponse("ok")


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    # Without its upstream this door breaks at the first use of it.
    connected = next(r for r in connect.routes(cast(Any, None)) if r.path == METHOD.path)
    routes = [
        Route("/contract", rest.guarded(broken), methods=["POST"]),
        Route("/messages", messages.guarded(broken), methods=["POST"]),
        Route("/infer", open_inference._guarded(broken), methods=["POST"]),
        Route("/good", rest.guarded(good)),
        connected,
    ]
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    config = uvicorn.Config(Starlette(routes=routes), http=Http1, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield listening.getsockname()[1]
    server.should_exit = True
    thread.join(5)


@pytest.mark.parametrize("path", ["/contract", "/messages", "/infer", METHOD.path])
def test_it_is_answered_logged_and_leaves_the_connection(
    port: int, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    link = http.client.HTTPConnection("127.0.0.1", port)
    with caplog.at_level(logging.ERROR):
        headers = {"x-request-id": "mine-5", "content-type": "application/json"}
        link.request("POST", path, b"{}", headers)
        answer = link.getresponse()
        body = answer.read()
    assert answer.status == 500 and answer.headers["x-request-id"] == "mine-5"
    assert json.loads(body) and b"under request id mine-5" in body
    record = next(r for r in caplog.records if "mine-5" in r.getMessage())
    assert record.exc_info and str(record.exc_info[1]).encode() not in body
    held = link.sock
    link.request("GET", "/good")
    assert link.getresponse().read() == b"ok"
    assert link.sock is held, "the connection was closed"
    link.close()


def test_without_an_id_one_is_given(port: int) -> None:
    link = http.client.HTTPConnection("127.0.0.1", port)
    link.request("POST", "/contract", b"{}", {"x-request-id": "é"})
    answer = link.getresponse()
    number = answer.headers["x-request-id"]
    assert len(number) == 32 and number in json.loads(answer.read())["error"]["message"]
    link.close()
