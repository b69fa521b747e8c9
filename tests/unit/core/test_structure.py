"""Forms of answers: what a caller's schema or expression must not be able to do."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from forebay.errors import InvalidArgument
from forebay_server.core.generation import Structure
from forebay_server.core.structure import check_enforceable, check_regex, fault_of


def test_a_schema_makes_the_server_fetch_nothing(tmp_path: Path) -> None:
    outside = tmp_path / "outside.json"
    outside.write_text('{"type": "integer"}')
    schema = {"$ref": "#/hidden", "hidden": {"$ref": outside.as_uri()}}
    with pytest.raises(InvalidArgument, match="is no valid JSON schema"):
        check_enforceable(schema, "s")


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"type": {"a": 1}}, "type"),
        ({"type": [["string"]]}, "type"),
        ({"properties": {"a": {"format": ["date"]}}}, "properties.a.format"),
        ({"anyOf": 5}, "anyOf"),
        ({"allOf": None}, "allOf"),
        ({"items": {"oneOf": {"a": 1}}}, "items.oneOf"),
    ],
)
def test_a_schema_with_values_of_the_wrong_type_is_refused_with_the_place(
    schema: dict[str, object], place: str
) -> None:
    with pytest.raises(InvalidArgument, match=f"s: {place}: "):
        check_enforceable(schema, "s")


def test_an_answer_is_checked_against_an_expression_in_little_time() -> None:
    pattern = r"(?:(?:a|a)*c)|(?:a{24})"
    check_regex(pattern, "r")
    started = time.process_time()
    assert fault_of(Structure("regex", pattern), "a" * 24) is None
    assert fault_of(Structure("regex", pattern), "a" * 25)
    assert time.process_time() - started < 0.5  # 2 s, doubled with each letter, by way of `re`


@pytest.mark.parametrize(
    ("pattern", "good", "bad"),
    [
        ("a.b", "a\nb", "a\nb\n"),
        (r"[\w\-]+@\d{2,3}", "a-b@12", "a-b@1"),
        ("a|bc", "bc", "ac"),
        ("^(é|[^a-z])+$", "éÄ", "éa"),
        ("[[]x", "[x", "x"),
    ],
)
def test_expressions_match_whole_answers(pattern: str, good: str, bad: str) -> None:
    assert fault_of(Structure("regex", pattern), good) is None
    assert fault_of(Structure("regex", pattern), bad)


def test_an_expression_in_another_dialect_is_left_to_the_engine() -> None:
    assert fault_of(Structure("regex", "a{,3}"), "aa") is None


@pytest.mark.parametrize("pattern", [
    r"a\bb", "(?i)ab", "(?P<x>a)b", "(?s:a)", "a(?#c)b", "a||b", "(|a)", "(?:|a)", "|a", "a|", "{a}",
    "a{,3}", "[]a]",
])  # fmt: skip
def test_what_the_grammar_engine_does_not_read_is_refused(pattern: str) -> None:
    with pytest.raises(InvalidArgument, match="cannot read"):
        check_regex(pattern, "r")
    with pytest.raises(InvalidArgument, match="cannot read"):
        check_enforceable({"type": "object", "patternProperties": {pattern: {}}}, "s")


@pytest.mark.parametrize(
    "pattern", [r"\(\?i", r"[\b|{(?]", "a{2}b{2,}c{2,3}", "(a|)b|c", "(?:a)", r"\|\||a", r"[^\]]\{"]
)
def test_what_it_reads_is_taken(pattern: str) -> None:
    check_regex(pattern, "r")
