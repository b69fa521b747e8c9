"""Every door of the gateway, against the real server on the real models."""

from __future__ import annotations

import gzip
import http.client
import json
import logging
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from tests.conftest import Live, Start
from tests.integration.gateway import Gateway, error_of
from tests.integration.test_inference import ROW


@pytest.fixture(scope="module")
def live(starters: Path, start: Start) -> Live:
    return start(starters, http__max_body_bytes=1 << 20)


@pytest.fixture(scope="module")
def gateway(live: Live) -> Iterator[Gateway]:
    running = Gateway(live, max_body_bytes=1 << 20)
    yield running
    running.stop()


def test_rest_predict(gateway: Gateway) -> None:
    response = gateway.http.post("/api/v1/tabular:predict", json={"rows": [ROW]})
    assert response.status_code == 200
    body = response.json()
    assert body["predictions"][0]["value"] > 10_000
    assert body["served_by"] == {"model": "housing", "version": 1}
    assert response.headers["x-request-id"]


def test_rest_takes_path_and_query_parameters(gateway: Gateway) -> None:
    assert gateway.http.get("/api/v1/models/iris").json()["model"]["name"] == "iris"
    listed = gateway.http.get("/api/v1/models", params={"task": "TASK_EMBEDDING"}).json()
    assert {m["name"] for m in listed["models"]} == {"minilm", "minilm-int8"}
    first = gateway.http.get("/api/v1/models", params={"page_size": 2}).json()
    assert len(first["models"]) == 2
    params = {"page_size": 100, "page_token": first["next_page_token"]}
    rest = gateway.http.get("/api/v1/models", params=params).json()
    assert len(rest["models"]) == 4


def test_the_longest_time_that_grpc_can_name_has_not_passed(gateway: Gateway) -> None:
    """`99999999H` is how clients say that they have no deadline; it was 504 at once."""
    headers = {"grpc-timeout": "99999999H"}
    assert gateway.http.get("/api/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/api/v1/tabular:predict", {"rows": [ROW], "colour": 1}, "colour"),
        ("/api/v1/embeddings:embed", {"texts": "a"}, None),
        ("/api/v1/embeddings:embed", {"texts": ["a"], "truncation": "NOPE"}, "truncation"),
        ("/api/v1/embeddings:embed", {"texts": ["a"], "dimensions": 7}, "dimensions"),
        ("/api/v1/classification:classify", {}, "texts"),
        ("/v1/embeddings", {"input": "a"}, "model"),
        ("/v1/embeddings", {"input": [], "model": "minilm"}, "input"),
        ("/v1/embeddings", {"input": [1.5], "model": "minilm"}, "input[0]"),
        ("/v1/embeddings", {"input": "a", "model": "minilm", "foo": 1}, "foo"),
        ("/v1/rerank", {"query": "q", "documents": [1]}, "documents[0]"),
    ],
)
def test_bad_requests_are_400_and_name_the_field(gateway, path, body, param) -> None:
    response = gateway.http.post(path, json=body)
    assert response.status_code == 400
    if param is not None:
        assert error_of(response)["param"] == param


@pytest.mark.parametrize("query", ["dry_run=true", "dimensions=8&texts=a"])
@pytest.mark.parametrize(
    "path", ["embeddings:embed", "generation:completeStream", "models:import", "keys/a:revoke"]
)
def test_queries_where_fields_are_in_the_body_are_refused(
    gateway: Gateway, path: str, query: str
) -> None:
    given: dict[str, Any] = {"json": {"texts": ["a"]}}
    if path == "models:import":
        given = {"data": {"model": "x"}, "files": {"files": ("a", b"a")}}
    refused = gateway.http.post(f"/api/v1/{path}?{query}", **given)
    assert (refused.status_code, error_of(refused)["param"]) == (400, query.split("=")[0])


@pytest.mark.parametrize("depth", [60, 300])
def test_filters_too_deep_are_the_callers_error(gateway: Gateway, depth: int) -> None:
    deep = '{"all_of":{"filters":[' * depth + '{"all_of":{}}' + "]}}" * depth
    path = "/api/v1/collections/none:search"
    refused = gateway.http.post(path, content=f'{{"text":"a","filter":{deep}}}')
    assert refused.status_code == 400
    assert (error_of(refused)["param"], "too deep" in refused.text) == ("filter", True)


