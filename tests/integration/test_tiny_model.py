"""What needs a model that has learned something: the trained tiny model says what it was taught."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from forebay.v1 import generation_pb2 as pb
from forebay.v1 import generation_pb2_grpc as rpc

from tests.conftest import Live, Start
from tests.integration.chats import text_of, user
from tests.integration.gateway import Gateway
from tests.integration.language_models import openvino_models
from tests.integration.test_llm_doors import HELLO, SAID, TOOL


@pytest.fixture(scope="module")
def tiny(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Live:
    return start(openvino_models(tmp_path_factory.mktemp("models")))


@pytest.fixture(scope="module")
def stub(tiny: Live) -> rpc.GenerationServiceStub:
    return rpc.GenerationServiceStub(tiny.channel)


def test_it_says_who_it_is_and_ends_by_itself(stub: rpc.GenerationServiceStub) -> None:
    answer = stub.Chat(user("Who are you?"))
    assert text_of(answer.choices[0]) == SAID
    assert answer.choices[0].finish_reason == pb.FINISH_REASON_STOP


def test_it_counts_up_to_a_stop_string(stub: rpc.GenerationServiceStub) -> None:
    answer = stub.Chat(user("Count to 20", stop=["6 7", "never"]))
    assert text_of(answer.choices[0]) == "1 2 3 4 5 "
    assert answer.choices[0].stop_reason == "6 7"


def test_it_calls_a_tool_when_it_may(tiny: Live) -> None:
    gateway = Gateway(tiny)
    question: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as sdk:
        said = sdk.chat.completions.create(model="tiny", messages=HELLO, temperature=0)
        called = sdk.chat.completions.create(
            model="tiny", messages=question, tools=[TOOL], temperature=0
        )
    gateway.stop()
    assert said.choices[0].message.content == SAID and said.choices[0].finish_reason == "stop"
    calls = called.choices[0].message.tool_calls
    if calls:  # it may; what it must not is to call something else
        assert calls[0].type == "function" and calls[0].function.name == "get_weather"
        assert set(json.loads(calls[0].function.arguments)) == {"city"}
