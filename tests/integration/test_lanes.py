"""The fast lane gives the same answers as the ordinary one: status, trailers, bytes."""

from __future__ import annotations

import importlib.util
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import h2.events
import pytest
from forebay.settings import load_settings
from forebay.v1 import classification_pb2 as cl
from forebay.v1 import embedding_pb2 as em
from forebay.v1 import model_pb2, tabular_pb2
from google.rpc import error_details_pb2, status_pb2

from tests.conftest import Live
from tests.integration.test_abuse import Client

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("forebay_native") is None,
    reason="the extension forebay_native is not built (cargo is needed)",
)
EMBED = "/forebay.v1.EmbeddingService/Embed"
PREDICT = "/forebay.v1.TabularService/Predict"
CLASSIFY = "/forebay.v1.ClassificationService/Classify"
LIMIT = 100_000


@pytest.fixture(scope="module")
def both(starters: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Live]]:
    """One server by each lane."""
    made = []
    for lane in ("fast", "ordinary"):
        values = {
            "home": tmp_path_factory.mktemp(lane),
            "models.root": starters,
            "grpc.port": 0,
            "grpc.lane": lane,
            "grpc.max_message_bytes": LIMIT,
            "grpc.keepalive_s": 1.0,
        }
        made.append(Live(load_settings(values, environ={}).settings))
    assert [live.server.lanes.lane for live in made] == ["fast", "ordinary"]
    yield made
    for live in made:
        live.stop()


class End(NamedTuple):
    """What a client sees."""

    code: str
    message: str
    trailers: dict[str, Any]
    data: bytes


def call(live: Live, path: str, data: bytes, **kwargs: Any) -> End:
    """One raw unary call."""
    metadata = (("x-request-id", "one"), *kwargs.pop("metadata", ()))
    done = live.channel.unary_unary(path).future(data, metadata=metadata, timeout=20, **kwargs)
    trailers = dict(done.trailing_metadata() or ())
    code = done.code()
    return End(
        code.name, done.details() or "", trailers, done.result() if code.value[0] == 0 else b""
    )


def embed(**kwargs: Any) -> bytes:
    return em.EmbedRequest(**kwargs).SerializeToString()


CASES = {
    "texts": (EMBED, embed(texts=["a", "some longer text"], model="minilm")),
    "many texts": (EMBED, embed(texts=[f"text {i}" for i in range(100)])),
    "no texts": (EMBED, embed()),
    "unknown model": (EMBED, embed(texts=["a"], model="minilmm")),
    "wrong task": (EMBED, embed(texts=["a"], model="iris")),
    "bad dimensions": (EMBED, embed(texts=["a"], dimensions=99999)),
    "umlauts in the error": (EMBED, embed(texts=["a"], model="m\u00fcnchen\u00df%")),
    "no message": (EMBED, b"\xff\xff\xff"),
    "empty": (EMBED, b""),
    "labels": (CLASSIFY, cl.ClassifyRequest(texts=["good", "bad"], top_k=2).SerializeToString()),
    "unknown feature": (
        PREDICT,
        tabular_pb2.PredictRequest(
            model="iris", columns=[{"name": "nose", "numbers": [1]}]
        ).SerializeToString(),
    ),
    "admin": (
        "/forebay.v1.ModelService/GetModel",
        model_pb2.GetModelRequest(model="nobody").SerializeToString(),
    ),
    "unknown method": ("/forebay.v1.EmbeddingService/Nothing", b""),
    "unknown service": ("/nobody.Nothing/Nothing", b""),
}


def plain(path: str, data: bytes) -> Any:
    """The message without what differs from call to call."""
    kind = {EMBED: em.EmbedResponse, CLASSIFY: cl.ClassifyResponse}.get(path)
    if kind is None:
        return data
    message = kind.FromString(data)
    message.ClearField("timing")
    return message


@pytest.mark.parametrize("name", CASES)
def test_both_lanes_answer_alike(both: list[Live], name: str) -> None:
    path, data = CASES[name]
    fast, ordinary = (call(live, path, data) for live in both)
    assert fast.code == ordinary.code
    assert fast.message == ordinary.message
    assert fast.trailers == ordinary.trailers
    assert plain(path, fast.data) == plain(path, ordinary.data)
    if "grpc-status-details-bin" in fast.trailers:
        status = status_pb2.Status.FromString(fast.trailers["grpc-status-details-bin"])
        assert status.message == fast.message


def test_compressed_requests_are_read(both: list[Live]) -> None:
    data = embed(texts=["the same words " * 20])
    for live in both:
        packed = call(live, EMBED, data, compression=grpc.Compression.Gzip)
        assert plain(EMBED, packed.data) == plain(EMBED, call(live, EMBED, data).data)


def test_messages_beyond_the_limit_are_refused(both: list[Live]) -> None:
    data = embed(texts=["x" * LIMIT])
    for compression in (grpc.Compression.NoCompression, grpc.Compression.Gzip):
        codes = {call(live, EMBED, data, compression=compression).code for live in both}
        assert codes == {"RESOURCE_EXHAUSTED"}


