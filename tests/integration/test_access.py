"""Keys, scopes, limits, usage, idempotency, and the pipeline on all four kinds of RPC."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import grpc
import pytest
from forebay.oip import open_inference_pb2 as oip
from forebay.oip import open_inference_pb2_grpc as oip_grpc
from forebay.v1 import (
    classification_pb2,
    classification_pb2_grpc,
    embedding_pb2,
    embedding_pb2_grpc,
    key_pb2,
    key_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    rerank_pb2,
    rerank_pb2_grpc,
    usage_pb2,
    usage_pb2_grpc,
)
from google.rpc import error_details_pb2, status_pb2

from tests.conftest import Live, Start


@pytest.fixture(scope="module")
def guarded(starters: Path, start: Start) -> Live:
    """A server that asks for keys."""
    return start(starters, auth__required="always")


@pytest.fixture(scope="module")
def admin(guarded: Live) -> str:
    """An admin's key."""
    return guarded.run(guarded.server.keys.create("admin", ("infer", "read", "admin")))[1]


def bearer(secret: str) -> list[tuple[str, str]]:
    return [("authorization", f"Bearer {secret}")]


def make_key(live: Live, admin: str, **fields) -> tuple[str, str]:
    stub = key_pb2_grpc.KeyServiceStub(live.channel)
    answer = stub.CreateKey(key_pb2.CreateKeyRequest(name="test", **fields), metadata=bearer(admin))
    return answer.key.id, answer.secret


def retry_delay(error: grpc.RpcError) -> float:
    info = error_details_pb2.RetryInfo()
    for key, value in error.trailing_metadata():
        if key == "grpc-status-details-bin":
            for detail in status_pb2.Status.FromString(value).details:
                if detail.Unpack(info):
                    return info.retry_delay.ToNanoseconds() / 1e9
    return -1


EMBED = embedding_pb2.EmbedRequest(texts=["a"])


def call_of_kind(kind: str, channel: grpc.Channel, metadata) -> None:
    """One call of each kind of RPC, read to its end (or its first message, for endless ones)."""
    if kind == "unary":
        model_pb2_grpc.ModelServiceStub(channel).ListModels(
            model_pb2.ListModelsRequest(), metadata=metadata
        )
    elif kind == "batched":
        embedding_pb2_grpc.EmbeddingServiceStub(channel).Embed(EMBED, metadata=metadata)
    elif kind == "server_stream":
        stream = model_pb2_grpc.ModelServiceStub(channel).WatchModels(
            model_pb2.WatchModelsRequest(), metadata=metadata
        )
        next(iter(stream))
        stream.cancel()
    elif kind == "client_stream":
        model_pb2_grpc.ModelServiceStub(channel).ImportVersion(iter([]), metadata=metadata)
    else:
        requests = iter([embedding_pb2.EmbedStreamRequest(request=EMBED)])
        list(
            embedding_pb2_grpc.EmbeddingServiceStub(channel).EmbedStream(
                requests, metadata=metadata
            )
        )


