"""The HTTP port where the server has it: the same answers as by way of the gateway, and its bounds."""

from __future__ import annotations

import contextlib
import gzip
import importlib.util
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from forebay.settings import load_settings
from forebay_cli.serve import http_port
from forebay_gateway import direct

from tests.conftest import Live
from tests.integration.gateway import Gateway
from tests.integration.test_inference import ROW

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("forebay_native") is None,
    reason="the extension forebay_native is not built (cargo is needed)",
)
BODY_LIMIT = 50_000
RECEIVE_S, IDLE_S = 1.0, 3.0
PREDICT = "/api/v1/tabular:predict"
EMBED = "/api/v1/embeddings:embed"
INFER = "/v2/models/iris/infer"


@pytest.fixture(scope="module")
def server(starters: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    values = {
        "home": tmp_path_factory.mktemp("home"),
        "models.root": starters,
        "grpc.port": 0,
        "grpc.lane": "fast",
        "grpc.receive_timeout_s": RECEIVE_S,
        "http.max_body_bytes": BODY_LIMIT,
        "http.idle_timeout_s": IDLE_S,
        "http.cors_origins": ["https://app.example"],
    }
    live = Live(load_settings(values, environ={}).settings)
    yield live
    live.stop()


@pytest.fixture(scope="module")
def doors(server: Live) -> Iterator[tuple[Gateway, Gateway]]:
    """The server's own port, and a gateway on a port of its own."""
    same = {"max_body_bytes": BODY_LIMIT, "cors_origins": ["https://app.example"]}
    both = Gateway(server, **same), Gateway(server.target, **same)
    yield both
    for door in both:
        door.stop()


@pytest.fixture(scope="module")
def port(doors: tuple[Gateway, Gateway]) -> int:
    return doors[0].port


def tensors(**more: object) -> bytes:
    names = ("sepal_length", "sepal_width", "petal_length", "petal_width")
    inputs = [{"name": n, "datatype": "FP32", "shape": [1, 1], "data": [5.1]} for n in names]
    return json.dumps({"inputs": inputs, **more}).encode()


def binary() -> tuple[bytes, dict[str, str]]:
    names = ("sepal_length", "sepal_width", "petal_length", "petal_width")
    raw = np.array([5.1], "<f4").tobytes()
    size = {"binary_data_size": len(raw)}
    inputs = [{"name": n, "datatype": "FP32", "shape": [1, 1], "parameters": size} for n in names]
    wish = {"inputs": inputs, "parameters": {"binary_data_output": True}}
    head = json.dumps(wish).encode()
    return head + raw * 4, {"inference-header-content-length": str(len(head))}


def said(**body: object) -> bytes:
    return json.dumps(body).encode()


TEXTS = said(model="minilm", texts=["a", "b"])
CASES = {
    "predict": (PREDICT, said(rows=[ROW]), {}),
    "embed": (EMBED, TEXTS, {}),
    "classify": ("/api/v1/classification:classify", said(texts=["good"]), {}),
    "rerank": ("/api/v1/rerank", said(query="a", documents=["a", "b"]), {}),
    "rerank as Cohere": (
        "/v1/rerank",
        said(query="a", documents=["a", {"text": "b"}], return_documents=True),
        {},
    ),
    "rerank as Cohere, wrong": ("/v2/rerank", said(query="a", documents=["a", 1]), {}),
    "embeddings": ("/v1/embeddings", said(model="minilm", input=["a", "b"]), {}),
    "base64": ("/v1/embeddings", said(input="a", model="minilm", encoding_format="base64"), {}),
    "infer": (INFER, tensors(id="seven"), {}),
    "infer, a version": ("/v2/models/iris/versions/1/infer", tensors(), {}),
    "infer, binary": (INFER, *binary()),
    "infer, packed answer": (INFER, tensors(), {"accept-encoding": "gzip"}),
    "packed body": (EMBED, gzip.compress(TEXTS), {"content-encoding": "gzip"}),
    "packed tensors": (INFER, gzip.compress(tensors()), {"content-encoding": "gzip"}),
    "another origin": (EMBED, TEXTS, {"origin": "https://app.example"}),
    "escaped name": ("/v2/models/ir%69s/infer", tensors(), {}),
    "a query": (f"{EMBED}?x=1", TEXTS, {}),
    "a time": (EMBED, TEXTS, {"x-forebay-timeout-ms": "20000"}),
    "too late": (EMBED, said(texts=["word " * 200] * 40), {"grpc-timeout": "2m"}),
    "no time": (EMBED, TEXTS, {"x-forebay-timeout-ms": "soon"}),
    "no such time": (EMBED, TEXTS, {"grpc-timeout": "soon"}),
    "no JSON": (EMBED, b"{", {}),
    "no object": (EMBED, b"[]", {}),
    "nothing": (EMBED, b"", {}),
    "unknown field": (EMBED, said(texts=["a"], txets=1), {}),
    "wrong type": (EMBED, said(texts=5), {}),
    "unknown model": (EMBED, said(model="minilmm", texts=["a"]), {}),
    "unknown model, infer": ("/v2/models/irsi/infer", tensors(), {}),
    "wrong tensors": (INFER, said(inputs=3), {}),
    "wrong header": (INFER, tensors(), {"inference-header-content-length": "99999"}),
    "too large": (EMBED, said(texts=["x" * BODY_LIMIT]), {}),
    "no row": (PREDICT, said(rows=[{"a": 1}]), {}),
}
#: Headers that are compared.
TOLD = (
    "content-type",
    "content-encoding",
    "access-control-allow-origin",
    "inference-header-content-length",
    "x-request-id",
    "retry-after",
)


def told(response: httpx.Response) -> dict[str, str]:
    return {k: response.headers[k] for k in TOLD if k in response.headers}


@pytest.mark.parametrize("case", CASES)
def test_both_doors_say_the_same(doors: tuple[Gateway, Gateway], case: str) -> None:
    path, body, headers = CASES[case]
    headers = {"accept-encoding": "identity", "x-request-id": "one", **headers}
    by_port, by_gateway = (d.http.post(path, content=body, headers=headers) for d in doors)
    assert by_port.status_code == by_gateway.status_code, by_port.text
    ours, theirs = told(by_port), told(by_gateway)
    if by_port.status_code >= 400:
        # What never came to the server has no id there.
        ours.pop("x-request-id", None)
        theirs.pop("x-request-id", None)
    assert ours == theirs
    if by_port.headers["content-type"] != "application/json":
        assert by_port.content == by_gateway.content
        return
    first, second = by_port.json(), by_gateway.json()
    if case == "too late":  # by the server's clock or by the gateway's
        first["error"].pop("message"), second["error"].pop("message")
    for answer in (first, second):
        answer.pop("timing", None)
        if "usage" in answer:
            answer["usage"].pop("cached", None)  # by the first one's answer
    if "embeddings" in first:
        a, b = (np.array([e["values"] for e in x.pop("embeddings")]) for x in (first, second))
        np.testing.assert_allclose(a, b, atol=1e-4)  # batches differ
    elif case in ("embeddings", "base64"):
        first.pop("data"), second.pop("data")
    assert first == second


def test_pages_of_other_sites_have_nothing_done(doors: tuple[Gateway, Gateway]) -> None:
    for door in doors:
        own = str(door.http.base_url).rstrip("/")
        for origin, status in (
            (own, 200),
            ("https://app.example", 200),
            ("https://evil.example", 403),
        ):
            # As a browser sends it without asking first.
            headers = {"origin": origin, "content-type": "text/plain"}
            answer = door.http.post(EMBED, content=TEXTS, headers=headers)
            assert answer.status_code == status, (origin, answer.text)
        assert answer.json()["error"]["code"] == "origin_not_allowed"


def test_the_routes_are_those_of_batched_methods() -> None:
    paths = {r.path for r in direct.routes()}
    assert {PREDICT, EMBED, "/v1/embeddings", "/v1/rerank", "/v2/models/{name}/infer"} <= paths
    assert "/api/v1/collections/{collection}:search" in paths


def test_one_connection_serves_both_kinds_in_turn(doors: tuple[Gateway, Gateway]) -> None:
    for _ in range(3):
        assert doors[0].http.post(PREDICT, json={"rows": [ROW]}).status_code == 200
        assert doors[0].http.get("/api/v1/models").status_code == 200
        assert doors[0].http.get("/healthz").text == "ok\n"
        assert doors[0].http.post("/nothing").status_code == 404
        assert doors[0].http.get(PREDICT).status_code == 405


def test_a_body_in_pieces(doors: tuple[Gateway, Gateway]) -> None:
    """As .NET's PostAsJsonAsync sends it: without a length."""
    pieces = [TEXTS[:7], TEXTS[7:20], TEXTS[20:]]
    answer = doors[0].http.post(EMBED, content=iter(pieces))
    assert answer.status_code == 200 and len(answer.json()["embeddings"]) == 2
    endless = (b"x" * 10_000 for _ in range(100))
    answer = doors[0].http.post(EMBED, content=endless)
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "too_large"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (EMBED, TEXTS),
        ("/v1/rerank", said(model="minilm", query="a", documents=["a", "b"])),
        ("/v1/moderations", said(input="a")),
    ],
)
def test_who_offers_http_2_is_served_by_http_1(
    doors: tuple[Gateway, Gateway], path: str, body: bytes
) -> None:
    """As Java's HttpClient does with its first request, whoever answers it."""
    offer = {
        "connection": "Upgrade, HTTP2-Settings",
        "upgrade": "h2c",
        "http2-settings": "AAMAAABkAAQBAAAAAAIAAAAA",
    }
    answer = doors[0].http.post(path, content=body, headers=offer)
    assert answer.status_code == 200, answer.text


