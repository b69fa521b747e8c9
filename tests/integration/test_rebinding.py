"""A site that has its own name mean 127.0.0.1 has nothing of a gateway that needs no key: what a browser
sends for its pages comes with that name, whatever it asks for."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from tests.conftest import Start, copy_models
from tests.integration.gateway import Gateway, error_of
from tests.integration.test_inference import ROW

PREDICT = {"model": "housing", "rows": [ROW]}


@pytest.fixture(scope="module")
def gateway(
    starters: Path, start: Start, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    live = start(copy_models(starters, tmp_path_factory.mktemp("models"), "housing"))
    running = Gateway(live, names={"ai.example"})
    yield running
    running.stop()


def page(host: str) -> dict[str, str]:
    """Headers that a browser sends with a page's own POST."""
    return {"host": host, "origin": f"http://{host}"}


@pytest.mark.parametrize(
    ("verb", "path"),
    [
        ("GET", "/api/v1/models"),
        ("GET", "/ui/"),
        ("POST", "/api/v1/keys"),
        ("POST", "/api/v1/tabular:predict"),  # on the fast lane, straight from the server
        ("POST", "/forebay.v1.TabularService/Predict"),
    ],
)
def test_http(gateway: Gateway, verb: str, path: str) -> None:
    body = {"name": "theirs"} if path.endswith("keys") else PREDICT
    json = body if verb == "POST" else None
    refused = gateway.http.request(verb, path, json=json, headers=page("evil.example:8080"))
    assert refused.status_code == 403, refused.text
    assert error_of(refused)["code"] == "host_not_allowed"
    assert "http.cors_origins" in error_of(refused)["message"]
    for host in (f"localhost:{gateway.port}", "ai.example"):
        assert gateway.http.request(verb, path, json=json, headers=page(host)).status_code == 200


def test_websockets(gateway: Gateway) -> None:
    for host, status in (("evil.example", 403), ("ai.example", 101)):
        there = socket.create_connection(("127.0.0.1", gateway.port), 10)
        try:
            with connect(f"ws://{host}/api/v1/embeddings:embedStream", sock=there):
                assert status == 101
        except InvalidStatus as e:
            assert e.response.status_code == status
            assert b"http.cors_origins" in (e.response.body or b"")
