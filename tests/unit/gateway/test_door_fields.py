"""Bodies at the doors of OpenAI and Anthropic: values of the wrong type are the caller's fault, and
are told with their path."""

from __future__ import annotations

import json
from typing import Any

import pytest
from forebay.errors import InvalidArgument, http_error
from forebay.v1 import batch_pb2
from forebay_gateway.anthropic import requests
from forebay_gateway.anthropic.places import Places
from forebay_gateway.openai import batch_lines, chat, completions, embeddings, responses

USER = {"role": "user", "content": "Hello"}


def refused(read: Any, body: dict[str, Any]) -> str:
    """The path that is refused."""
    with pytest.raises(InvalidArgument) as caught:
        read(body)
    return caught.value.violations[0].field


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ({"tools": 5}, "tools"),
        ({"documents": 5}, "documents"),
        ({"documents": [{"title": "a"}]}, "documents[0].text"),
        ({"stop_token_ids": 5}, "stop_token_ids"),
        ({"stop_token_ids": [2**40]}, "stop_token_ids[0]"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "messages[0].role"),
        ({"messages": [USER, {"role": "user", "content": [{"type": "text"}]}]},
         "messages[1].content[0].text"),
        ({"messages": [{"role": "assistant", "tool_calls": 5}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]},
         "messages[0].tool_calls[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": 5}}]}, "tools[0].function.name"),
        ({"tool_choice": {"function": {}}}, "tool_choice.function.name"),
        ({"structured_outputs": {"choice": ["a", 5]}}, "structured_outputs.choice[1]"),
        ({"structured_outputs": {"regex": 5}}, "structured_outputs.regex"),
    ],
)  # fmt: skip
def test_chats(given: dict[str, Any], path: str) -> None:
    assert refused(chat.read, {"model": "m", "messages": [USER], **given}) == path


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ({"input": [{"type": ["message"]}]}, "input[0].type"),
        ({"input": [{"role": {}, "content": "a"}]}, "input[0].role"),
        ({"input": [{"type": "reasoning", "summary": 5}]}, "input[0].summary"),
        ({"input": [{"type": "reasoning", "summary": [{"text": 5}]}]}, "input[0].summary[0].text"),
        ({"input": [{"type": "function_call", "call_id": "a"}]}, "input[0].name"),
        ({"include": 5}, "include"),
        ({"stream_options": "x"}, "stream_options"),
        ({"tools": 5}, "tools"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.name"),
    ],
)
def test_responses(given: dict[str, Any], path: str) -> None:
    assert refused(responses.read, {"model": "m", "input": "Hello", **given}) == path


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ({"system": 5}, "system"),
        ({"system": ["a"]}, "system[0]"),
        ({"metadata": 5}, "metadata"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": "a"}]}]},
         "messages[0].content[0].source"),
        ({"messages": [{"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "a", "content": 5}]}]},
         "messages[0].content[0].content"),
        ({"messages": [{"role": "assistant", "content": [
            {"type": "tool_use", "id": "a", "name": "b", "input": 5}]}]},
         "messages[0].content[0].input"),
        ({"tools": 5}, "tools"),
        ({"tools": [{}]}, "tools[0].name"),
        ({"tool_choice": {"type": ["auto"]}}, "tool_choice.type"),
        ({"tool_choice": {"type": "auto", "other": 1}}, "tool_choice.other"),
        ({"metadata": {"other": "a"}}, "metadata.other"),
        ({"output_config": {"effort": "low"}}, "output_config.effort"),
        ({"output_config": {"format": {"type": "text"}}}, "output_config.format.type"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
        ({"messages": [{**USER, "role": "tool"}]}, "messages[0].role"),
        ({"tools": [{"name": "f", "input_schema": {}, "defer_loading": True}]},
         "tools[0].defer_loading"),
        ({"messages": [{**USER, "name": "a"}]}, "messages[0].name"),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]},
         "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [
            {"type": "text", "text": "a", "citations": [{}]}]}]},
         "messages[0].content[0].citations"),
        ({"messages": [{"role": "user", "content": [
            {"type": "image", "source": {"type": "file", "file_id": "a"}}]}]},
         "messages[0].content[0].source.type"),
        ({"messages": [{"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "a", "is_error": "yes"}]}]},
         "messages[0].content[0].is_error"),
        ({"cache_control": {"type": "persistent"}}, "cache_control.type"),
        ({"system": [{"type": "text", "text": "a", "cache_control": 5}]},
         "system[0].cache_control"),
        ({"tools": [{"name": "f", "cache_control": {"type": "ephemeral", "ttl": "9d"}}]},
         "tools[0].cache_control.ttl"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a",
            "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral",
            "scope": "b"}}]}]}]},
         "messages[0].content[0].content[0].cache_control.scope"),
    ],
)  # fmt: skip
def test_messages(given: dict[str, Any], path: str) -> None:
    body = {"model": "m", "max_tokens": 5, "messages": [USER], **given}
    assert refused(lambda b: requests.read(b, Places()), body) == path