@pytest.mark.parametrize("packed", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
def test_a_message_beyond_the_limit_is_told_from_a_queue_that_is_full(
    both: list[Live], packed: grpc.Compression
) -> None:
    """Clients that retry RESOURCE_EXHAUSTED would send it again and again."""
    registry = both[0].server.metrics.registry
    labels = {"reason": "QUEUE_FULL"}
    before = registry.get_sample_value("forebay_rpc_server_rejected_total", labels)
    refused = call(both[0], EMBED, embed(texts=["x" * LIMIT]), compression=packed)
    status = status_pb2.Status.FromString(refused.trailers["grpc-status-details-bin"])
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (info.reason, info.metadata["limit"]) == ("TOO_LARGE", str(LIMIT))
    assert status.message == refused.message
    assert refused.message.endswith(f" bytes; the limit is {LIMIT}")
    assert refused.trailers["x-request-id"] == "one"
    time.sleep(1.2)  # refusals are counted twice a second
    call(both[0], EMBED, embed(texts=["a"]))
    assert registry.get_sample_value("forebay_rpc_server_rejected_total", labels) == before


def test_answers_larger_than_a_window_arrive_whole(both: list[Live]) -> None:
    # 2,000 vectors of 384 floats: 3 MB, more than a stream's window.
    data = embed(token_ids=[{"ids": [101, 2000 + i, 102]} for i in range(2000)], model="minilm")
    for live in both:
        unlimited = [("grpc.max_receive_message_length", -1)]
        with grpc.insecure_channel(live.target, options=unlimited) as channel:
            answer = em.EmbedResponse.FromString(channel.unary_unary(EMBED)(data, timeout=60))
        assert len(answer.embeddings) == 2000
        assert len({tuple(e.values[:4]) for e in answer.embeddings}) > 1900


def test_a_deadline_is_kept_and_its_work_is_dropped(both: list[Live]) -> None:
    data = embed(texts=[f"some rather long text to keep it busy {i} " * 30 for i in range(64)])
    for live in both:
        started = time.monotonic()
        done = live.channel.unary_unary(EMBED).future(data, timeout=0.05)
        assert done.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert time.monotonic() - started < 1
        settle(live)


def test_a_client_that_leaves_takes_its_work_back(both: list[Live]) -> None:
    data = embed(texts=[f"some rather long text to keep it busy {i} " * 30 for i in range(64)])
    for live in both:
        before = cancelled(live)
        calls = [live.channel.unary_unary(EMBED).future(data, timeout=60) for _ in range(4)]
        time.sleep(0.1)  # until some are queued and one runs
        for one in calls:
            one.cancel()
        settle(live)
        assert cancelled(live) > before


def cancelled(live: Live) -> float:
    labels = {"method": EMBED, "code": "CANCELLED"}
    name = "forebay_rpc_server_duration_seconds_count"
    return live.server.metrics.registry.get_sample_value(name, labels) or 0.0


def settle(live: Live) -> None:
    """Wait until no call is in progress."""
    until = time.monotonic() + 20
    name = "forebay_rpc_server_active_requests"
    while live.server.metrics.registry.get_sample_value(name, {"method": EMBED}):
        assert time.monotonic() < until, "a call never ended"
        time.sleep(0.01)


def test_idle_connections_are_pinged(both: list[Live]) -> None:
    for live in both:
        client = Client(live)
        assert any(isinstance(e, h2.events.PingReceived) for e in client.events()), live.settings
        client.socket.close()


def test_idle_connections_may_ping(both: list[Live]) -> None:
    for live in both:
        client = Client(live)
        for number in range(5):  # more than gRPC lets pass of those that it does not want
            client.h2.ping(number.to_bytes(8))
            client.flush()
            events = list(client.events(1.1))  # as long as they have to be apart
            assert any(isinstance(e, h2.events.PingAckReceived) for e in events)
            assert not any(isinstance(e, h2.events.ConnectionTerminated) for e in events)
        client.socket.close()


def test_each_of_many_callers_gets_its_own_answer(both: list[Live]) -> None:
    fast = both[0]
    lengths = list(range(1, 60))
    wrong: list[int] = []

    def caller(seed: int) -> None:
        with grpc.insecure_channel(fast.target) as channel:
            stub = channel.unary_unary(EMBED)
            for i in range(15):
                n = lengths[(seed * 7 + i) % len(lengths)]
                data = embed(token_ids=[{"ids": [101, *([2000 + seed] * n), 102]}], model="minilm")
                answer = em.EmbedResponse.FromString(stub(data, timeout=30))
                if [e.tokens for e in answer.embeddings] != [n + 2]:
                    wrong.append(n)

    threads = [threading.Thread(target=caller, args=(s,)) for s in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_streams_pass_through(both: list[Live]) -> None:
    for live in both:
        stream = live.channel.stream_stream("/forebay.v1.EmbeddingService/EmbedStream")
        requests = (
            em.EmbedStreamRequest(request={"texts": [f"text {i}"]}).SerializeToString()
            for i in range(20)
        )
        answers = list(stream(requests, timeout=30))
        assert len(answers) == 20
        bad = stream(iter([em.EmbedStreamRequest().SerializeToString()]), timeout=30)
        with pytest.raises(grpc.RpcError) as error:
            list(bad)
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_caller_cannot_name_its_own_peer(both: list[Live]) -> None:
    for live in both:
        end = call(
            live,
            "/forebay.v1.ServerService/GetServerInfo",
            b"",
            metadata=(("forebay-peer", "ipv4:8.8.8.8:1"),),
        )
        assert end.code == "OK"
