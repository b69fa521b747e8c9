"""What an error says to who made a mistake: the wrong thing, and what would be right."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import Live
from tests.integration.test_gateway import Gateway


@pytest.fixture(scope="module")
def gateway(live: Live) -> Iterator[Gateway]:
    running = Gateway(live)
    yield running
    running.stop()


@pytest.mark.parametrize(
    ("path", "body", "field", "known"),
    [  # a route of the server itself, routes of the gateway, a nested message
        ("embeddings:embed", {"text": ["a"]}, "text", "texts"),
        ("tokens:tokenize", {"text": "a"}, "text", "texts"),
        ("collections", {"name": "c"}, "name", "collection"),
        ("collections", {"collection": "c", "config": {"dimension": 3}}, "config.dimension", "dimensions"),
    ],
)  # fmt: skip
def test_an_unknown_field_is_answered_with_the_known_ones(
    gateway: Gateway, path: str, body: dict, field: str, known: str
) -> None:
    answer = gateway.http.post(f"/api/v1/{path}", json=body)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["param"] == field
    said, _, names = error["message"].partition("; known are ")
    assert said == f"{field}: is no field of this request"
    assert known in names.split(", ")


def test_what_does_not_match_its_pattern_is_said_with_the_value(gateway: Gateway) -> None:
    answer = gateway.http.get("/api/v1/usage", params={"from_day": "yesterday"})
    assert answer.status_code == 400
    description = r"is 'yesterday'; it must match \d{4}-\d{2}-\d{2}"
    assert answer.json()["error"]["message"] == f"from_day: {description}"


@pytest.mark.parametrize(
    ("model", "hint"),
    [("minilmm", "Did you mean minilm, minilm-int8?"), ("gpt-4o", "Known are digits, housing, ")],
)
def test_an_unknown_model_is_answered_with_what_is_near_or_there(
    gateway: Gateway, model: str, hint: str
) -> None:
    answer = gateway.http.post("/v1/embeddings", json={"model": model, "input": "a"})
    assert answer.status_code == 404
    assert f"model {model!r} was not found. {hint}" in answer.json()["error"]["message"]
