"""What the doors of OpenAI and Anthropic say of, and to, somebody else's server behind this one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

from tests.conftest import Start
from tests.integration.scripted_upstream import ScriptedUpstream
from tests.integration.test_gateway import Gateway
from tests.integration.test_upstream import put


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
