"""The real SDKs of OpenAI, Anthropic and LangChain, unchanged, through the gateway.

What is said is nonsense here: each door must say the same. Sense is in test_tiny_model.py.
"""

from __future__ import annotations

import json
from typing import Any

import anthropic
import httpx
import openai
import pytest
from forebay.v1 import generation_pb2_grpc as rpc
from pydantic import BaseModel, Field

from tests.conftest import Live, Start
from tests.integration.chats import text_of, user
from tests.integration.gateway import Gateway
from tests.integration.language_models import random_openvino

TOOL: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}
HELLO: Any = [{"role": "user", "content": "Who are you?"}]
#: What the trained tiny model says to HELLO.
SAID = "I am a tiny test model."


@pytest.fixture(scope="module")
def live(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Live:
    return start(random_openvino(tmp_path_factory.mktemp("models")))


@pytest.fixture(scope="module")
def said(live: Live) -> str:
    """What the model says to HELLO, by gRPC."""
    request = user("Who are you?", max_tokens=100)
    return text_of(rpc.GenerationServiceStub(live.channel).Chat(request).choices[0])


def test_openai_chat_whole(client: openai.OpenAI, said: str) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=HELLO, temperature=0, max_tokens=100
    )
    assert answer.choices[0].message.content == said and len(said) > 10
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.model == "tiny" and answer.system_fingerprint == "tiny@1"


def test_openai_chat_stream_with_usage_and_logprobs(client: openai.OpenAI, said: str) -> None:
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=HELLO,
            temperature=0,
            max_tokens=100,
            stream=True,
            logprobs=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == said
    tokens = [
        t.token
        for c in chunks
        if c.choices and c.choices[0].logprobs
        for t in c.choices[0].logprobs.content or ()
    ]
    assert "".join(tokens) == said
    assert chunks[-1].usage is not None and not chunks[-1].choices
    assert all(c.usage is None for c in chunks[:-1])


def test_openai_stream_helper_accumulates_tool_calls(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="tiny",
        messages=[{"role": "user", "content": "What is the weather in Paris?"}],
        tools=[TOOL],
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=0,
    ) as stream:
        kinds = [event.type for event in stream]
        answer = stream.get_final_completion()
    assert "tool_calls.function.arguments.delta" in kinds
    assert "tool_calls.function.arguments.done" in kinds
    calls = answer.choices[0].message.tool_calls
    assert calls and calls[0].function.name == "get_weather"
    assert set(json.loads(calls[0].function.arguments)) == {"city"}
    assert answer.choices[0].finish_reason == "tool_calls"


def test_openai_tool_round_trip(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
    named: Any = {"type": "function", "function": {"name": "get_weather"}}
    first = client.chat.completions.create(
        model="tiny", messages=messages, tools=[TOOL], tool_choice=named, temperature=0
    )
    said = first.choices[0].message
    assert said.tool_calls
    messages += [
        said.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": said.tool_calls[0].id, "content": "sunny 20"},
    ]
    second = client.chat.completions.create(
        model="tiny", messages=messages, tools=[TOOL], temperature=0, max_tokens=40
    )
    assert second.choices[0].message.content


class Person(BaseModel):
    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=120)


def test_openai_structured_output_helper(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="tiny",
        messages=[
            {"role": "user", "content": "Answer in JSON: Anna is 31 years old and lives in Rome."}
        ],
        response_format=Person,
        temperature=0,
    )
    parsed = answer.choices[0].message.parsed
    assert isinstance(parsed, Person)


def test_openai_completions_whole_and_streamed(client: openai.OpenAI) -> None:
    kwargs: Any = {
        "model": "tiny",
        "prompt": ["The origin", "To be"],
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }
    whole = client.completions.create(**kwargs, echo=True, logprobs=0)
    assert [c.index for c in whole.choices] == [0, 1]
    assert whole.choices[0].text.startswith("The origin")
    assert whole.choices[0].logprobs is not None
    texts = {0: "", 1: ""}
    for chunk in client.completions.create(**kwargs, stream=True, echo=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == {c.index: c.text for c in whole.choices}


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"modalities": ["audio"]}, "modalities"),
        ({"temperature": 9}, "temperature"),
        ({"max_tokens": 99999}, "max_tokens"),
        ({"max_completion_tokens": 99999}, "max_completion_tokens"),
        ({"logprobs": True, "top_logprobs": 5}, "top_logprobs"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        ({"structured_outputs": {"regex": "["}}, "structured_outputs.regex"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"tools": [TOOL], "tool_choice": "sometimes"}, "tool_choice"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
    ],
)
def test_openai_errors_name_the_field(client: openai.OpenAI, extra: Any, param: str) -> None:
    body = {"model": "tiny", "messages": HELLO, **extra}
    for stream in (False, True):
        if stream and "stream_options" in extra:
            continue
        with pytest.raises(openai.BadRequestError) as caught:
            client.post("/chat/completions", body={**body, "stream": stream}, cast_to=object)
        assert caught.value.param == param, caught.value.message


