"""Models behind an OpenAI-compatible server: another Forebay, by its gateway."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from forebay.v1 import generation_pb2 as pb
from forebay.v1 import generation_pb2_grpc as rpc
from forebay.v1 import usage_pb2, usage_pb2_grpc

from tests.conftest import Live, Start
from tests.integration.chats import WEATHER, refused, text_of, user
from tests.integration.gateway import Gateway
from tests.integration.language_models import random_openvino
from tests.integration.scripted_upstream import ScriptedUpstream


@pytest.fixture(scope="module")
def behind(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    live = start(random_openvino(tmp_path_factory.mktemp("behind")))
    stub = rpc.GenerationServiceStub(live.channel)
    gateway = Gateway(live)
    gateway.said = text_of(stub.Chat(user("Who are you?")).choices[0])  # type: ignore[attr-defined]
    yield gateway
    gateway.stop()


@pytest.fixture(scope="module")
def said(behind: Gateway) -> str:
    """What the model says to "Who are you?", asked without a way around."""
    return behind.said  # type: ignore[attr-defined]


def nobody() -> str:
    """An address where nobody listens."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{s.getsockname()[1]}/v1"


def put(root: Path, name: str, options: dict[str, Any]) -> None:
    folder = root / name
    (folder / "1").mkdir(parents=True)
    manifest = {"task": "generation", "generation": {"context_length": 2048}}
    (folder / "1" / "manifest.json").write_text(json.dumps(manifest))
    config = {
        "engine": "openai",
        "engine_options": options,
        "generation": {"prices": {"prompt": 1.0, "completion": 2.0}},
    }
    (folder / "model.yaml").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def front(behind: Gateway, start: Start, tmp_path_factory: pytest.TempPathFactory) -> Live:
    root = tmp_path_factory.mktemp("front")
    good = {"base_url": f"{behind.url}/v1", "model": "tiny"}
    put(root, "far", good)
    put(root, "chain", {"base_url": nobody(), "model": "x", "retries": 0, "fallbacks": [good]})
    put(root, "lost", {"base_url": nobody(), "model": "x", "retries": 0})
    put(root, "wrong", {"base_url": good["base_url"], "model": "gpt-9"})
    return start(root)


@pytest.fixture(scope="module")
def stub(front: Live) -> rpc.GenerationServiceStub:
    return rpc.GenerationServiceStub(front.channel)


def to(model: str, request: pb.ChatRequest) -> pb.ChatRequest:
    request.model = model
    return request


def test_chats_streams_and_usage_come_from_the_upstream(
    stub: rpc.GenerationServiceStub, said: str
) -> None:
    answer = stub.Chat(to("far", user("Who are you?")))
    assert text_of(answer.choices[0]) == said
    assert answer.served_by.model == "far"
    assert answer.generation_usage.prompt_tokens > 5
    request = pb.ChatStreamRequest(request=to("far", user("Who are you?")))
    events = list(stub.ChatStream(request))
    assert "".join(e.text.text for e in events) == said
    assert events[-1].usage == answer.generation_usage
    completion = stub.Complete(
        pb.CompleteRequest(
            model="far",
            prompts=["The"],
            sampling=pb.Sampling(max_tokens=5, temperature=0, ignore_eos=True),
        )
    )
    assert completion.generation_usage.completion_tokens == 5


def test_tools_and_forms_pass_through(stub: rpc.GenerationServiceStub) -> None:
    request = to("far", user("What is the weather in Paris?", max_tokens=200))
    request.tools.add(name="get_weather", parameters=json.dumps(WEATHER))
    request.tool_choice.mode = pb.TOOL_MODE_REQUIRED
    request.parallel_tool_calls = False
    called = stub.Chat(request).choices[0]
    assert called.finish_reason == pb.FINISH_REASON_TOOL_CALLS
    assert set(json.loads(called.message.tool_calls[0].arguments)) == {"city"}
    formed = to("far", user("Answer in JSON: Anna lives in Rome.", max_tokens=200))
    formed.response_format.json_schema = json.dumps(WEATHER)
    assert set(json.loads(text_of(stub.Chat(formed).choices[0]))) == {"city"}
    formed.response_format.CopyFrom(pb.ResponseFormat(regex="a+"))
    assert "response_format" in refused(lambda: stub.Chat(formed))


def test_what_the_upstream_refuses_is_the_callers_fault(stub: rpc.GenerationServiceStub) -> None:
    assert "2048" in refused(lambda: stub.Chat(to("far", user("word " * 3000))))["request"]
    assert refused(lambda: stub.Chat(to("wrong", user("Hello"))))


