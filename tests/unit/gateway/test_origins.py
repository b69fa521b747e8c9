"""Whose pages may change something, and open WebSockets."""

from __future__ import annotations

import pytest
from forebay.settings import HttpSettings, load_settings
from forebay_gateway.app import create_app
from forebay_gateway.origins import names
from starlette.testclient import TestClient, WebSocketDenialResponse
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
    assert isinstance(e.value, WebSocketDenialResponse)
    assert e.value.status_code == REFUSED
    assert "http.cors_origins" in e.value.json()["error"]["message"]


def names_of(**values: object) -> frozenset[str] | None:
    given = {k.replace("__", "."): v for k, v in values.items()}
    return names(load_settings(given, environ={}).settings)


def test_whose_names_are_asked_for() -> None:
    assert names_of() == {"127.0.0.1"}
    assert names_of(http__host="::1", http__cors_origins=["https://AI.example:8443", "["]) == {
        "::1",
        "ai.example",
    }
    beyond = {"http__host": "0.0.0.0", "auth__required": "never", "auth__allow_insecure_bind": True}
    for free in (
        {"auth__required": "always"},
        {"grpc__host": "0.0.0.0"},  # so that keys are required
        {"http__cors_origins": ["*"]},
        beyond,
    ):
        assert names_of(**free) is None


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", PASSES),
        ("LOCALHOST.:8080", PASSES),
        ("forebay.localhost:8080", PASSES),
        ("127.0.0.1:8080", PASSES),
        ("127.9.8.7", PASSES),
        ("[::1]:8080", PASSES),
        ("ai.example", PASSES),
        ("AI.example:443", PASSES),
        ("evil.example", REFUSED),
        ("evil.example:8080", REFUSED),
        ("evil.ai.example", REFUSED),
        ("notlocalhost", REFUSED),
        ("localhost.evil.example", REFUSED),
        ("127.0.0.1.evil.example", REFUSED),
        ("localhost@evil.example", REFUSED),
        ("10.0.0.1:8080", REFUSED),
        ("[", REFUSED),
    ],
)
def test_hosts_of_a_gateway_without_keys(host: str, status: int) -> None:
    app = create_app(HttpSettings(), "127.0.0.1:1", names={"ai.example"})
    # A page of a name that means 127.0.0.1 for a while is of one origin with it, and may add any header.
    headers = {"host": host, "origin": f"http://{host}", "authorization": "Bearer x"}
    answer = TestClient(app).post(PATH, json={"texts": ["a"]}, headers=headers)
    assert answer.status_code == status
    read = TestClient(app).get("/healthz", headers=headers)
    assert read.status_code == (200 if status == PASSES else REFUSED)
    if status == REFUSED:
        error = read.json()["error"]
        assert error["code"] == "host_not_allowed"
        assert "http.cors_origins" in error["message"] and "auth.required" in error["message"]