def test_many_callers_get_their_own_answers(doors: tuple[Gateway, Gateway]) -> None:
    """Each answer is the one of its own request, however they were batched."""
    url, faults = doors[0].url, []

    def ask(n: int) -> None:
        with httpx.Client(base_url=url) as http:
            for i in range(30):
                row = {**ROW, "total_rooms": 500 + n * 30 + i}
                body = {"rows": [row] * (1 + i % 3)}
                answer = http.post(PREDICT, json=body, headers={"x-request-id": f"{n}-{i}"})
                if answer.headers["x-request-id"] != f"{n}-{i}":
                    faults.append(answer.headers)
                if len(answer.json().get("predictions", ())) != 1 + i % 3:
                    faults.append(answer.text)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not faults


def test_requests_are_counted_and_logged_like_calls(
    server: Live, doors: tuple[Gateway, Gateway]
) -> None:
    def count(name: str, **labels: str) -> float:
        return server.server.metrics.registry.get_sample_value(name, labels) or 0.0

    route = {"route": PREDICT, "status": "200"}
    method = {"method": "/forebay.v1.TabularService/Predict", "code": "OK"}
    names = "forebay_http_direct_duration_seconds", "forebay_rpc_server_duration_seconds"
    before = count(f"{names[0]}_count", **route), count(f"{names[1]}_count", **method)
    doors[0].http.post(PREDICT, json={"rows": [ROW]}).raise_for_status()
    deadline = time.monotonic() + 5
    while True:
        after = count(f"{names[0]}_count", **route), count(f"{names[1]}_count", **method)
        if after == (before[0] + 1, before[1] + 1):
            break
        assert time.monotonic() < deadline, (before, after)
        time.sleep(0.01)


