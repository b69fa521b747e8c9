"""The Connect protocol on the wire: unary calls and server streams, both codecs, how they end."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from forebay.methods import methods
from forebay.v1 import file_pb2, model_pb2
from google.rpc import error_details_pb2

from tests.conftest import Live, Start, copy_models
from tests.integration.gateway import Gateway
from tests.integration.test_server_streams import until

JSON = {"content-type": "application/connect+json"}
PROTO = {"content-type": "application/connect+proto"}
DOWNLOAD = "/forebay.v1.FileService/DownloadFile"
WATCH = "/forebay.v1.ModelService/WatchModels"
#: Bodies beyond it are refused.
BOUND = 1 << 20


@pytest.fixture(scope="module")
def live(start: Start, starters: Path, tmp_path_factory: pytest.TempPathFactory) -> Live:
    models = copy_models(starters, tmp_path_factory.mktemp("models"), "iris", "housing")
    return start(models, http__max_body_bytes=BOUND)


@pytest.fixture(scope="module")
def gateway(live: Live) -> Iterator[Gateway]:
    running = Gateway(live, max_body_bytes=BOUND)
    yield running
    running.stop()


def envelope(data: bytes, flags: int = 0) -> bytes:
    return bytes([flags]) + len(data).to_bytes(4, "big") + data


def opened(body: bytes) -> tuple[list[bytes], dict[str, Any]]:
    """The messages of an answer, and what its last envelope says."""
    messages = []
    while body:
        flags, size = body[0], int.from_bytes(body[1:5], "big")
        data, body = body[5 : 5 + size], body[5 + size :]
        assert len(data) == size
        if flags == 2:
            assert not body, "something comes after the end"
            return messages, json.loads(data)
        assert flags == 0
        messages.append(data)
    raise AssertionError("the answer has no end")


def ask(
    gateway: Gateway, path: str, body: bytes, headers: dict[str, str]
) -> tuple[list[bytes], dict[str, Any]]:
    """A whole stream; however it ends, it is 200 and of the request's type."""
    answer = gateway.http.post(path, content=body, headers=headers)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == headers["content-type"]
    return opened(answer.content)


def refused(gateway: Gateway, body: bytes, headers: dict[str, str]) -> dict[str, Any]:
    messages, end = ask(gateway, DOWNLOAD, body, headers)
    assert not messages
    return end["error"]


def watching(live: Live) -> float:
    """Streams of WatchModels that the server has open."""
    name = "forebay_rpc_server_active_requests"
    return live.server.metrics.registry.get_sample_value(name, {"method": WATCH}) or 0.0


def test_unary_calls(gateway: Gateway) -> None:
    path = "/forebay.v1.ServerService/GetServerInfo"
    answer = gateway.http.post(path, json={})
    assert answer.json()["contractVersion"]
    bad = gateway.http.post("/forebay.v1.EmbeddingService/Embed", json={"texts": []})
    assert bad.status_code == 400
    assert bad.json()["code"] == "invalid_argument"
    assert bad.json()["details"]
    plain = gateway.http.post(path, content=b"", headers={"content-type": "text/plain"})
    assert plain.status_code == 415
    packed = {"content-type": "application/json", "content-encoding": "br"}
    unknown = gateway.http.post(path, content=b"x", headers=packed)
    assert (unknown.status_code, unknown.json()["code"]) == (501, "unimplemented")
    assert "identity, gzip, deflate" in unknown.json()["message"]


def test_every_server_stream_of_the_contract_has_its_path(gateway: Gateway) -> None:
    paths = [m.path for m in methods().values() if m.kind == "server_stream"]
    assert {DOWNLOAD, WATCH, "/forebay.v1.GenerationService/ChatStream"} < set(paths)
    for path in paths:
        body = envelope(b'{"no_such_field": 1}')
        messages, end = ask(gateway, path, body, JSON)
        assert (messages, end["error"]["code"]) == ([], "invalid_argument")
        wrong = gateway.http.post(path, json={})
        assert wrong.status_code == 415
        assert wrong.headers["accept-post"] == "application/connect+json, application/connect+proto"


def test_a_file_in_both_codecs(gateway: Gateway) -> None:
    data = os.urandom(700_000)
    made = gateway.http.post(
        "/v1/files", data={"purpose": "user_data"}, files={"file": ("f", data)}
    ).json()
    request = file_pb2.DownloadFileRequest(file=made["id"]).SerializeToString()
    own = {**PROTO, "x-request-id": "mine-7"}
    parts, end = ask(gateway, DOWNLOAD, envelope(request), own)
    read = b"".join(file_pb2.DownloadFileResponse.FromString(p).data for p in parts)
    assert len(parts) > 1
    assert hashlib.sha256(read).digest() == hashlib.sha256(data).digest()
    assert "error" not in end and end["metadata"]["x-request-id"] == ["mine-7"]
    text = json.dumps({"file": made["id"]}).encode()
    parts, end = ask(gateway, DOWNLOAD, envelope(text), JSON)
    assert b"".join(base64.b64decode(json.loads(p)["data"]) for p in parts) == data
    assert "error" not in end


