"""The contract itself: scopes, bindings, comments, twins, constraints, the error table."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import jsonschema_rs
import numpy as np
import pytest
from forebay import errors
from forebay.constraints import Validator, options_of
from forebay.methods import methods
from forebay.twin.v1 import collection_pb2 as twin_collection
from forebay.twin.v1 import embedding_pb2 as twin
from forebay.twins import read_request
from forebay.v1 import collection_pb2, embedding_pb2, rerank_pb2, tabular_pb2, usage_pb2
from forebay_gateway import schema
from forebay_gateway.contract import bindings, comments
from forebay_gateway.json_codec import response_json, to_dict
from forebay_gateway.openai.paths import PATHS
from google.protobuf import descriptor_pool, json_format, message_factory
from google.protobuf.descriptor import FieldDescriptor
from google.rpc import code_pb2
from hypothesis import given
from hypothesis import strategies as st

GOLDEN = Path(__file__).parent / "golden"


def test_every_method_has_a_scope_and_batched_ones_are_unary() -> None:
    found = methods()
    assert len(found) == 95
    for method in found.values():
        assert method.scope in ("public", "infer", "read", "admin")
        assert not method.batched or method.kind == "unary"


def test_every_method_of_ours_has_a_route_and_no_two_share_one() -> None:
    ours = [m for m in methods().values() if m.service.startswith("forebay.v1.")]
    bound = {b.method.path for b in bindings()}
    assert {m.path for m in ours} == bound
    places = [(b.verb, b.path) for b in bindings()]
    assert len(set(places)) == len(places)


def test_the_openapi_page_asks_in_the_body_for_what_the_path_does_not_say() -> None:
    page = schema.openapi({})
    operation = page["paths"]["/api/v1/collections/{collection}/points"]["post"]
    assert [p["name"] for p in operation["parameters"]] == ["collection"]
    body = operation["requestBody"]["content"]["application/json"]["schema"]
    assert "collection" not in body["properties"] and body["required"] == ["points"]


def test_the_openapi_page_lets_payloads_hold_anything() -> None:
    point = schema.openapi({})["components"]["schemas"]["forebay.v1.Point"]
    assert point["properties"]["payload"]["additionalProperties"] == {}


def test_the_openapi_page_says_what_an_answer_always_has() -> None:
    page = schema.openapi({})
    schemas = page["components"]["schemas"]
    chat = schemas["forebay.v1.ChatResponse"]
    assert chat["required"] == ["id", "choices", "dropped_messages"]  # messages may be unset
    # A message that requests have too: there its fields may be left out, and are bounded.
    said, asked = schemas["forebay.v1.ChatMessage-Output"], schemas["forebay.v1.ChatMessage"]
    assert set(said["required"]) == set(said["properties"]) and "required" not in asked
    assert "maxLength" in asked["properties"]["name"]
    assert "maxLength" not in said["properties"]["name"]
    assert "threshold" not in schemas["forebay.v1.ClassifyRequest"].get("required", [])
    request = schemas["forebay.v1.CreateResponseRequest-Output"]
    assert "metadata" in request["required"] and "store" not in request["required"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"model": "a", "messages": [{}], "tools": [], "top_k": 5}),
        ("/v1/completions", {"model": "a", "prompt": "a", "top_k": 5}),
        ("/v1/messages", {"model": "a", "messages": [{}], "max_tokens": 5, "system": "a"}),
        ("/v1/responses", {"model": "a", "input": "a", "tools": []}),
    ],
)
def test_the_openapi_page_lets_doors_have_more_fields_than_it_names(path: str, body: Any) -> None:
    content = PATHS[path]["post"]["requestBody"]["content"]
    jsonschema_rs.validate(content["application/json"]["schema"], body)


@pytest.mark.parametrize("path", sorted(b.method.path for b in bindings()))
def test_answers_fit_the_openapi_page(path: str) -> None:
    page = schema.openapi({})
    kind = methods()[path].response
    name = cast(Any, kind.DESCRIPTOR).full_name
    if name not in page["components"]["schemas"]:
        return  # streams and files, which the page does not describe
    root = {"$ref": f"#/components/schemas/{name}", "components": page["components"]}
    fits = jsonschema_rs.Draft202012Validator(root)
    for message in (kind(), sample(kind)):
        fits.validate(json.loads(response_json(kind, message.SerializeToString())))


def test_the_openapi_page_describes_every_route_in_words() -> None:
    page = schema.openapi({})
    for path, operations in page["paths"].items():
        for verb, operation in operations.items():
            assert operation["summary"], (verb, path)
    for name, component in page["components"]["schemas"].items():
        for field, described in component.get("properties", {}).items():
            assert name == "Error" or described["description"], f"{name}.{field}"
    assert len(comments()) > 300


def sample(kind: Any, depth: int = 0) -> Any:
    """A message with every field set, to values that depend on the field alone."""
    message = kind()
    for i, field in enumerate(kind.DESCRIPTOR.fields, 1):
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            if field.message_type.fields_by_name["value"].message_type is None:
                value = field.message_type.fields_by_name["value"]
                number = value.cpp_type != FieldDescriptor.CPPTYPE_STRING
                getattr(message, field.name)["key"] = i if number else "value"
            continue
        if field.message_type is not None:
            name = field.message_type.full_name
            if depth > 3:
                continue
            if name == "google.protobuf.Timestamp":
                getattr(message, field.name).FromSeconds(1_700_000_000)
                continue
            target = getattr(message, field.name)
            if name == "google.protobuf.Struct":
                row = target.add() if field.is_repeated else target
                row.update({"a": 1.5, "b": "text", "c": None})
                continue
            if name == "google.protobuf.Value":
                (target.add() if field.is_repeated else target).string_value = "text"
                continue
            inner = sample(field.message_type._concrete_class, depth + 1)
            if field.is_repeated:
                target.add().CopyFrom(inner)
            else:
                target.CopyFrom(inner)
            continue
        value = {
            FieldDescriptor.CPPTYPE_STRING: b"by" if field.type == 12 else field.name,
            FieldDescriptor.CPPTYPE_BOOL: True,
            FieldDescriptor.CPPTYPE_FLOAT: i + 0.25,
            FieldDescriptor.CPPTYPE_DOUBLE: i + 0.5,
            FieldDescriptor.CPPTYPE_ENUM: 1,
        }.get(field.cpp_type, i)
        if field.is_repeated:
            getattr(message, field.name).append(value)
        else:
            setattr(message, field.name, value)
    return message


@pytest.mark.parametrize("path", sorted(p for p in methods() if "/forebay.v1." in p))
def test_the_json_of_every_message_is_as_it_was(path: str) -> None:
    method = methods()[path]
    for kind in (method.request, method.response):
        message = sample(kind)
        text = json.dumps(json.loads(response_json(kind, message.SerializeToString())), indent=1)
        file = GOLDEN / f"{cast(Any, kind.DESCRIPTOR).full_name}.json"
        if not file.exists():  # a new message: write it, look at it, and commit it
            file.parent.mkdir(exist_ok=True)
            file.write_text(text + "\n")
        assert json.loads(file.read_text()) == json.loads(text), f"the JSON of {kind} has changed"
        back = json_format.ParseDict(json.loads(text), kind())
        assert to_dict(back) == to_dict(kind.FromString(message.SerializeToString()))


@given(st.lists(st.lists(st.floats(width=32, allow_nan=False), max_size=20), max_size=5))
def test_twin_and_original_are_the_same_bytes(vectors: list[list[float]]) -> None:
    original = embedding_pb2.EmbedResponse(dimensions=3)
    double = twin.EmbedResponse(dimensions=3)
    for v in vectors:
        original.embeddings.add(values=v, tokens=2, truncated=True)
        double.embeddings.add(values=np.array(v, "<f4").tobytes(), tokens=2, truncated=True)
    assert original.SerializeToString(deterministic=True) == double.SerializeToString(
        deterministic=True
    )


def twins() -> list[tuple[Any, Any]]:
    """(twin, original) of every message of the twins' package."""
    return [
        (kind, message_factory.GetMessageClass(of))
        for module in (twin_collection, twin)
        for name, descriptor in module.DESCRIPTOR.message_types_by_name.items()
        for kind in [message_factory.GetMessageClass(descriptor)]
        for of in [descriptor_pool.Default().FindMessageTypeByName(f"forebay.v1.{name}")]
    ]


