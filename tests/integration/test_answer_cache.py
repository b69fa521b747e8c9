"""The response cache of language models: equal requests, equal answers, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from forebay.v1 import generation_pb2 as pb
from forebay.v1 import generation_pb2_grpc as rpc
from forebay.v1 import usage_pb2, usage_pb2_grpc

from tests.conftest import Live, Start
from tests.integration.chats import text_of, user
from tests.integration.gateway import Gateway
from tests.integration.language_models import random_openvino


@pytest.fixture(scope="module")
def live(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Live:
    return start(random_openvino(tmp_path_factory.mktemp("models")))


@pytest.fixture(scope="module")
def stub(live: Live) -> rpc.GenerationServiceStub:
    return rpc.GenerationServiceStub(live.channel)


def cached(text: str, **kwargs: Any) -> pb.ChatRequest:
    request = user(text, **kwargs)
    request.cache = True
    return request


def used(live: Live) -> tuple[int, int]:
    """Tokens and cached items in the ledger."""
    stub = usage_pb2_grpc.UsageServiceStub(live.channel)
    rows = stub.ListUsage(usage_pb2.ListUsageRequest(model="tiny")).rows
    return sum(r.counters.tokens for r in rows), sum(r.counters.cached for r in rows)


def test_an_equal_request_is_answered_from_the_cache_and_not_charged(
    live: Live, stub: rpc.GenerationServiceStub
) -> None:
    first = stub.Chat(cached("Hello", logprobs=0, n=2))
    assert first.generation_usage.cached_answers == 0
    tokens, hits = used(live)
    second = stub.Chat(cached("Hello", logprobs=0, n=2))
    assert [c.message for c in second.choices] == [c.message for c in first.choices]
    assert second.choices[0].logprobs == first.choices[0].logprobs
    assert second.generation_usage.cached_answers == second.usage.cached == 2
    assert second.usage.tokens == 0
    assert second.generation_usage.completion_tokens == first.generation_usage.completion_tokens
    assert used(live) == (tokens, hits + 2)
    events = list(stub.ChatStream(pb.ChatStreamRequest(request=cached("Hello", logprobs=0, n=2))))
    assert events[-1].usage.cached_answers == 2
    said = "".join(e.text.text for e in events if e.text.index == 0)
    assert said == text_of(first.choices[0])
    exposition = live.server.metrics.exposition().decode()
    assert 'forebay_cache_lookups_total{model="tiny",result="hit"} ' in exposition
    assert 'forebay_generation_ended_total{model="tiny",reason="cached"} ' in exposition


def test_what_differs_is_made_anew(stub: rpc.GenerationServiceStub) -> None:
    stub.Chat(cached("Other"))
    for other in (
        cached("Another"),
        cached("Other", max_tokens=63),
        cached("Other", stop=["zz"]),
        cached("Other", temperature=0.5, seed=7),
        cached("Other", logprobs=0),
    ):
        assert stub.Chat(other).generation_usage.cached_answers == 0
    tooled = cached("Other")
    tooled.tools.add(name="f")
    assert stub.Chat(tooled).generation_usage.cached_answers == 0


def test_sampled_answers_and_unasked_ones_are_never_cached(
    stub: rpc.GenerationServiceStub,
) -> None:
    for request in (cached("Dice", temperature=1.0), user("Plain")):
        for _ in range(2):
            assert stub.Chat(request).generation_usage.cached_answers == 0
    seeded = cached("Dice", temperature=1.0, seed=3)
    first, second = stub.Chat(seeded), stub.Chat(seeded)
    assert second.generation_usage.cached_answers == 1
    assert text_of(first.choices[0]) == text_of(second.choices[0])


def test_completions_and_openais_door(gateway: Gateway, stub: rpc.GenerationServiceStub) -> None:
    request = pb.CompleteRequest(prompts=["To be", "The"], cache=True, echo=True)
    request.sampling.temperature = 0
    request.sampling.max_tokens = 8
    first, second = stub.Complete(request), stub.Complete(request)
    assert second.generation_usage.cached_answers == 2
    assert [c.text for c in first.completions] == [c.text for c in second.completions]
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "By the door"}],
        "temperature": 0,
        "max_tokens": 10,
        "cache": True,
    }
    one, two = (gateway.http.post("/v1/chat/completions", json=body).json() for _ in range(2))
    assert one["choices"][0]["message"] == two["choices"][0]["message"]
    assert "cached_answers" not in one["usage"] and two["usage"]["cached_answers"] == 1


def test_a_model_may_be_configured_to_use_it(
    start: Start, tmp_path_factory: pytest.TempPathFactory
) -> None:
    models = random_openvino(tmp_path_factory.mktemp("kept"), config="cache: {enabled: true}\n")
    stub = rpc.GenerationServiceStub(start(models).channel)
    stub.Chat(user("Hello"))
    assert stub.Chat(user("Hello")).generation_usage.cached_answers == 1
    declined = user("Hello")
    declined.cache = False
    assert stub.Chat(declined).generation_usage.cached_answers == 0