def test_where_no_gateway_listens_its_routes_are_unavailable(server: Live) -> None:
    listening = Path(server.gateway_socket)
    away = listening.with_suffix(".away")
    if listening.exists():
        listening.rename(away)
    try:
        url = f"http://127.0.0.1:{server.server.lanes.http_port}"
        answer = httpx.get(f"{url}/api/v1/models")
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "unavailable"
        assert httpx.post(f"{url}{EMBED}", content=TEXTS).status_code == 200
    finally:
        if away.exists():
            away.rename(listening)


def reply_to(port: int, sent: bytes, wait_s: float = 10) -> bytes:
    """All that comes back until the connection ends."""
    with socket.create_connection(("127.0.0.1", port), timeout=wait_s) as raw:
        raw.sendall(sent)
        got = b""
        while piece := raw.recv(65536):
            got += piece
    return got


def test_who_never_ends_its_headers_is_cut_off(port: int) -> None:
    started = time.monotonic()
    got = reply_to(port, b"POST " + EMBED.encode() + b" HTTP/1.1\r\nHost: x\r\n")
    assert b" 200 " not in got
    assert time.monotonic() - started < IDLE_S + 3


def test_who_never_ends_its_body_is_told(port: int) -> None:
    head = f"POST {EMBED} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n".encode()
    assert reply_to(port, head + b"{").startswith(b"HTTP/1.1 504 ")


@pytest.mark.parametrize(
    ("path", "size", "status"),
    [("/v1/moderations", 100, 504), ("/v1/moderations", 10 * BODY_LIMIT, 413), ("/no", 100, 404)],
)
def test_who_never_ends_a_body_for_the_gateway_is_cut_off(
    port: int, path: str, size: int, status: int
) -> None:
    """Also when the answer does not wait for it: who is gone without a word must hold no connection."""
    started = time.monotonic()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n\r\n".encode()
    assert reply_to(port, head + b"{").startswith(f"HTTP/1.1 {status} ".encode())
    assert time.monotonic() - started < IDLE_S + 3


