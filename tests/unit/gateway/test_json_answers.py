"""Answers as JSON."""

from __future__ import annotations

import orjson
from forebay.v1 import collection_pb2
from forebay_gateway.json_codec import response_json


def test_whole_numbers_of_a_payload_have_no_point() -> None:
    """What a caller stored as 2026 comes back so: a client whose field is an integer reads it."""
    payload = {"year": 2026, "price": 1.5, "big": 1e300, "tags": [1, "a", None], "in": {"n": -3}}
    answer = collection_pb2.SearchResponse()
    answer.hits.add(id="1").payload.update(payload)
    text = response_json(collection_pb2.SearchResponse, answer.SerializeToString())
    assert b'"year":2026' in text and b'"n":-3' in text and b"[1," in text
    assert b"2026." not in text and b"-3." not in text
    assert orjson.loads(text)["hits"][0]["payload"] == payload
