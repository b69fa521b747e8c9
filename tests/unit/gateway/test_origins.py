"""Whose pages may change something, and open WebSockets."""

from __future__ import annotations

import pytest
from forebay.settings import HttpSettings
from forebay_gateway.app import create_app
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

PATH = "/api/v1/tokens:count"
OURS, THEIRS = "http://testserver", "https://evil.example"
#: Past the check there is no server: 503.
PASSES, REFUSED = 503, 403


def client(*allowed: str) -> TestClient:
    return TestClient(create_app(HttpSettings(cors_origins=list(allowed)), "127.0.0.1:1"))


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, PASSES),  # no browser
        ({"origin": OURS}, PASSES),
        ({"origin": THEIRS}, REFUSED),
        ({"origin": "null"}, REFUSED),
        ({"origin": "http://testserver:8080"}, REFUSED),
        ({"origin": THEIRS, "sec-fetch-site": "cross-site"}, REFUSED),
        ({"origin": THEIRS, "sec-fetch-site": "same-site"}, REFUSED),
        ({"origin": THEIRS, "sec-fetch-site": "same-origin"}, PASSES),  # a proxy has another Host
        ({"origin": OURS, "sec-fetch-site": "cross-site"}, REFUSED),
        ({"origin": THEIRS, "authorization": "Bearer k"}, PASSES),
        ({"origin": THEIRS, "x-api-key": "k"}, PASSES),
        ({"origin": THEIRS, "cookie": "a=b"}, REFUSED),
    ],
)
def test_posts_of_pages(headers: dict[str, str], status: int) -> None:
    answer = client().post(PATH, content=b'{"texts":["a"]}', headers=headers)
    assert answer.status_code == status
    if status == REFUSED:
        assert answer.json()["error"]["code"] == "origin_not_allowed"
        assert "http.cors_origins" in answer.json()["error"]["message"]


@pytest.mark.parametrize("allowed", [THEIRS, "*"])
def test_origins_that_are_allowed(allowed: str) -> None:
    answer = client(allowed).post(PATH, json={"texts": ["a"]}, headers={"origin": THEIRS})
    assert answer.status_code == PASSES


def test_reading_is_for_cors_to_decide() -> None:
    answer = client().get("/healthz", headers={"origin": THEIRS})
    assert answer.status_code == 200
    assert "access-control-allow-origin" not in answer.headers


def test_websockets_of_other_sites_are_not_accepted() -> None:
    with (
        pytest.raises(WebSocketDisconnect) as e,
        client().websocket_connect("/api/v1/predictions:stream", headers={"origin": THEIRS}),
    ):
        pass
    assert "http.cors_origins" in e.value.reason
