"""What pages of other origins may read of answers."""

from __future__ import annotations

import pytest
from forebay.settings import HttpSettings
from forebay_gateway.app import create_app
from forebay_server.access.limits import Standing
from starlette.requests import Request
from starlette.responses import Response
from starlette.testclient import TestClient

ORIGIN = "https://app.example"


def page(raising: bool = False) -> TestClient:
    app = create_app(HttpSettings(cors_origins=[ORIGIN]), "127.0.0.1:1")

    async def fails(request: Request) -> Response:
        raise RuntimeError("a fault of ours")

    app.add_route("/fails", fails)
    return TestClient(app, raise_server_exceptions=raising, headers={"origin": ORIGIN})


def test_headers_that_tell_when_to_come_back() -> None:
    exposed = page().get("/healthz").headers["access-control-expose-headers"].split(", ")
    standing = Standing(1, 1, 1, 1, 1.0, 1.0)
    limits = [name for name, _ in standing.headers()]
    assert len(limits) == 6
    assert {"x-request-id", "retry-after", "retry-after-ms", *limits} == set(exposed)


def test_faults_of_ours() -> None:
    answer = page().get("/fails")
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal")
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    with pytest.raises(RuntimeError, match="a fault of ours"):  # for the log
        page(raising=True).get("/fails")
