"""What clients' own retry policies hear: grpc-retry-pushback-ms, alike on both lanes."""

from __future__ import annotations

import json
import time
from pathlib import Path

import grpc
import pytest
from forebay.v1 import embedding_pb2, embedding_pb2_grpc, key_pb2

from tests.conftest import Live, Start
from tests.integration.test_access import bearer, make_key, retry_delay

EMBED = embedding_pb2.EmbedRequest(texts=["a"])
ROOM = 1 << 20
#: Without a word of the server, this client waits for a quarter of a minute at least.
PATIENT = {
    "name": [{"service": "forebay.v1.EmbeddingService"}],
    "retryPolicy": {
        "maxAttempts": 5,
        "initialBackoff": "20s",
        "maxBackoff": "20s",
        "backoffMultiplier": 1,
        "retryableStatusCodes": ["RESOURCE_EXHAUSTED"],
    },
}


@pytest.fixture(scope="module")
def guarded(starters: Path, start: Start) -> Live:
    """A server that asks for keys, and has room for a megabyte of messages."""
    return start(starters, auth__required="always", grpc__max_waiting_bytes=ROOM)


@pytest.fixture(scope="module")
def admin(guarded: Live) -> str:
    return guarded.run(guarded.server.keys.create("admin", ("infer", "read", "admin")))[1]


def patient(live: Live) -> embedding_pb2_grpc.EmbeddingServiceStub:
    options = [("grpc.service_config", json.dumps({"methodConfig": [PATIENT]}))]
    channel = grpc.insecure_channel(live.target, options)
    return embedding_pb2_grpc.EmbeddingServiceStub(channel)


def limited(live: Live, admin: str, per_second: float) -> list[tuple[str, str]]:
    limits = key_pb2.KeyLimits(requests_per_second=per_second, burst=1)
    return bearer(make_key(live, admin, limits=limits)[1])


def pushback(error: grpc.RpcError) -> str | None:
    return dict(error.trailing_metadata()).get("grpc-retry-pushback-ms")


def refused(live: Live, metadata: list[tuple[str, str]], timeout: float) -> grpc.RpcError:
    stub = embedding_pb2_grpc.EmbeddingServiceStub(live.channel)
    with pytest.raises(grpc.RpcError) as caught:
        for _ in range(10):
            stub.Embed(EMBED, metadata=metadata, timeout=timeout)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    return caught.value


def test_a_retry_policy_comes_again_when_the_server_says(guarded: Live, admin: str) -> None:
    metadata = limited(guarded, admin, per_second=4)
    stub, began = patient(guarded), time.monotonic()
    for _ in range(4):
        assert len(stub.Embed(EMBED, metadata=metadata, timeout=15).embeddings) == 1
    assert 0.5 < time.monotonic() - began < 12


def test_the_trailer_says_what_the_details_say(guarded: Live, admin: str) -> None:
    error = refused(guarded, limited(guarded, admin, per_second=1), timeout=8)
    assert abs(int(pushback(error) or 0) - retry_delay(error) * 1000) <= 1


def test_nobody_waits_for_an_answer_that_would_be_too_late(guarded: Live, admin: str) -> None:
    metadata = limited(guarded, admin, per_second=0.2)
    error = refused(guarded, metadata, timeout=2)
    assert retry_delay(error) > 2 and pushback(error) == "-1"
    began = time.monotonic()
    with pytest.raises(grpc.RpcError) as caught:
        patient(guarded).Embed(EMBED, metadata=metadata, timeout=2)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, "not DEADLINE_EXCEEDED"
    assert time.monotonic() - began < 2


def test_no_client_stands_still_for_long_unasked(guarded: Live, admin: str) -> None:
    """Also one that would wait for ever."""
    metadata = limited(guarded, admin, per_second=0.05)
    stub = embedding_pb2_grpc.EmbeddingServiceStub(guarded.channel)
    stub.Embed(EMBED, metadata=metadata)
    with pytest.raises(grpc.RpcError) as caught:
        stub.Embed(EMBED, metadata=metadata)
    assert 10 < retry_delay(caught.value) <= 20 and pushback(caught.value) == "-1"


def test_what_stays_refused_is_not_to_be_tried_again(guarded: Live, admin: str) -> None:
    large = embedding_pb2.EmbedRequest(texts=["x" * (guarded.settings.grpc.max_message_bytes + 1)])
    stub = embedding_pb2_grpc.EmbeddingServiceStub(guarded.channel)
    with pytest.raises(grpc.RpcError) as caught:
        stub.Embed(large, metadata=bearer(admin), timeout=30)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    by_itself = guarded.server.lanes.lane == "ordinary"  # grpc.aio refuses it before it is a call
    assert pushback(caught.value) == (None if by_itself else "-1")


def test_calls_beyond_the_room_hear_when_to_come(guarded: Live, admin: str) -> None:
    large = embedding_pb2.EmbedRequest(texts=["x" * ROOM])
    stub = embedding_pb2_grpc.EmbeddingServiceStub(guarded.channel)
    with pytest.raises(grpc.RpcError) as caught:
        stub.Embed(large, metadata=bearer(admin), timeout=20)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert pushback(caught.value) == "100"


def test_answers_and_other_errors_say_nothing(guarded: Live, admin: str) -> None:
    stub = embedding_pb2_grpc.EmbeddingServiceStub(guarded.channel)
    _, call = stub.Embed.with_call(EMBED, metadata=bearer(admin))
    assert "grpc-retry-pushback-ms" not in dict(call.trailing_metadata())
    with pytest.raises(grpc.RpcError) as caught:
        stub.Embed(embedding_pb2.EmbedRequest(), metadata=bearer(admin))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert pushback(caught.value) is None