def test_errors_by_the_table(gateway: Gateway) -> None:
    http = gateway.http
    assert http.post("/api/v1/embeddings:embed", content=b"{oops").status_code == 400
    assert http.post("/api/v1/embeddings:embed", content=b"[1]").status_code == 400
    assert http.get("/api/v1/models/nope").status_code == 404
    assert http.get("/nowhere").status_code == 404
    assert http.get("/v1/embeddings").status_code == 405
    big = http.post("/api/v1/embeddings:embed", content=b"x" * (2 << 20))
    assert big.status_code == 413
    late = http.post(
        "/api/v1/embeddings:embed",
        json={"texts": ["word " * 250] * 200},
        headers={"x-forebay-timeout-ms": "50"},
    )
    assert late.status_code == 504
    wrong = http.post("/api/v1/embeddings:embed", json={"texts": ["a"], "model": "housing"})
    assert wrong.status_code == 400


def test_head_of_a_stream_holds_no_connection(gateway: Gateway) -> None:
    """The stream ran on unseen, and the connection's next request waited for its end."""
    link = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=10)
    link.request("HEAD", "/api/v1/models:watch")
    answer = link.getresponse()
    assert answer.status == 200 and answer.read() == b""
    assert answer.headers["content-type"].startswith("text/event-stream")
    link.request("GET", "/healthz")
    assert link.getresponse().read() == b"ok\n"
    link.close()


def test_what_is_said_of_a_path_does_not_hang_on_the_host(gateway: Gateway) -> None:
    """Without one, paths and redirects named where the gateway listens."""

    def ask(line: str, host: str = "") -> tuple[int, str | None, bytes]:
        with socket.create_connection(("127.0.0.1", gateway.port), 10) as raw:
            raw.sendall(f"{line} HTTP/1.0\r\n{host}\r\n".encode())
            answer = http.client.HTTPResponse(raw)
            answer.begin()
            return answer.status, answer.headers["location"], answer.read()

    for host in ("", "Host: [\r\n"):
        status, _, body = ask("GET /nowhere/at/all", host)
        assert status == 404
        assert json.loads(body)["error"]["message"] == "path '/nowhere/at/all' was not found."
        _, _, body = ask("PUT /v1/embeddings", host)
        message = json.loads(body)["error"]["message"]
        assert message == "/v1/embeddings does not take PUT; it takes POST"
        assert ask("GET /ui", host)[:2] == (307, "/ui/")
        moved = ask("GET /api/v1/models/a%20b/?x=%2F", host)
        assert moved[:2] == (307, "/api/v1/models/a%20b?x=%2F")
        assert ask("GET //example.org/", host)[0] == 404


def test_names_of_types_and_encodings_have_no_case(gateway: Gateway) -> None:
    parts = (("purpose", "user_data"), ('file"; filename="a', "x"))
    form = "".join(
        f'--x\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
        for name, value in parts
    )
    kind = {"content-type": "Multipart/Form-Data; boundary=x"}
    made = gateway.http.post("/v1/files", content=f"{form}--x--\r\n", headers=kind)
    assert made.status_code == 200, made.text
    path = "/api/v1/tabular:predict"
    packed = gzip.compress(json.dumps({"rows": [ROW]}).encode())
    coded = {"content-encoding": "GZIP"}
    assert gateway.http.post(path, content=packed, headers=coded).status_code == 200
    twice = [("content-encoding", "identity"), ("content-encoding", "gzip")]
    refused = gateway.http.post(path, content=packed, headers=twice)
    assert error_of(refused)["param"] == "content-encoding"