def test_the_next_in_the_chain_answers_and_a_dead_one_is_left_alone(
    stub: rpc.GenerationServiceStub, front: Live, said: str
) -> None:
    for _ in range(7):
        assert text_of(stub.Chat(to("chain", user("Who are you?"))).choices[0]) == said
    engine = front.server.repository.pool.loaded[("chain", 1)].client.engine
    assert engine._targets[0].breaker.wait_s() > 0
    for _ in range(7):
        with pytest.raises(grpc.RpcError) as caught:
            stub.Chat(to("lost", user("Hello")))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "left alone" in caught.value.details()


def test_all_that_shapes_an_answer_is_passed_on(
    start: Start, tmp_path_factory: pytest.TempPathFactory
) -> None:
    upstream = ScriptedUpstream()
    root = tmp_path_factory.mktemp("all")
    forms = ["json_object", "regex", "choice"]
    put(root, "all", {"base_url": upstream.url, "model": "x", "structures": forms})
    stub = rpc.GenerationServiceStub(start(root).channel)
    request = to("all", user("Hi", ignore_eos=True, stop_token_ids=[7]))
    request.documents.add(title="a", text="b")
    request.template_values = '{"enable_thinking": false}'
    request.response_format.regex = r"Hello\."
    stub.Chat(request)
    sent = upstream.bodies[-1]
    assert (sent["ignore_eos"], sent["stop_token_ids"]) == (True, [7])
    assert sent["documents"] == [{"title": "a", "text": "b"}]
    assert sent["chat_template_kwargs"] == {"enable_thinking": False}
    assert sent["structured_outputs"] == {"regex": r"Hello\."}
    request.response_format.CopyFrom(pb.ResponseFormat(choices=["Hello.", "No."]))
    stub.Chat(request)
    assert upstream.bodies[-1]["structured_outputs"] == {"choice": ["Hello.", "No."]}
    upstream.script = lambda messages: "{}"
    text = pb.CompleteRequest(model="all", prompts=["Hi"])
    text.response_format.json_object = True
    stub.Complete(text)
    assert upstream.bodies[-1]["response_format"] == {"type": "json_object"}
    upstream.stop()


def test_what_only_the_upstream_can_count_is_not_cut(stub: rpc.GenerationServiceStub) -> None:
    request = to("far", user("Hello"))
    request.truncate_prompt = True
    assert "only its upstream can count" in refused(lambda: stub.Chat(request))["truncate_prompt"]
    text = pb.CompleteStreamRequest(request={"model": "far", "prompts": ["a"]})
    text.request.truncate_prompt = True
    assert "request.truncate_prompt" in refused(lambda: list(stub.CompleteStream(text)))


def test_an_answer_that_nobody_reads_to_its_end_counts_by_what_came(
    start: Start, tmp_path_factory: pytest.TempPathFactory
) -> None:
    upstream = ScriptedUpstream()
    upstream.pause_s = 0.02
    upstream.script = lambda messages: "word" * 500
    root = tmp_path_factory.mktemp("left")
    put(root, "left", {"base_url": upstream.url, "model": "x"})
    live = start(root)
    call = rpc.GenerationServiceStub(live.channel).ChatStream(
        pb.ChatStreamRequest(request=to("left", user("question " * 100)))
    )
    seen = 0
    for event in call:
        seen += event.text.tokens
        if seen >= 10:
            break
    call.cancel()
    assert upstream.cut_off.wait(10)
    usage = usage_pb2_grpc.UsageServiceStub(live.channel)
    deadline = time.monotonic() + 10
    while not (rows := usage.ListUsage(usage_pb2.ListUsageRequest(model="left")).rows):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    # 900 characters of the prompt, and some pieces more than were seen.
    assert 225 + seen <= sum(r.counters.tokens for r in rows) < 225 + 100
    upstream.stop()


def test_an_answer_that_is_cut_off_is_an_error_and_no_answer(
    start: Start, tmp_path_factory: pytest.TempPathFactory
) -> None:
    upstream = ScriptedUpstream()
    upstream.dies_after = 2
    root = tmp_path_factory.mktemp("cut")
    put(root, "cut", {"base_url": upstream.url, "model": "x", "retries": 0})
    stub = rpc.GenerationServiceStub(start(root).channel)
    for call in (
        lambda: stub.Chat(to("cut", user("Hello"))),
        lambda: list(stub.ChatStream(pb.ChatStreamRequest(request=to("cut", user("Hello"))))),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            call()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "broke off" in (caught.value.details() or "")
    upstream.stop()