@pytest.mark.parametrize(("double", "original"), twins(), ids=lambda k: k.DESCRIPTOR.full_name)
def test_a_twin_has_the_fields_and_constraints_of_its_original(double: Any, original: Any) -> None:
    mine = {f.number: f for f in double.DESCRIPTOR.fields}
    assert set(mine) == {f.number for f in original.DESCRIPTOR.fields}
    for theirs in original.DESCRIPTOR.fields:
        own = mine[theirs.number]
        assert own.name == theirs.name
        if own.type == FieldDescriptor.TYPE_BYTES != theirs.type:
            assert theirs.type in (FieldDescriptor.TYPE_FLOAT, FieldDescriptor.TYPE_MESSAGE)
            continue
        assert (own.type, own.is_repeated) == (theirs.type, theirs.is_repeated)
        assert own.has_presence == theirs.has_presence
        # In answers the constraints have nothing to say.
        if double.DESCRIPTOR.full_name not in ("forebay.twin.v1.EmbedResponse",):
            assert options_of(own) == options_of(theirs), own.full_name


@given(
    st.lists(st.floats(width=32, allow_nan=False), max_size=40),
    st.lists(st.integers(0, 40), max_size=3),
    st.booleans(),
)
def test_a_request_is_read_by_its_twin_however_its_floats_are_written(
    vector: list[float], cuts: list[int], packed: bool
) -> None:
    """Protobuf allows packed, packed in pieces, and one by one."""
    parts = [vector[a:b] for a, b in pairwise([0, *sorted(cuts), len(vector)])]
    data = collection_pb2.SearchRequest(collection="c").SerializeToString()
    for part in parts:
        raw = np.array(part, "<f4").tobytes()
        if packed:
            data += collection_pb2.SearchRequest(vector=part).SerializeToString()
        else:
            data += b"".join(b"\x15" + raw[i : i + 4] for i in range(0, len(raw), 4))
    read: Any = read_request(collection_pb2.SearchRequest, data)
    assert read.vector == np.array(vector, "<f4").tobytes()
    assert read.collection == "c"


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (embedding_pb2.EmbedRequest(model="m" * 300, texts=["a"]), "model"),
        (embedding_pb2.EmbedRequest(dimensions=-1), "dimensions"),
        (embedding_pb2.EmbedRequest(token_ids=[{"ids": [5, -1]}]), "token_ids[0].ids[1]"),
        (rerank_pb2.RerankRequest(documents=["a"]), "query"),
        (rerank_pb2.RerankRequest(query="q"), "documents"),
        (usage_pb2.GetUsageRequest(from_day="yesterday"), "from_day"),
        (tabular_pb2.PredictRequest(columns=[{"numbers": [1]}]), "columns[0].name"),
        (tabular_pb2.PredictStreamRequest(), "request"),
    ],
)
def test_constraints_name_the_field(message: Any, field: str) -> None:
    with pytest.raises(errors.InvalidArgument) as caught:
        Validator().check(message)
    assert field in [v.field for v in caught.value.violations]


def test_constraints_pass_good_messages() -> None:
    Validator().check(embedding_pb2.EmbedRequest(texts=["a"], dimensions=3))
    Validator().check(usage_pb2.GetUsageRequest(from_day="2026-01-31"))


def test_the_error_table_knows_every_code() -> None:
    assert set(errors.HTTP_BY_CODE) == set(code_pb2.Code.keys())


def test_errors_survive_the_wire() -> None:
    status = errors.RateLimited(
        "spent", violations=[errors.QuotaViolation("key:1", "10 a second")], retry_after_s=1.5
    ).to_status()
    found = errors.http_error(status)
    assert (found.status, found.reason, found.retry_after_s) == (429, "RATE_LIMITED", 1.5)
    large = errors.http_error(errors.TooLarge("body", size=9, limit=5, unit="bytes").to_status())
    assert (large.status, large.param) == (413, "body")