def test_server_streams_are_sse_or_ndjson(gateway: Gateway) -> None:
    with gateway.http.stream("GET", "/api/v1/models:watch", params={"model": "iris"}) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        line = next(stream.iter_lines())
        assert json.loads(line.removeprefix("data: "))["event"] == "current"
    headers = {"accept": "application/x-ndjson"}
    with gateway.http.stream("GET", "/api/v1/models:watch", headers=headers) as stream:
        assert json.loads(next(stream.iter_lines()))["event"] == "current"
    missing = gateway.http.get("/api/v1/models:watch", params={"model": "nope"})
    assert missing.status_code == 404


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/api/v1/models:watch"])
def test_who_leaves_within_a_body_is_no_fault_of_ours(
    gateway: Gateway, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    told = logging.getLogger("uvicorn.error")
    told.addHandler(caplog.handler)
    try:
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{{".encode()
        with socket.create_connection(("127.0.0.1", gateway.port)) as raw:
            raw.sendall(head)
            time.sleep(0.2)  # until its body is read
        time.sleep(0.3)
        assert not caplog.records
    finally:
        told.removeHandler(caplog.handler)


def test_bidirectional_streams_are_websockets(gateway: Gateway) -> None:
    url = f"ws://127.0.0.1:{gateway.port}/api/v1/embeddings:embedStream"
    with connect(url) as socket:
        for text in ("one", "two"):
            socket.send(json.dumps({"request": {"texts": [text]}}))
            answer = json.loads(socket.recv())
            assert len(answer["response"]["embeddings"][0]["values"]) == 384
        socket.send(json.dumps({"request": {"texts": []}}))
        assert "error" in json.loads(socket.recv())


@pytest.mark.parametrize(
    ("frame", "headers", "param"),
    [
        (b'{"request": {"texts": ["a"]}}', {}, "frame"),
        (json.dumps({"é" * 100: 1}), {}, "é" * 100),
        ("{}", {"x-forebay-timeout-ms": "soon"}, "x-forebay-timeout-ms"),
        ("{}", {}, "dry_run"),
    ],
)
def test_faults_of_a_websocket_are_told(
    gateway: Gateway, frame: str | bytes, headers: dict[str, str], param: str
) -> None:
    url = f"ws://127.0.0.1:{gateway.port}/api/v1/embeddings:embedStream"
    if param == "dry_run":
        url += "?dry_run=true"
    with connect(url, additional_headers=headers) as socket:
        with suppress(ConnectionClosed):  # what headers say is told at once
            socket.send(frame)
        assert json.loads(socket.recv(timeout=10))["error"]["param"] == param
        with pytest.raises(ConnectionClosed) as closed:
            socket.recv(timeout=10)
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1011 and closed.value.rcvd.reason


def test_uploads_are_multipart(gateway: Gateway, starters: Path) -> None:
    source = starters / "iris" / "1"
    files = [("files", (p.name, p.read_bytes())) for p in source.iterdir()]
    name = f"uploaded-{time.time_ns()}"
    response = gateway.http.post(
        "/api/v1/models:import", data={"model": name, "load": "true"}, files=files
    )
    try:
        assert response.status_code == 200, response.text
        row = {"sepal_length": 5, "sepal_width": 3, "petal_length": 1, "petal_width": 0.2}
        answer = gateway.http.post("/api/v1/tabular:predict", json={"model": name, "rows": [row]})
        assert answer.json()["predictions"][0]["label"] == "setosa"
    finally:
        import shutil

        shutil.rmtree(starters / name, ignore_errors=True)
    assert gateway.http.post("/api/v1/models:import", json={}).status_code == 400


def test_an_upload_refused_at_its_header_keeps_the_servers_status(gateway: Gateway) -> None:
    # The refusal races with what is still being sent; one in eight was a 500.
    files = [("files", (f"part-{i}", bytes(3_000_000))) for i in range(3)]
    for _ in range(40):
        refused = gateway.http.post("/api/v1/models:import", data={"model": "a b"}, files=files)
        assert (refused.status_code, error_of(refused)["param"]) == (400, "header.model")


def test_a_field_in_both_its_spellings_is_refused(gateway: Gateway) -> None:
    for path in ("/api/v1/tabular:predict", "/forebay.v1.TabularService/Predict"):
        for names in (("sticky_key", "stickyKey"), ("stickyKey", "sticky_key")):
            answer = gateway.http.post(path, json={"rows": [ROW], **dict.fromkeys(names, "a")})
            assert answer.status_code == 400
            assert "stickyKey: is given beside sticky_key" in answer.text


@pytest.mark.parametrize(
    ("path", "part"), [("/api/v1/files", "files"), ("/v1/files", "file"), ("/v1/batches", "")]
)
def test_uploads_have_their_request_id(gateway: Gateway, path: str, part: str) -> None:
    ask: Any = {"files": {part: ("a", b"x")}, "data": {"purpose": "user_data"}}
    if not part:
        line = {"custom_id": "a", "method": "POST", "url": "/v1/embeddings"}
        line["body"] = {"model": "minilm-int8", "input": "a"}  # type: ignore[assignment]
        given = {"files": {"file": ("a", json.dumps(line).encode())}, "data": {"purpose": "batch"}}
        file = gateway.http.post("/v1/files", **given).json()["id"]
        ask = {"json": {"input_file_id": file, "endpoint": "/v1/embeddings"}}
        ask["json"]["completion_window"] = "24h"
    made = gateway.http.post(path, headers={"x-request-id": "mine-9"}, **ask)
    assert (made.status_code, made.headers.get("x-request-id")) == (200, "mine-9"), made.text


def test_an_offer_of_http_2_is_ignored_and_nothing_of_the_request_is_lost(
    gateway: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    """Java's HttpClient makes it with every request."""
    log = logging.getLogger("uvicorn.error")
    log.addHandler(caplog.handler)  # uvicorn's loggers hand nothing upwards
    caplog.set_level(logging.WARNING, log.name)
    body = json.dumps({"model": "minilm", "input": "hello"}).encode()
    head = (
        b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n" % len(body)
    )
    offer = (
        b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
        b"HTTP2-Settings: AAMAAABkAAQAAP__\r\n"
    )
    with (
        socket.create_connection(("127.0.0.1", gateway.port), 30) as raw,
        raw.makefile("rb") as got,
    ):
        for request in ([head + b"\r\n" + body], [head + offer + b"\r\n" + body]) * 2 + (
            [head + offer + b"\r\n", body[:9], body[9:]],
        ):
            for part in request:
                raw.sendall(part)
                time.sleep(0.05)
            assert got.readline().split()[1] == b"200"
            length = 0
            while (line := got.readline()) != b"\r\n":
                if line.lower().startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
            assert len(json.loads(got.read(length))["data"][0]["embedding"]) == 384
    log.removeHandler(caplog.handler)
    assert "upgrade" not in caplog.text, "no line in the log for every request of Java"


def test_a_client_that_leaves_cancels_the_call(gateway: Gateway, live: Live) -> None:
    statistics = live.server.repository.pool.loaded[("minilm", 1)].client.statistics
    before = statistics.cancelled
    body = json.dumps({"texts": ["word " * 250] * 300}).encode()
    with socket.create_connection(("127.0.0.1", gateway.port)) as raw:
        raw.sendall(
            b"POST /api/v1/embeddings:embed HTTP/1.1\r\nHost: x\r\nContent-Length: "
            + str(len(body)).encode()
            + b"\r\n\r\n"
            + body
        )
        time.sleep(0.5)
    deadline = time.monotonic() + 5
    while statistics.cancelled == before:
        assert time.monotonic() < deadline, "the call went on without its client"
        time.sleep(0.02)


def test_operations(gateway: Gateway) -> None:
    assert gateway.http.get("/healthz").status_code == 200
    assert gateway.http.get("/readyz").status_code == 200
    assert "forebay_http_server_duration_seconds" in gateway.http.get("/metrics").text
    assert "swagger" in gateway.http.get("/docs").text
    assert gateway.http.get("/docs/assets/swagger-ui-bundle.js").status_code == 200
    page = gateway.http.get("/openapi.json").json()
    assert "/api/v1/embeddings:embed" in page["paths"]


def test_a_gateway_without_a_server_is_alive_and_not_ready() -> None:
    alone = Gateway("127.0.0.1:1")
    try:
        assert alone.http.get("/healthz").status_code == 200
        assert alone.http.get("/readyz").status_code == 503
        answer = alone.http.post("/api/v1/embeddings:embed", json={"texts": ["a"]})
        assert answer.status_code == 503
    finally:
        alone.stop()
