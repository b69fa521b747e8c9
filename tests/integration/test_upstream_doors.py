"""What the doors of OpenAI and Anthropic say of, and to, somebody else's server behind this one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest
from pydantic import BaseModel

from tests.conftest import Start
from tests.integration.gateway import Gateway
from tests.integration.scripted_upstream import ScriptedUpstream
from tests.integration.test_upstream import put


class Place(BaseModel):
    city: str


@pytest.fixture(scope="module")
def upstream() -> Iterator[ScriptedUpstream]:
    running = ScriptedUpstream()
    yield running
    running.stop()


@pytest.fixture(scope="module")
def gateway(
    upstream: ScriptedUpstream, start: Start, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    root = tmp_path_factory.mktemp("models")
    put(root, "far", {"base_url": upstream.url, "model": "x"})
    running = Gateway(start(root))
    yield running
    running.stop()


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ({"content": "no such city"}, "no such city"),
        ({"content": "no such city", "is_error": False}, "no such city"),
        ({"content": "no such city", "is_error": True}, "Error: no such city"),
        ({"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
          "is_error": True}, "Error: ab"),
        ({"is_error": True}, "Error: the tool failed"),
    ],
)  # fmt: skip
def test_a_tool_that_failed_is_told_to_the_model(
    gateway: Gateway, upstream: ScriptedUpstream, given: Any, read: str
) -> None:
    used: Any = {"type": "tool_use", "id": "a", "name": "f", "input": {}}
    sdk = anthropic.Anthropic(base_url=gateway.url, api_key="none", max_retries=0)
    messages: Any = [
        {"role": "user", "content": "What is the weather?"},
        {"role": "assistant", "content": [used]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", **given}]},
    ]
    sdk.messages.create(model="far", max_tokens=20, messages=messages)
    said = upstream.bodies[-1]["messages"][-1]
    assert said == {"role": "tool", "tool_call_id": "a", "content": read}


def test_the_form_of_a_message(gateway: Gateway, upstream: ScriptedUpstream) -> None:
    sdk = anthropic.Anthropic(base_url=gateway.url, api_key="none", max_retries=0)
    upstream.script = lambda messages: '{"city": "Rome"}'
    asked: Any = [
        {"role": "user", "content": "Where?"},
        {"role": "system", "content": "Be brief."},
    ]
    parsed = sdk.messages.parse(model="far", max_tokens=20, messages=asked, output_format=Place)
    assert parsed.parsed_output == Place(city="Rome")
    sent = upstream.bodies[-1]
    assert sent["response_format"]["json_schema"]["schema"]["required"] == ["city"]
    assert [m["role"] for m in sent["messages"]] == ["user", "system"]
    upstream.script = lambda messages: "Hello."
    odd: Any = {"format": {"type": "json_schema", "schema": {"type": "nothing"}}}
    with pytest.raises(anthropic.BadRequestError, match=r"output_config\.format\.schema: "):
        sdk.messages.create(model="far", max_tokens=20, messages=asked, output_config=odd)


NO = "I cannot help with that."
ASKED: Any = [{"role": "user", "content": "Do it."}]
SCHEMA: Any = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}


@pytest.fixture
def refusing(upstream: ScriptedUpstream) -> Iterator[None]:
    script = upstream.script
    upstream.script, upstream.refuses = lambda messages: NO, True
    yield
    upstream.script, upstream.refuses = script, False


@pytest.mark.usefixtures("refusing")
def test_a_refusal_of_a_chat(client: openai.OpenAI, upstream: ScriptedUpstream) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
    for extra in ({}, {"response_format": form}):  # who refuses breaks no form
        choice = client.chat.completions.create(model="far", messages=ASKED, **extra).choices[0]
        assert (choice.message.refusal, choice.message.content) == (NO, None)
        assert choice.finish_reason == "stop"
    with client.chat.completions.stream(model="far", messages=ASKED) as stream:
        deltas = [e.delta for e in stream if e.type == "refusal.delta"]
        message = stream.get_final_completion().choices[0].message
    assert "".join(deltas) == message.refusal == NO and not message.content
    told: Any = [
        *ASKED,
        message.model_dump(exclude={"parsed"}),
        {"role": "user", "content": "Why?"},
    ]
    client.chat.completions.create(model="far", messages=told)
    assert upstream.bodies[-1]["messages"][1] == {"role": "assistant", "content": NO}


@pytest.mark.usefixtures("refusing")
def test_a_refusal_of_a_response(client: openai.OpenAI, upstream: ScriptedUpstream) -> None:
    form: Any = {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}}
    whole = client.responses.create(model="far", input="Do it.", text=form)
    part: Any = whole.output[0].content[0]  # type: ignore[union-attr]
    assert (part.type, part.refusal, whole.output_text) == ("refusal", NO, "")
    with client.responses.stream(model="far", input="Do it.") as stream:
        events = list(stream)
        final = stream.get_final_response()
    kinds = list(dict.fromkeys(e.type for e in events))
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.refusal.delta",
        "response.refusal.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert final.output[0].content[0].refusal == NO  # type: ignore[union-attr]
    client.responses.create(model="far", input="Why?", previous_response_id=whole.id)
    assert upstream.bodies[-1]["messages"][1] == {"role": "assistant", "content": NO}
    told: Any = [*ASKED, whole.output[0].model_dump(), *ASKED]
    client.responses.create(model="far", input=told)
    assert upstream.bodies[-1]["messages"][1] == {"role": "assistant", "content": NO}


@pytest.mark.usefixtures("refusing")
def test_a_refusal_of_a_message(gateway: Gateway) -> None:
    sdk = anthropic.Anthropic(base_url=gateway.url, api_key="none", max_retries=0)
    whole = sdk.messages.create(model="far", max_tokens=20, messages=ASKED)
    with sdk.messages.stream(model="far", max_tokens=20, messages=ASKED) as stream:
        streamed = stream.get_final_message()
    for message in (whole, streamed):
        assert message.stop_reason == "refusal"
        assert [b.text for b in message.content if b.type == "text"] == [NO]


def test_a_refusal_is_an_assistants(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        asked: Any = [{"role": "user", "content": "a", "refusal": "b"}]
        client.chat.completions.create(model="far", messages=asked)
    assert caught.value.param == "messages[0].refusal"


def test_an_upstreams_tokens_are_not_guessed(gateway: Gateway, upstream: ScriptedUpstream) -> None:
    sdk = anthropic.Anthropic(base_url=gateway.url, api_key="none", max_retries=0)
    before = len(upstream.bodies)
    with pytest.raises(anthropic.BadRequestError, match="'far' has no tokenizer here"):
        sdk.messages.count_tokens(model="far", messages=ASKED)
    assert len(upstream.bodies) == before
