"""vLLM in its own process, with random weights: the same doors, aborts to the block, kill -9."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import openai
import pytest
from forebay.v1 import generation_pb2 as pb
from forebay.v1 import generation_pb2_grpc as rpc
from forebay.v1 import usage_pb2, usage_pb2_grpc

from tests.conftest import Live, Start
from tests.integration.chats import refused, text_of, user
from tests.integration.gateway import Gateway
from tests.integration.language_models import random_vllm, vllm_python
from tests.integration.test_llm_doors import HELLO, TOOL, Person

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def tiny(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Live:
    return start(
        random_vllm(tmp_path_factory.mktemp("models")),
        generation__vllm_python=vllm_python(),
        generation__vllm_cache_gb=1,
    )


@pytest.fixture(scope="module")
def stub(tiny: Live) -> rpc.GenerationServiceStub:
    return rpc.GenerationServiceStub(tiny.channel)


@pytest.fixture(scope="module")
def client(tiny: Live) -> Iterator[openai.OpenAI]:
    gateway = Gateway(tiny)
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as sdk:
        yield sdk
    gateway.stop()


def engine(live: Live) -> Any:
    return live.server.repository.pool.loaded[("tiny", 1)].client.engine


def until(
    done: Callable[[], bool], what: str, told: Callable[[], Any], seconds: float = 30
) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, (what, told())
        time.sleep(0.05)


def test_the_openai_sdk_talks_to_vllm(client: openai.OpenAI) -> None:
    how: Any = {"model": "tiny", "messages": HELLO, "temperature": 0, "max_tokens": 40}
    said = client.chat.completions.create(**how).choices[0].message.content
    chunks = client.chat.completions.create(**how, stream=True, logprobs=True, top_logprobs=3)
    text, tops = "", []
    for chunk in chunks:
        text += chunk.choices[0].delta.content or ""
        if chunk.choices[0].logprobs:
            tops += [len(t.top_logprobs) for t in chunk.choices[0].logprobs.content or ()]
    assert text and text == said and tops and min(tops) >= 3


def test_tool_calls_are_read_by_vllms_parser(client: openai.OpenAI) -> None:
    question: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
    for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        with client.chat.completions.stream(
            model="tiny", messages=question, tools=[TOOL], tool_choice=choice, temperature=0
        ) as stream:
            answer = stream.get_final_completion()
        calls = answer.choices[0].message.tool_calls
        assert calls and calls[0].function.name == "get_weather"
        assert set(json.loads(calls[0].function.arguments)) == {"city"}
    free = client.chat.completions.create(
        model="tiny", messages=question, tools=[TOOL], temperature=0, max_tokens=40
    )
    assert free.choices[0].finish_reason in ("tool_calls", "stop", "length")


def test_structured_output_and_logit_bias(
    client: openai.OpenAI, stub: rpc.GenerationServiceStub
) -> None:
    answer = client.chat.completions.parse(
        model="tiny",
        messages=[{"role": "user", "content": "Answer in JSON: Anna is 31."}],
        response_format=Person,
        temperature=0,
    )
    assert isinstance(answer.choices[0].message.parsed, Person)
    request = user("Hello")
    request.response_format.grammar = 'root ::= "yes" | "no"'
    assert text_of(stub.Chat(request).choices[0]) in ("yes", "no")
    request.response_format.grammar = "root ::= ((("
    assert refused(lambda: stub.Chat(request))
    biased = user("Hello", max_tokens=4)
    biased.sampling.logit_bias.add(token_id=50, bias=100)
    biased.sampling.logprobs = 1
    assert {t.token_id for t in stub.Chat(biased).choices[0].logprobs} == {50}


def test_prefixes_are_found_in_the_cache(stub: rpc.GenerationServiceStub) -> None:
    request = user("The same long text. " * 40)
    stub.Chat(request)
    again = stub.Chat(request).generation_usage
    assert again.cached_tokens > again.prompt_tokens / 2


def totals(live: Live) -> tuple[int, int]:
    """Tokens in the ledger, and vLLM's own count of tokens in and out."""
    service = usage_pb2_grpc.UsageServiceStub(live.channel)
    rows = service.ListUsage(usage_pb2.ListUsageRequest(model="tiny")).rows
    stats = engine(live).info()
    theirs = int(stats.get("num_generation_tokens", 0) + stats.get("num_prompt_tokens", 0))
    return sum(r.counters.tokens for r in rows), theirs


def test_two_hundred_streams_with_half_of_them_cancelled(
    tiny: Live, stub: rpc.GenerationServiceStub
) -> None:
    """All blocks are free afterwards, usage is vLLM's own to the token, nothing piles up."""
    rng = random.Random(5)
    memory = []

    def one(job: tuple[int, bool]) -> int:
        stop_after, cancelled = job
        request = user(f"Count to {stop_after}", max_tokens=120, ignore_eos=True)
        call = stub.ChatStream(pb.ChatStreamRequest(request=request))
        tokens = 0
        for event in call:
            if event.HasField("text"):
                tokens += event.text.tokens
            if cancelled and tokens >= stop_after:
                call.cancel()
                return tokens
        return tokens

    rounds = int(os.environ.get("FOREBAY_TEST_ROUNDS", "10"))
    with ThreadPoolExecutor(200) as pool:
        for _ in range(rounds):
            jobs = [(rng.randint(3, 60), i % 2 == 0) for i in range(200)]
            list(pool.map(one, jobs))
            until(
                lambda: (
                    engine(tiny).info().get("running") == 0
                    and engine(tiny).info().get("kv_use", 1) == 0
                ),
                "blocks of cancelled streams are not given back",
                engine(tiny).info,
            )
            until(
                lambda: totals(tiny)[0] == totals(tiny)[1],
                "usage is not exact",
                lambda: totals(tiny),
            )
            memory.append(engine(tiny).info()["memory_bytes"])
    assert engine(tiny).info()["memory_bytes"] < memory[len(memory) // 3] * 1.05 + (32 << 20)
    assert tiny.server.repository.pool.loaded[("tiny", 1)].client.gate.running == 0


def test_kill_9_in_the_middle_is_a_clean_error_and_the_next_call_succeeds(
    tiny: Live, stub: rpc.GenerationServiceStub
) -> None:
    hello = user("Who are you?", max_tokens=20)
    before = text_of(stub.Chat(hello).choices[0])
    request = user("Count to 30", max_tokens=1900, ignore_eos=True)
    call = stub.ChatStream(pb.ChatStreamRequest(request=request))
    for event in call:
        if event.HasField("text"):
            break
    pid = engine(tiny).info()["pid"]
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert text_of(stub.Chat(hello, timeout=300).choices[0]) == before
    assert engine(tiny).info()["pid"] != pid
    assert not Path(f"/proc/{pid}").exists()