KINDS = ("unary", "batched", "server_stream", "client_stream", "bidi_stream")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_call_needs_a_key(guarded: Live, kind: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        call_of_kind(kind, guarded.channel, None)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_call_is_measured_and_answers_its_request_id(
    guarded: Live, admin: str, kind: str
) -> None:
    before = guarded.server.metrics.exposition().decode()
    metadata = [*bearer(admin), ("x-request-id", f"mine-{kind}")]
    try:
        call_of_kind(kind, guarded.channel, metadata)
    except grpc.RpcError as e:
        assert kind == "client_stream", e  # an empty upload is refused, and counted as that
        assert e.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert ("x-request-id", f"mine-{kind}") in [(k, v) for k, v in e.trailing_metadata()]
    method = {
        "unary": "ModelService/ListModels",
        "batched": "EmbeddingService/Embed",
        "server_stream": "ModelService/WatchModels",
        "client_stream": "ModelService/ImportVersion",
        "bidi_stream": "EmbeddingService/EmbedStream",
    }[kind]

    def count(text: str) -> float:
        lines = [x for x in text.splitlines() if f'/forebay.v1.{method}"' in x]
        return sum(float(x.split()[-1]) for x in lines if "duration_seconds_count" in x)

    deadline = time.monotonic() + 5
    while count(guarded.server.metrics.exposition().decode()) <= count(before):
        assert time.monotonic() < deadline, "the call was not measured"
        time.sleep(0.02)
    active = [
        x
        for x in guarded.server.metrics.exposition().decode().splitlines()
        if x.startswith("forebay_rpc_server_active_requests{") and f'/forebay.v1.{method}"' in x
    ]
    assert active[0].endswith(" 0.0")


def test_scopes_are_held_to(guarded: Live, admin: str) -> None:
    _, reader = make_key(guarded, admin, scopes=[key_pb2.KEY_SCOPE_READ])
    call_of_kind("unary", guarded.channel, bearer(reader))
    with pytest.raises(grpc.RpcError) as caught:
        call_of_kind("batched", guarded.channel, bearer(reader))
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


def test_a_key_may_be_limited_to_models(guarded: Live, admin: str) -> None:
    _, secret = make_key(guarded, admin, models=["sentiment"])
    with pytest.raises(grpc.RpcError) as caught:
        call_of_kind("batched", guarded.channel, bearer(secret))
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    stub = classification_pb2_grpc.ClassificationServiceStub(guarded.channel)
    stub.Classify(classification_pb2.ClassifyRequest(texts=["x"]), metadata=bearer(secret))


def test_a_revoked_key_is_refused_at_once(guarded: Live, admin: str) -> None:
    key_id, secret = make_key(guarded, admin)
    call_of_kind("batched", guarded.channel, bearer(secret))
    stub = key_pb2_grpc.KeyServiceStub(guarded.channel)
    stub.RevokeKey(key_pb2.RevokeKeyRequest(id=key_id), metadata=bearer(admin))
    with pytest.raises(grpc.RpcError) as caught:
        call_of_kind("batched", guarded.channel, bearer(secret))
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_a_rate_limit_refuses_with_a_true_delay(guarded: Live, admin: str) -> None:
    _, secret = make_key(guarded, admin, limits=key_pb2.KeyLimits(requests_per_second=4, burst=2))
    stub = embedding_pb2_grpc.EmbeddingServiceStub(guarded.channel)
    _, call = stub.Embed.with_call(EMBED, metadata=bearer(secret))
    headers = dict(call.trailing_metadata())
    assert headers["x-ratelimit-limit-requests"] == "2"
    with pytest.raises(grpc.RpcError) as caught:
        for _ in range(10):
            stub.Embed(EMBED, metadata=bearer(secret))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    delay = retry_delay(caught.value)
    assert 0 < delay <= 0.25
    time.sleep(delay)
    stub.Embed(EMBED, metadata=bearer(secret))


def test_a_secret_is_nowhere_in_the_database(guarded: Live, admin: str) -> None:
    _, secret = make_key(guarded, admin)
    home = guarded.settings.home
    held = b"".join(p.read_bytes() for p in home.glob("forebay.db*"))
    assert secret.encode() not in held
    assert secret.split("_", 2)[2].encode() not in held


def test_usage_counts_each_call_once_cancelled_ones_too(guarded: Live, admin: str) -> None:
    key_id, secret = make_key(guarded, admin)
    stub = embedding_pb2_grpc.EmbeddingServiceStub(guarded.channel)
    for _ in range(3):
        stub.Embed(embedding_pb2.EmbedRequest(texts=["one", "two"]), metadata=bearer(secret))
    with pytest.raises(grpc.RpcError):
        stub.Embed(embedding_pb2.EmbedRequest(), metadata=bearer(secret))
    future = stub.Embed.future(
        embedding_pb2.EmbedRequest(texts=["long " * 250] * 400), metadata=bearer(secret)
    )
    time.sleep(0.15)
    future.cancel()
    usage = usage_pb2_grpc.UsageServiceStub(guarded.channel)
    deadline = time.monotonic() + 10
    while True:
        total = usage.GetUsage(
            usage_pb2.GetUsageRequest(key_id=key_id), metadata=bearer(admin)
        ).total
        if total.calls == 5 or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    assert (total.calls, total.errors, total.cancelled) == (5, 1, 1)
    assert total.items >= 6
    assert total.tokens >= 18
    rows = usage.ListUsage(usage_pb2.ListUsageRequest(key_id=key_id), metadata=bearer(admin)).rows
    assert sum(r.counters.calls for r in rows) == 5


def test_usage_counts_what_a_stream_of_model_infer_computes(guarded: Live, admin: str) -> None:
    key_id, secret = make_key(guarded, admin)
    request = oip.ModelInferRequest(model_name="minilm")
    tensor = request.inputs.add(name="text", datatype="BYTES", shape=[2])
    tensor.contents.bytes_contents.extend([b"one", b"two"])
    stub = oip_grpc.GRPCInferenceServiceStub(guarded.channel)
    answers = list(stub.ModelStreamInfer(iter([request] * 3), metadata=bearer(secret)))
    assert not any(a.error_message for a in answers)
    total = (
        usage_pb2_grpc.UsageServiceStub(guarded.channel)
        .GetUsage(usage_pb2.GetUsageRequest(key_id=key_id), metadata=bearer(admin))
        .total
    )
    assert (total.calls, total.items, total.tokens) == (1, 6, 18)


def test_a_key_sees_its_own_usage_alone(guarded: Live, admin: str) -> None:
    _, secret = make_key(guarded, admin)
    other, _ = make_key(guarded, admin)
    stub = usage_pb2_grpc.UsageServiceStub(guarded.channel)
    stub.GetUsage(usage_pb2.GetUsageRequest(), metadata=bearer(secret))
    with pytest.raises(grpc.RpcError) as caught:
        stub.GetUsage(usage_pb2.GetUsageRequest(key_id=other), metadata=bearer(secret))
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


def test_an_idempotency_key_makes_one_key_of_two_calls(guarded: Live, admin: str) -> None:
    stub = key_pb2_grpc.KeyServiceStub(guarded.channel)
    metadata = [*bearer(admin), ("idempotency-key", "once-and-only")]
    first = stub.CreateKey(key_pb2.CreateKeyRequest(name="once"), metadata=metadata)
    again = stub.CreateKey(key_pb2.CreateKeyRequest(name="once"), metadata=metadata)
    assert first == again
    with pytest.raises(grpc.RpcError) as caught:
        stub.CreateKey(key_pb2.CreateKeyRequest(name="other"), metadata=metadata)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_concurrent_calls_with_one_idempotency_key_act_once(guarded: Live, admin: str) -> None:
    stub = key_pb2_grpc.KeyServiceStub(guarded.channel)
    metadata = [*bearer(admin), ("idempotency-key", "at-the-same-time")]
    ids: list[str] = []
    codes: list[grpc.StatusCode] = []

    def run() -> None:
        try:
            request = key_pb2.CreateKeyRequest(name="race")
            ids.append(stub.CreateKey(request, metadata=metadata).key.id)
        except grpc.RpcError as e:
            codes.append(e.code())

    threads = [threading.Thread(target=run) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(set(ids)) == 1
    assert set(codes) <= {grpc.StatusCode.ABORTED}


@pytest.mark.parametrize("method", ["embed", "classify", "rerank", "embed_stream"])
def test_a_spent_budget_stops_calls_that_reserve_nothing(
    guarded: Live, admin: str, method: str
) -> None:
    limits = key_pb2.KeyLimits(budget_tokens=10, budget_period=key_pb2.BUDGET_PERIOD_DAY)
    number, secret = make_key(
        guarded, admin, limits=limits, scopes=[key_pb2.KEY_SCOPE_INFER, key_pb2.KEY_SCOPE_READ]
    )
    embedding = embedding_pb2_grpc.EmbeddingServiceStub(guarded.channel)
    ask, request = {
        "embed": (embedding.Embed, EMBED),
        "embed_stream": (
            lambda r, metadata: list(embedding.EmbedStream(iter([r]), metadata=metadata)),
            embedding_pb2.EmbedStreamRequest(request=EMBED),
        ),
        "classify": (
            classification_pb2_grpc.ClassificationServiceStub(guarded.channel).Classify,
            classification_pb2.ClassifyRequest(texts=["a"]),
        ),
        "rerank": (
            rerank_pb2_grpc.RerankServiceStub(guarded.channel).Rerank,
            rerank_pb2.RerankRequest(query="a", documents=["b"]),
        ),
    }[method]
    usage = usage_pb2_grpc.UsageServiceStub(guarded.channel)
    answered, refused = 0, None
    while refused is None:
        try:
            ask(request, metadata=bearer(secret))
            answered += 1
            assert answered <= 10, "the budget stops nobody"
            time.sleep(0.05)  # what was spent before is read after the first call
        except grpc.RpcError as e:
            refused = e
    assert answered
    assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "no tokens are left of 10" in str(refused.details())
    assert 0 < retry_delay(refused) <= 86400
    budget = usage.GetBudget(usage_pb2.GetBudgetRequest(key_id=number), metadata=bearer(secret))
    assert budget.spent_tokens >= 10
    # What takes no tokens goes on.
    model_pb2_grpc.ModelServiceStub(guarded.channel).ListModels(
        model_pb2.ListModelsRequest(), metadata=bearer(secret)
    )
