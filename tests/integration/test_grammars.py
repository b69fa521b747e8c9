"""Forms of answers on the embedded engine: those it holds to, and those that no grammar can be made of."""

from __future__ import annotations

import json

import grpc
import pytest
from forebay.v1 import generation_pb2 as pb
from forebay.v1 import generation_pb2_grpc as rpc

from tests.conftest import Start
from tests.integration.chats import WEATHER, refused, text_of, user
from tests.integration.language_models import random_openvino


@pytest.fixture(scope="module")
def stub(start: Start, tmp_path_factory: pytest.TempPathFactory) -> rpc.GenerationServiceStub:
    return rpc.GenerationServiceStub(start(random_openvino(tmp_path_factory.mktemp("m"))).channel)


def test_structured_output_has_its_form(stub: rpc.GenerationServiceStub) -> None:
    request = user("Answer in JSON: Anna lives in Rome.", max_tokens=200)
    request.response_format.json_schema = json.dumps(WEATHER)
    value = json.loads(text_of(stub.Chat(request).choices[0]))
    assert set(value) == {"city"}
    request.response_format.CopyFrom(pb.ResponseFormat(choices=["yes", "no", "maybe"]))
    assert text_of(stub.Chat(request).choices[0]) in ("yes", "no", "maybe")
    request.response_format.CopyFrom(pb.ResponseFormat(regex="[a-f]{4}-[0-9]{3}"))
    said = text_of(stub.Chat(request).choices[0])
    assert len(said) == 8 and said[4] == "-"


def test_schemas_that_cannot_be_enforced_are_refused(stub: rpc.GenerationServiceStub) -> None:
    request = user("Hello")
    schema = {"type": "object", "properties": {"a": {"type": "integer", "multipleOf": 5}}}
    request.response_format.json_schema = json.dumps(schema)
    said = refused(lambda: stub.Chat(request))
    assert "properties.a.multipleOf" in said["response_format.json_schema"]
    request.response_format.json_schema = '{"type": "objekt"}'
    assert "objekt" in refused(lambda: stub.Chat(request))["response_format.json_schema"]
    request.response_format.json_object = True
    assert "response_format.json_object" in refused(lambda: stub.Chat(request))
    bad = user("Hello")
    bad.response_format.regex = "([a-z"
    assert refused(lambda: stub.Chat(bad))


def forced(pattern: str) -> pb.ChatRequest:
    """A call of a tool whose schema is not held to, because it does not ask for `strict`."""
    request = user("Hello", max_tokens=20)
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": pattern}}}
    request.tools.add(name="f", parameters=json.dumps(schema))
    request.tool_choice.mode = pb.TOOL_MODE_REQUIRED
    return request


def test_what_does_not_compile_costs_nobody_elses_answer(stub: rpc.GenerationServiceStub) -> None:
    long = user("Go on.", max_tokens=600, ignore_eos=True)
    stream = stub.ChatStream(pb.ChatStreamRequest(request=long))
    for _ in range(3):
        next(stream)
    for pattern in (r"\bword\b", "(?i)yes|no", "(?P<year>[0-9]{4})"):
        request = user("Hello", max_tokens=20)
        request.response_format.regex = pattern
        assert "response_format.regex" in refused(lambda r=request: stub.Chat(r))
    for pattern in ("(?<=a)b", r"\bword", "a||b"):
        try:
            stub.Chat(forced(pattern))
        except grpc.RpcError as e:
            pytest.fail(f"{pattern}: {e.details()}")
    events = list(stream)
    assert events[-2].finish.reason == pb.FINISH_REASON_LENGTH


def closed(**properties: object) -> dict[str, object]:
    """An object that has these alone, and all of them."""
    return {
        "type": "object",
        "properties": properties,
        "required": sorted(properties),
        "additionalProperties": False,
    }


def test_forms_that_no_answer_can_have_are_refused_before_any(
    stub: rpc.GenerationServiceStub,
) -> None:
    long = user("Go on.", max_tokens=300, ignore_eos=True)
    stream = stub.ChatStream(pb.ChatStreamRequest(request=long))
    next(stream)
    for pattern in ("a^b", r"ab\Z", r"\101", "a{3000000000}", "(" * 400 + "a" + ")" * 400):
        request = user("Hello", max_tokens=20)
        request.response_format.regex = pattern
        assert "response_format.regex" in refused(lambda r=request: stub.Chat(r))
    for schema, place in (
        (closed(a={"$ref": "#"}), "properties.a.$ref: "),
        ({"type": "integer", "minimum": 5, "maximum": 1}, "minimum: "),
        ({"type": "string", "minLength": 5, "maxLength": 1}, "minLength: "),
        (closed(a=False), "properties.a: "),
        ({"type": "object", "required": ["a"]}, "required: "),
    ):
        request = user("Hello", max_tokens=20)
        request.response_format.json_schema = json.dumps(schema)
        said = refused(lambda r=request: stub.Chat(r))
        assert said["response_format.json_schema"].startswith(place)
    request = user("Hello", max_tokens=20)
    request.tools.add(name="f", parameters=json.dumps(closed(a={"$ref": "#"})), strict=True)
    assert "tools[0].parameters" in refused(lambda: stub.Chat(request))
    assert list(stream)[-2].finish.reason == pb.FINISH_REASON_LENGTH


def test_references_are_followed_as_far_as_they_lead(stub: rpc.GenerationServiceStub) -> None:
    forms = {
        f"a{i}": closed(b={"$ref": f"#/$defs/a{i + 1}"}) if i < 6 else {"enum": [1]}
        for i in range(7)
    }
    request = user("Hello", max_tokens=100)
    request.response_format.json_schema = json.dumps({"$ref": "#/$defs/a0", "$defs": forms})
    value = json.loads(text_of(stub.Chat(request).choices[0]))
    for _ in range(6):
        value = value["b"]
    assert value == 1