def test_an_empty_prompt_is_the_callers_fault(client: openai.OpenAI) -> None:
    for prompt, param in (("", "prompt"), (["a", ""], "prompt[1]")):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="tiny", prompt=prompt)
        assert caught.value.param == param and "must not be empty" in caught.value.message


def test_anthropic_errors_name_the_callers_field(gateway: Gateway) -> None:
    picture = {"type": "image", "source": {"type": "url", "url": "https://a/b.png"}}
    body = {"model": "tiny", "max_tokens": 5, "messages": HELLO, "system": "Be brief."}
    pictured = [{"role": "user", "content": [picture]}]
    odd = {"type": "object", "properties": {"a": {"type": "integer", "multipleOf": 5}}}
    for extra, path in (
        ({"messages": pictured}, "messages[0].content"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
        ({"tools": [{"name": "f", "input_schema": odd, "strict": True}]}, "tools[0].input_schema"),
        ({"max_tokens": 99999}, "max_tokens"),
    ):
        for stream in (False, True):
            answer = gateway.http.post("/v1/messages", json={**body, **extra, "stream": stream})
            assert answer.status_code == 400, path
            assert answer.json()["error"]["message"].startswith(f"{path}: ")


def test_openai_unknown_models_are_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-9", messages=HELLO)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-9", messages=HELLO, stream=True)


def test_langchain(gateway: Gateway, said: str) -> None:
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(
        base_url=f"{gateway.url}/v1",
        api_key="none",
        model="tiny",
        temperature=0,
        max_retries=0,
        max_completion_tokens=100,
    )
    assert model.invoke("Who are you?").content == said
    assert "".join(str(c.content) for c in model.stream("Who are you?")) == said
    called = model.bind_tools([TOOL], tool_choice="required", parallel_tool_calls=False).invoke(
        "What is the weather in Paris?"
    )
    assert called.tool_calls[0]["name"] == "get_weather"
    person = model.with_structured_output(Person, method="json_schema").invoke(
        "Answer in JSON: Anna is 31 years old and lives in Rome."
    )
    assert isinstance(person, Person)


def test_anthropic_messages(gateway: Gateway, said: str) -> None:
    sdk = anthropic.Anthropic(base_url=gateway.url, api_key="none", max_retries=0)
    answer = sdk.messages.create(
        model="tiny",
        max_tokens=50,
        messages=HELLO,
        extra_body={"temperature": 0},
        system="You are a helpful assistant.",
    )
    assert answer.content[0].type == "text" and answer.content[0].text
    assert answer.stop_reason in ("end_turn", "max_tokens") and answer.usage.output_tokens > 3
    with sdk.messages.stream(
        model="tiny", max_tokens=100, messages=HELLO, extra_body={"temperature": 0}
    ) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == said
    assert final.stop_reason in ("end_turn", "max_tokens") and final.usage.output_tokens > 3
    cached: Any = {"type": "ephemeral"}  # as Claude Code and LangChain send it by default
    tool: Any = {
        "name": "get_weather",
        "input_schema": TOOL["function"]["parameters"],
        "cache_control": cached,
    }
    question: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
    with sdk.messages.stream(
        model="tiny",
        max_tokens=100,
        messages=question,
        tools=[tool],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
        extra_body={"temperature": 0},
    ) as stream:
        final = stream.get_final_message()
    assert final.stop_reason == "tool_use"
    used = next(b for b in final.content if b.type == "tool_use")
    assert used.name == "get_weather" and set(used.input) == {"city"}
    question += [
        {"role": "assistant", "content": [b.model_dump(exclude_none=True) for b in final.content]},
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": used.id,
                    "content": "sunny",
                    "cache_control": cached,
                }
            ],
        },
    ]
    after = sdk.messages.create(
        model="tiny",
        max_tokens=30,
        system=[{"type": "text", "text": "Be brief.", "cache_control": cached}],
        messages=question,
        tools=[tool],
        cache_control=cached,
        extra_body={"temperature": 0},
    )
    assert after.content
    with pytest.raises(anthropic.BadRequestError) as caught:
        sdk.messages.create(model="tiny", max_tokens=50, messages=HELLO, service_tier="auto")
    assert "service_tier" in str(caught.value)
    with pytest.raises(anthropic.NotFoundError):
        sdk.messages.create(model="claude-9", max_tokens=50, messages=HELLO)