@pytest.mark.parametrize(
    ("given", "contract", "path"),
    [
        ({"logprobs": True, "top_logprobs": 5}, "sampling.logprobs", "top_logprobs"),
        ({"max_completion_tokens": 5}, "sampling.max_tokens", "max_completion_tokens"),
        ({"max_tokens": 5}, "request.sampling.max_tokens", "max_tokens"),
        ({}, "template_values.messages", "chat_template_kwargs.messages"),
        ({"structured_outputs": {"regex": "["}}, "response_format.regex",
         "structured_outputs.regex"),
        ({"structured_outputs": {"json": {}}}, "response_format.json_schema",
         "structured_outputs.json"),
        ({"response_format": {}}, "response_format.json_schema", "response_format.json_schema"),
        ({}, "tools[1].parameters", "tools[1].function.parameters"),
        ({}, "tool_choice.name", "tool_choice.function.name"),
        ({}, "messages[0].content", "messages[0].content"),
    ],
)  # fmt: skip
def test_the_servers_paths_are_in_the_words_of_a_chat(
    given: dict[str, Any], contract: str, path: str
) -> None:
    status = chat.words(given)(InvalidArgument.at(contract, "is wrong").to_status())
    error = http_error(status)
    assert (error.param, error.message) == (path, f"{path}: is wrong")


@pytest.mark.parametrize(
    ("prompt", "contract", "path"),
    [
        ("", "prompts[0]", "prompt"),
        ([""], "prompts[0]", "prompt[0]"),
        ([5, 6], "token_ids[0].ids", "prompt"),
        ([[5], [6]], "token_ids[1].ids", "prompt[1]"),
        ("a", "sampling.logprobs", "logprobs"),
    ],
)
def test_the_servers_paths_are_in_the_words_of_a_completion(
    prompt: Any, contract: str, path: str
) -> None:
    status = completions.words({"prompt": prompt})(InvalidArgument.at(contract, "x").to_status())
    assert http_error(status).param == path


@pytest.mark.parametrize(
    ("given", "contract", "path"),
    [
        ("a", "texts[0]", "input"),
        (["a"], "texts[0]", "input[0]"),
        (["a"], "texts", "input"),
        ([5, 6], "token_ids[0].ids", "input"),
        ([5, 6], "token_ids[0].ids[1]", "input[1]"),
        ([[5], [6]], "token_ids[1].ids", "input[1]"),
        ("a", "dimensions", "dimensions"),
    ],
)
def test_the_servers_paths_are_in_the_words_of_embeddings(
    given: Any, contract: str, path: str
) -> None:
    status = embeddings.words({"input": given})(InvalidArgument.at(contract, "x").to_status())
    assert http_error(status).param == path


@pytest.mark.parametrize("note", ["", "float", "5", "[]", '{"endpoint": [], "said": 5}', "{"])
def test_a_result_with_a_note_of_somebody_elses(note: str) -> None:
    result = batch_pb2.BatchResult(note=note)
    result.error.code, result.error.field, result.error.message = (
        "INVALID_ARGUMENT", "sampling.top_p", "sampling.top_p: is 5"
    )  # fmt: skip
    error = json.loads(batch_lines.line(result))["response"]["body"]["error"]
    assert (error["param"], error["message"]) == ("top_p", "top_p: is 5")


def test_the_servers_paths_are_in_the_words_of_a_message() -> None:
    picture = {"type": "image", "source": {"type": "url", "url": "https://a/b.png"}}
    used = {"type": "tool_use", "id": "a", "name": "f", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "a", "content": "5"}
    body = {
        "model": "m",
        "max_tokens": 5,
        "system": "Be brief.",
        "stop_sequences": ["x"],
        "tools": [{"name": "f", "input_schema": {}}],
        "messages": [
            {"role": "user", "content": [picture]},
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "b"}, used]},
            {"role": "user", "content": [result, {"type": "text", "text": "Well?"}]},
        ],
    }
    places = Places()
    made = requests.read(body, places)
    assert len(made.messages) == 5
    for contract, path in {
        "messages[0].content[0].text": "system",
        "messages[1].content": "messages[0].content",
        "messages[1].content[0].image.url": "messages[0].content[0].source.url",
        "messages[2].tool_calls[0].arguments": "messages[1].content[1].input",
        "request.messages[3].tool_call_id": "messages[2].content[0].tool_use_id",
        "messages[3].content[0].text": "messages[2].content[0].content",
        "messages[4].content[0].text": "messages[2].content[1].text",
        "sampling.stop[0]": "stop_sequences[0]",
        "sampling.max_tokens": "max_tokens",
        "tools[0].parameters": "tools[0].input_schema",
        "messages": "messages",
    }.items():
        status = places.rename(InvalidArgument.at(contract, "is wrong").to_status())
        assert http_error(status).message == f"{path}: is wrong"


def test_such_a_line_of_a_batch_leaves_the_others_alone() -> None:
    body = {"model": "m", "messages": [USER], "tools": 5}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    item = batch_lines.read(json.dumps(line).encode(), 1, "/v1/chat/completions")
    assert (item.custom_id, item.invalid.field) == ("a", "tools")