def dribbled(port: int, path: str, body: bytes, size: int) -> bytes:
    """The answer to a body that comes in so large pieces, one each quarter of a second."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as raw:
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        raw.sendall(head.encode())
        for at in range(0, len(body), size):
            raw.sendall(body[at : at + size])
            raw.settimeout(0.25)
            with contextlib.suppress(TimeoutError):
                return raw.recv(65536)
        raw.settimeout(10)
        return raw.recv(65536)


@pytest.mark.parametrize("size", [1, 20])
def test_who_dribbles_a_body_for_the_gateway_is_cut_off(port: int, size: int) -> None:
    body = said(input="a" * 36 * size)
    assert dribbled(port, "/v1/moderations", body, size).startswith(b"HTTP/1.1 504 ")


def test_a_slow_body_for_the_gateway_has_its_time(port: int) -> None:
    body = said(input=["good " * 40] * 20, model="sentiment")
    assert len(body) / 250 * 0.25 > IDLE_S
    assert dribbled(port, "/v1/moderations", body, 250).startswith(b"HTTP/1.1 200 ")


def test_headers_beyond_the_bound_are_refused(port: int) -> None:
    flood = b"".join(b"x-%d: %s\r\n" % (i, b"y" * 1000) for i in range(200))
    got = reply_to(port, b"POST " + EMBED.encode() + b" HTTP/1.1\r\nHost: x\r\n" + flood + b"\r\n")
    assert got.startswith(b"HTTP/1.1 431 ")


@pytest.mark.parametrize(
    "garbage",
    [b"\x16\x03\x01\x02\x00\x01", b"GET\r\n\r\n", b"\x00" * 64, b"PRI * HTTP/2.0\r\n\r\n"],
)
def test_garbage_hurts_nobody(port: int, garbage: bytes) -> None:
    got = reply_to(port, garbage)
    assert got == b"" or got.startswith(b"HTTP/1.1 4")
    answer = httpx.post(f"http://127.0.0.1:{port}{EMBED}", content=TEXTS)
    assert answer.status_code == 200


@pytest.mark.parametrize(
    "smuggled",
    [
        b"Content-Length: 3\r\nContent-Length: 30\r\n\r\n{}",
        b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n",
        b"Content-Length: -1\r\n\r\n{}",
    ],
)
@pytest.mark.parametrize("path", [EMBED, "/api/v1/models:import"])
def test_lengths_that_contradict_make_one_request_at_most(
    port: int, path: str, smuggled: bytes
) -> None:
    """What one end reads as a body, the other must not read as a second request."""
    head = b"POST " + path.encode() + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    hidden = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    got = reply_to(port, head + smuggled + hidden)
    assert got.count(b"HTTP/1.1 ") <= 1
    assert b" 200 " not in got


def test_a_connection_that_is_idle_is_not_one_that_is_slow(port: int) -> None:
    request = f"POST {EMBED} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(TEXTS)}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", port), timeout=10) as raw:
        for _ in range(2):
            raw.sendall(request + TEXTS)
            assert raw.recv(65536).startswith(b"HTTP/1.1 200 ")
            time.sleep(RECEIVE_S * 2)


def test_what_was_accepted_is_answered_when_the_server_ends(starters: Path, tmp_path: Path) -> None:
    values = {"home": tmp_path, "models.root": starters, "grpc.port": 0, "grpc.lane": "fast"}
    live = Live(load_settings(values, environ={}).settings)
    url = f"http://127.0.0.1:{live.server.lanes.http_port}{EMBED}"
    texts = [f"word {i} " * 100 for i in range(60)]
    answers: list[httpx.Response] = []
    asking = threading.Thread(
        target=lambda: answers.append(httpx.post(url, json={"texts": texts}, timeout=60))
    )
    asking.start()
    deadline = time.monotonic() + 10
    while not live.server.metrics.registry.get_sample_value(
        "forebay_rpc_server_active_requests", {"method": "/forebay.v1.EmbeddingService/Embed"}
    ):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    live.stop()
    asking.join(60)
    assert [a.status_code for a in answers] == [200]
    assert answers[0].headers.get("connection") == "close"


@pytest.mark.parametrize(
    ("host", "address"),
    [("::1", "[::1]:80"), ("[::1]", "[::1]:80"), ("127.0.0.1", "127.0.0.1:80")],
)
def test_addresses_are_taken_as_settings_have_them(host: str, address: str) -> None:
    values = {"http.host": host, "http.port": 80, "http.gateway": "/nowhere"}
    found = http_port(load_settings(values, environ={}).settings)
    assert found is not None and found.config()["addresses"] == [address]