def test_errors_are_the_last_envelope_with_their_details(gateway: Gateway) -> None:
    headers = {**JSON, "x-request-id": "mine-8"}
    messages, end = ask(gateway, DOWNLOAD, envelope(b'{"file": "file-none"}'), headers)
    assert not messages
    assert end["metadata"]["x-request-id"] == ["mine-8"]
    error = end["error"]
    assert (error["code"], "file-none" in error["message"]) == ("not_found", True)
    detail = error["details"][0]
    assert detail["type"] == "google.rpc.ErrorInfo"
    info = error_details_pb2.ErrorInfo.FromString(base64.b64decode(detail["value"] + "=="))
    assert (info.reason, info.domain) == ("NOT_FOUND", "forebay")
    for timeout in ("soon", "-1", "99999999999"):
        error = refused(gateway, envelope(b"{}"), {**JSON, "connect-timeout-ms": timeout})
        assert error["code"] == "invalid_argument"
        assert "connect-timeout-ms" in error["message"]


def test_a_stream_is_read_as_it_comes_and_ends_at_its_deadline(
    gateway: Gateway, live: Live
) -> None:
    """The first message is there long before the end; the deadline is told after it."""
    headers = {**PROTO, "connect-timeout-ms": "1500"}
    request = model_pb2.WatchModelsRequest(model="iris").SerializeToString()
    body, seen = b"", 0.0
    with gateway.http.stream("POST", WATCH, content=envelope(request), headers=headers) as stream:
        for part in stream.iter_raw():
            seen = seen or time.monotonic()
            body += part
    assert time.monotonic() - seen > 0.7
    messages, end = opened(body)
    first = model_pb2.WatchModelsResponse.FromString(messages[0])
    assert (first.event, first.model.name) == ("current", "iris")
    assert_late(end["error"])
    until(lambda: not watching(live))


def assert_late(error: dict[str, Any]) -> None:
    """What gRPC's own callers hear of a deadline, too."""
    assert error["code"] == "deadline_exceeded"
    assert error["message"] == "the deadline passed during the call"
    info = error_details_pb2.ErrorInfo()
    [detail] = error["details"]
    assert detail["type"] == "google.rpc.ErrorInfo"
    info.ParseFromString(base64.b64decode(detail["value"] + "=="))
    assert (info.reason, dict(info.metadata)) == ("DEADLINE_EXCEEDED", {"stage": "server"})


def test_a_unary_call_says_that_it_is_late_as_grpc_does(gateway: Gateway) -> None:
    """It waits for calls that are on their way to the model's queue, half a second."""
    answer = gateway.http.post(
        "/forebay.v1.ModelService/UnloadModel",
        json={"model": "housing"},
        headers={"connect-timeout-ms": "50"},
    )
    assert answer.status_code == 504
    assert_late(answer.json())


def test_who_leaves_ends_the_call(gateway: Gateway, live: Live) -> None:
    with (
        httpx.Client(base_url=gateway.url) as own,
        own.stream("POST", WATCH, content=envelope(b"{}"), headers=JSON) as stream,
    ):
        parts = stream.iter_raw()  # one that is dropped closes the connection
        next(parts)
        assert watching(live) == 1
    until(lambda: not watching(live))


@pytest.mark.parametrize(
    ("body", "code", "word"),
    [
        (b"", "unimplemented", "no message"),
        (envelope(b"{}") * 2, "unimplemented", "several"),
        (envelope(b"{}", 2), "invalid_argument", "flags 2"),
        (envelope(b"{}", 1), "invalid_argument", "connect-content-encoding"),
        (b"\0\0\0", "invalid_argument", "byte 3"),
        (b"\0\xff\xff\xff\xff{}", "invalid_argument", "byte 7"),
        (envelope(b"{oops"), "invalid_argument", "is not JSON"),
        (envelope(b"\xff"), "invalid_argument", "is not JSON"),
        (envelope(b"[]"), "invalid_argument", "an object"),
        (envelope(b"{}")[:5] + b"x" * (2 * BOUND), "invalid_argument", "limit"),
    ],
)
def test_bodies_that_are_no_envelope(gateway: Gateway, body: bytes, code: str, word: str) -> None:
    error = refused(gateway, body, JSON)
    assert (error["code"], word in error["message"]) == (code, True), error


def test_a_message_that_is_no_protobuf(gateway: Gateway) -> None:
    assert refused(gateway, envelope(b"\xff\xff\xff"), PROTO)["code"] == "invalid_argument"


def test_packed_messages(gateway: Gateway) -> None:
    gzipped = {**JSON, "connect-content-encoding": "gzip"}
    body = gzip.compress(b'{"file": "file-none"}')
    assert refused(gateway, envelope(body, 1), gzipped)["code"] == "not_found"
    plain = envelope(b'{"file": "file-none"}')
    assert refused(gateway, plain, gzipped)["code"] == "not_found"
    assert refused(gateway, envelope(b"oops", 1), gzipped)["code"] == "invalid_argument"
    bomb = envelope(gzip.compress(bytes(8 * BOUND)), 1)
    assert "limit" in refused(gateway, bomb, gzipped)["message"]
    unknown = refused(gateway, envelope(b"x", 1), {**JSON, "connect-content-encoding": "br"})
    assert unknown["code"] == "unimplemented"
    assert "identity, gzip" in unknown["message"]
    wishes = {**JSON, "connect-accept-encoding": "gzip, br"}
    assert refused(gateway, plain, wishes)["code"] == "not_found"
