"""Bodies at the doors of OpenAI and Anthropic: values of the wrong type are the caller's fault, and
are told with their path."""

from __future__ import annotations

import json
from typing import Any

import pytest
from forebay.errors import InvalidArgument
from forebay_gateway.anthropic import messages
from forebay_gateway.openai import batch_lines, chat, responses

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
    ],
)  # fmt: skip
def test_messages(given: dict[str, Any], path: str) -> None:
    body = {"model": "m", "max_tokens": 5, "messages": [USER], **given}
    assert refused(messages.read, body) == path


def test_such_a_line_of_a_batch_leaves_the_others_alone() -> None:
    body = {"model": "m", "messages": [USER], "tools": 5}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    item = batch_lines.read(json.dumps(line).encode(), 1, "/v1/chat/completions")
    assert (item.custom_id, item.invalid.field) == ("a", "tools")
