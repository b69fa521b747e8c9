"""Every door of the gateway, against the real server on the real models."""

from __future__ import annotations

import base64
import gzip
import http.client
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from forebay.settings import HttpSettings
from forebay_gateway.app import create_app
from forebay_gateway.protocol import Http1
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from tests.conftest import Live, Start
from tests.integration.test_inference import ROW


class Gateway:
    """uvicorn in a thread: on a port, or where the server has the HTTP port, on the socket behind it."""

    def __init__(self, server: Live | str, server_metrics=None, **settings) -> None:
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
        app = create_app(HttpSettings(**settings), target, server_metrics)
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


@pytest.fixture(scope="module")
def live(starters: Path, start: Start) -> Live:
    return start(starters, http__max_body_bytes=1 << 20)


@pytest.fixture(scope="module")
def gateway(live: Live) -> Iterator[Gateway]:
    running = Gateway(live, max_body_bytes=1 << 20)
    yield running
    running.stop()


def error_of(response: httpx.Response) -> dict:
    return response.json()["error"]


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


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings?api-version=2024-02-01", {"model": "minilm", "input": "a"}),
        ("/v2/rerank?beta=true", {"model": "minilm", "query": "a", "documents": ["a"]}),
    ],
)
def test_queries_that_other_apis_clients_add_are_taken(gateway: Gateway, path, body) -> None:
    assert gateway.http.post(path, json=body).status_code == 200


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


def test_openai_sdk_embeddings_models_moderations(gateway: Gateway) -> None:
    import openai

    client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none")
    default = client.embeddings.create(model="minilm", input=["hello", "world"])
    floats = client.embeddings.create(model="minilm", input="hello", encoding_format="float")
    assert np.allclose(default.data[0].embedding, floats.data[0].embedding, atol=1e-6)
    assert default.usage.total_tokens == 6
    ids = client.embeddings.create(model="minilm", input=[[101, 7592, 102]])
    assert np.allclose(ids.data[0].embedding, floats.data[0].embedding, atol=1e-5)
    assert "minilm" in [m.id for m in client.models.list()]
    assert client.models.retrieve("minilm").object == "model"
    result = client.moderations.create(model="sentiment", input=["This is awful.", "Lovely!"])
    assert [r.flagged for r in result.results] == [True, False]
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="nope", input="a")
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model="minilm", input="a", dimensions=3)
    assert "384" in str(caught.value)
    long = "a" * 1_000_001
    for given, param in ((long, "input"), (["a", long], "input[1]")):
        with pytest.raises(openai.APIStatusError) as caught:
            client.moderations.create(model="sentiment", input=given)
        assert caught.value.param == param
        with pytest.raises(openai.APIStatusError) as caught:
            client.embeddings.create(model="minilm", input=given)
        assert caught.value.param == param


def test_base64_and_float_are_the_same_numbers(gateway: Gateway) -> None:
    body = {"model": "minilm", "input": "same"}
    floats = gateway.http.post("/v1/embeddings", json=body).json()["data"][0]["embedding"]
    coded = gateway.http.post("/v1/embeddings", json=body | {"encoding_format": "base64"})
    raw = base64.b64decode(coded.json()["data"][0]["embedding"])
    assert np.array_equal(np.frombuffer(raw, np.float32), np.array(floats, np.float32))


def test_rerank_in_coheres_shape(gateway: Gateway) -> None:
    body = {
        "model": "minilm",
        "query": "vaccines",
        "documents": ["cars", {"text": "immunity by vaccination"}],
        "top_n": 1,
        "return_documents": True,
    }
    result = gateway.http.post("/v1/rerank", json=body).json()["results"]
    assert [r["index"] for r in result] == [1]
    assert result[0]["document"]["text"] == "immunity by vaccination"


def test_open_inference_json_and_binary(gateway: Gateway) -> None:
    names = ("sepal_length", "sepal_width", "petal_length", "petal_width")
    inputs = [
        {"name": n, "datatype": "FP32", "shape": [2, 1], "data": [[5.1], [6.9]]} for n in names
    ]
    answer = gateway.http.post("/v2/models/iris/infer", json={"id": "x", "inputs": inputs}).json()
    assert answer["id"] == "x"
    outputs = {o["name"]: o for o in answer["outputs"]}
    assert outputs["label"]["shape"] == [2]
    assert sum(outputs["probabilities"]["data"][:3]) == pytest.approx(1, abs=1e-5)
    raw = np.array([5.1, 6.9], "<f4").tobytes()
    for one in inputs:
        del one["data"]
        one["parameters"] = {"binary_data_size": len(raw)}
    head = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()
    binary = gateway.http.post(
        "/v2/models/iris/infer",
        content=head + raw * 4,
        headers={"inference-header-content-length": str(len(head))},
    )
    size = int(binary.headers["inference-header-content-length"])
    described = json.loads(binary.content[:size])["outputs"]
    assert sum(o["parameters"]["binary_data_size"] for o in described) == len(binary.content) - size
    assert gateway.http.get("/v2/health/ready").status_code == 200
    assert gateway.http.get("/v2/models/nope").status_code == 404
    assert "error" in gateway.http.post("/v2/models/iris/infer", json={"inputs": 3}).json()


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


def test_limits_and_keys_through_http(starters: Path, start: Start) -> None:
    from forebay_server.access.keys import Limits

    server = start(starters, auth__required="always")
    limits = Limits(requests_per_second=0.5, burst=1)
    _, secret = server.run(server.server.keys.create("k", ("infer",), limits=limits))
    door = Gateway(server)
    try:
        body = {"model": "minilm", "input": "a"}
        assert door.http.post("/v1/embeddings", json=body).status_code == 401
        assert door.http.get("/metrics").status_code == 401
        headers = {"authorization": f"Bearer {secret}"}
        good = door.http.post("/v1/embeddings", json=body, headers=headers)
        assert good.status_code == 200
        assert good.headers["x-ratelimit-limit-requests"] == "1"
        assert good.headers["x-ratelimit-remaining-requests"] == "0"
        refused = door.http.post("/v1/embeddings", json=body, headers=headers)
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 2
        assert door.http.get("/api/v1/models", headers=headers).status_code in (403, 429)
    finally:
        door.stop()