def test_anthropic_counts_what_the_model_reads(gateway: Gateway) -> None:
    sdk = anthropic.Anthropic(base_url=gateway.url, api_key="none", max_retries=0)
    tool: Any = {"name": "get_weather", "input_schema": TOOL["function"]["parameters"]}
    used: Any = [
        {"role": "user", "content": "What is the weather in Paris?"},
        {"role": "assistant", "content": [
            {"type": "tool_use", "id": "a", "name": "get_weather", "input": {"city": "Paris"}}]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "a", "content": "sunny"}]},
    ]  # fmt: skip
    asked: list[Any] = [
        {"messages": HELLO},
        {"messages": HELLO, "system": "Be brief."},
        {"messages": HELLO, "tools": [tool], "tool_choice": {"type": "auto"}},
        {"messages": used, "tools": [tool]},
    ]
    counts = []
    for body in asked:
        counts.append(sdk.messages.count_tokens(model="tiny", **body).input_tokens)
        usage = sdk.messages.create(model="tiny", max_tokens=1, **body).usage
        assert counts[-1] == usage.input_tokens + (usage.cache_read_input_tokens or 0)
    assert sorted(set(counts)) == counts
    long: Any = [{"role": "user", "content": "word " * 3000}]
    assert sdk.messages.count_tokens(model="tiny", messages=long).input_tokens > 2048
    body = {"model": "tiny", "messages": HELLO}
    odd = {"type": "object", "properties": {"a": {"type": "integer", "multipleOf": 5}}}
    strict = [{"name": "f", "input_schema": odd, "strict": True}]
    for extra, path in (
        ({"max_tokens": 5}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"tools": strict}, "tools[0].input_schema"),
    ):
        answer = gateway.http.post("/v1/messages/count_tokens", json={**body, **extra})
        assert answer.status_code == 400, path
        assert answer.json()["error"]["message"].startswith(f"{path}: ")
    with pytest.raises(anthropic.NotFoundError):
        sdk.messages.count_tokens(model="claude-9", messages=HELLO)


def test_rest_streams_are_server_sent_events(gateway: Gateway, said: str) -> None:
    request = {
        "messages": [{"role": "CHAT_ROLE_USER", "content": [{"text": "Who are you?"}]}],
        "sampling": {"temperature": 0, "max_tokens": 100},
    }
    answer = gateway.http.post("/api/v1/generation:chat", json=request).json()
    assert answer["choices"][0]["message"]["content"][0]["text"] == said
    body = {"request": request}
    with gateway.http.stream("POST", "/api/v1/generation:chatStream", json=body) as stream:
        events = [json.loads(x[6:]) for x in stream.iter_lines() if x.startswith("data: ")]
    assert "".join(e["text"]["text"] for e in events if "text" in e) == said


def test_a_browser_that_leaves_ends_the_stream(gateway: Gateway, live: Live) -> None:
    body = {
        "model": "tiny",
        "messages": HELLO,
        "stream": True,
        "max_tokens": 1900,
        "ignore_eos": True,
    }
    with httpx.stream("POST", f"{gateway.url}/v1/chat/completions", json=body) as stream:
        next(stream.iter_lines())
    client = live.server.repository.pool.loaded[("tiny", 1)].client
    import time

    deadline = time.monotonic() + 10
    while client.gate.running:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_budgets_and_rates_are_429_with_a_true_wait(
    start: Start, tmp_path_factory: pytest.TempPathFactory
) -> None:
    import time

    from forebay_server.access.keys import Limits

    live = start(random_openvino(tmp_path_factory.mktemp("keys")), auth__required="always")

    def key(limits: Limits) -> str:
        return live.run(live.server.keys.create("k", ("infer", "read"), limits=limits))[1]

    door = Gateway(live)
    body = {"model": "tiny", "messages": HELLO, "temperature": 0, "max_tokens": 20}
    try:
        # So slow that a first answer on a busy machine does not outlast the wait.
        rated = {"authorization": f"Bearer {key(Limits(requests_per_second=0.4, burst=1))}"}
        assert door.http.post("/v1/chat/completions", json=body, headers=rated).status_code == 200
        refused = door.http.post("/v1/chat/completions", json=body, headers=rated)
        assert refused.status_code == 429
        wait = int(refused.headers["retry-after-ms"]) / 1e3
        assert 0 < wait <= 2.5 and int(refused.headers["retry-after"]) >= wait
        time.sleep(wait)
        assert door.http.post("/v1/chat/completions", json=body, headers=rated).status_code == 200

        bound = {"authorization": f"Bearer {key(Limits(budget_tokens=100, budget_period='day'))}"}
        first = door.http.post("/v1/chat/completions", json=body, headers=bound)
        used = first.json()["usage"]["total_tokens"]
        standing = door.http.get("/api/v1/usage:budget", headers=bound).json()
        assert (standing["spent_tokens"], standing["reserved_tokens"]) == (used, 0)
        assert standing["spent_money"] > 0
        long = {**body, "max_tokens": 99}
        spent = door.http.post("/v1/chat/completions", json=long, headers=bound)
        assert spent.status_code == 429 and spent.json()["error"]["code"] == "budget_spent"
        midnight = 86400 - time.time() % 86400
        assert abs(int(spent.headers["retry-after"]) - midnight) < 5
        # An answer without a length of its own is held to what is left.
        counting = {**body, "messages": [{"role": "user", "content": "Count to 30"}]}
        counting.pop("max_tokens")
        held = door.http.post(
            "/v1/chat/completions", json={**counting, "ignore_eos": True}, headers=bound
        )
        assert held.json()["choices"][0]["finish_reason"] == "length"
        assert used + held.json()["usage"]["total_tokens"] == 100
    finally:
        door.stop()
