"""What JSON cannot become a message says where and what is needed, in words of the contract."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from forebay import proto_json
from forebay.errors import InvalidArgument
from forebay.v1 import (
    batch_pb2,
    classification_pb2,
    collection_pb2,
    embedding_pb2,
    generation_pb2,
    tabular_pb2,
)
from forebay_gateway.json_codec import to_message
from google.protobuf import json_format
from hypothesis import given

from tests.unit.gateway.test_json_reader import REQUESTS, of_message

PREDICT = tabular_pb2.PredictRequest
CLASSIFY = classification_pb2.ClassifyRequest
EMBED = embedding_pb2.EmbedRequest
SEARCH = collection_pb2.SearchRequest


@pytest.mark.parametrize(
    ("kind", "data", "field", "description"),
    [
        (PREDICT, {"rows": {"a": "NEAR BAY"}}, "rows", "is an object; a list is needed"),
        (PREDICT, {"rows": [{}, 5]}, "rows[1]", "is the number 5; an object is needed"),
        (PREDICT, {"rows": [None]}, "rows[0]", "is null; an object is needed"),
        (
            PREDICT,
            {"columns": [{"name": "a"}, {"numbers": [1, None]}]},
            "columns[1].numbers[1]",
            "is null; a number is needed",
        ),
        (PREDICT, {"stickyKey": 5}, "stickyKey", "is the number 5; a string is needed"),
        (CLASSIFY, {"texts": "a"}, "texts", "is the string 'a'; a list is needed"),
        (CLASSIFY, {"texts": ["a", 5]}, "texts[1]", "is the number 5; a string is needed"),
        (CLASSIFY, {"top_k": 1.5}, "top_k", "is the number 1.5; an integer is needed"),
        (CLASSIFY, {"topK": True}, "topK", "is true; an integer is needed"),
        (CLASSIFY, {"top_k": 1, "topK": 1}, "topK", "is given beside top_k; one of them is allowed"),
        (CLASSIFY, {"stickyKey": "a", "sticky_key": "b"}, "stickyKey", "is given beside sticky_key; "
            "one of them is allowed"),
        (CLASSIFY, {"sticky_key": "a", "stickyKey": None}, "stickyKey", "is given beside sticky_key; "
            "one of them is allowed"),
        (EMBED, {"token_ids": [], "tokenIds": [{"ids": [1]}]}, "tokenIds", "is given beside "
            "token_ids; one of them is allowed"),
        (
            generation_pb2.ChatStreamRequest,
            {"request": {"messages": [{}, {"tool_call_id": "a", "toolCallId": "b"}]}},
            "request.messages[1].toolCallId",
            "is given beside tool_call_id; one of them is allowed",
        ),
        (
            CLASSIFY,
            {"top_k": 99999999999},
            "top_k",
            "is the number 99999999999; an integer from -2147483648 to 2147483647 is needed",
        ),
        (
            CLASSIFY,
            {"truncation": "end"},
            "truncation",
            "is the string 'end'; one of TRUNCATION_UNSPECIFIED, TRUNCATION_END, TRUNCATION_START, "
            "TRUNCATION_NONE is needed",
        ),
        (
            CLASSIFY,
            {"truncation": 2147483648.0},
            "truncation",
            "is the number 2147483648.0; one of TRUNCATION_UNSPECIFIED, TRUNCATION_END, "
            "TRUNCATION_START, TRUNCATION_NONE is needed",
        ),
        (CLASSIFY, {"threshold": 1e300}, "threshold", "is the number 1e+300; a number that a float32 "
            "can hold is needed"),
        (CLASSIFY, {"text": ["a"]}, "text", "is no field of this request; known are model, texts, top_k, "
            "threshold, candidate_labels, hypothesis_template, multi_label, truncation, sticky_key"),
        (
            batch_pb2.CreateBatchRequest,
            {"header": {"window": "86400s"}},
            "header.window",
            "is no field of this request; known are completion_window, metadata, input_file, endpoint, "
            "results_expire_after",
        ),
        (EMBED, {"token_ids": [{"ids": [1, "x"]}]}, "token_ids[0].ids[1]", "is the string 'x'; an "
            "integer is needed"),
        (
            SEARCH,
            {"filter": {"all_of": {"filters": [{"range": {"gte": "x"}}]}}},
            "filter.all_of.filters[0].range.gte",
            "is the string 'x'; a number is needed",
        ),
        (
            batch_pb2.CreateBatchRequest,
            {"header": {"completion_window": "1 day"}},
            "header.completion_window",
            "is the string '1 day'; a duration in seconds like 1.5s is needed",
        ),
    ],
)  # fmt: skip
def test_the_place_and_what_is_needed_are_named(
    kind: Any, data: Any, field: str, description: str
) -> None:
    with pytest.raises(InvalidArgument) as refused:
        to_message(kind, data)
    [violation] = refused.value.violations
    assert (violation.field, violation.description) == (field, description)


@pytest.mark.parametrize("kind", REQUESTS, ids=lambda kind: kind.DESCRIPTOR.name)
def test_a_fault_is_found_wherever_the_library_refuses(kind: Any) -> None:
    @given(of_message(kind.DESCRIPTOR))
    def check(data: dict[str, Any]) -> None:
        data = orjson.loads(orjson.dumps(data, option=orjson.OPT_NON_STR_KEYS, default=str))
        try:
            json_format.ParseDict(data, kind())
        except (json_format.ParseError, ValueError, TypeError, AttributeError):
            assert proto_json.fault(data, kind()) is not None

    check()
