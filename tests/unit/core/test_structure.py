"""Forms of answers: what a caller's schema or expression must not be able to do."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
from forebay.errors import InvalidArgument
from forebay_server.core.expressions import check_regex
from forebay_server.core.generation import Structure
from forebay_server.core.structure import check_enforceable, fault_of, parse_schema


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


@pytest.mark.parametrize(
    ("pattern", "part"),
    [
        ("a^b", "^"), ("x?^b", "^"), ("(?:^a){2}", "^"), (r"a(\w|^b)", "^"), ("a$b", "$"),
        ("(?:a$|b)c", "$"), (r"a$\n?", "$"), (r"ab\Z", r"\\Z"), (r"\Aab", r"\\A"),
        (r"\x41B", r"\\x41B"), (r"[\x41B]", r"\\x41B"), (r"\101", r"\\1"), (r"[\1]", r"\\1"),
        (r"\012", r"\\0"), ("a{3000000000}", "{3000000000}"),
    ],
)  # fmt: skip
def test_what_the_grammar_engine_reads_in_another_way_is_refused(pattern: str, part: str) -> None:
    with pytest.raises(InvalidArgument, match=re.escape(f"has '{part}' ")):
        check_regex(pattern, "r")


@pytest.mark.parametrize(
    "pattern", ["^ab$", "(^a|b)c|d$", "^^a$$", "(?:^)*a", r"\\Z\\1", r"\x41-\u0042c", "[$^]a"]
)
def test_anchors_at_the_ends_and_single_characters_are_taken(pattern: str) -> None:
    check_regex(pattern, "r")


def test_an_expression_that_is_nested_too_deep_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="is no regular expression"):
        check_regex("(" * 400 + "a" + ")" * 400, "r")


def closed(**properties: Any) -> dict[str, Any]:
    """An object that has these alone, and all of them."""
    return {
        "type": "object",
        "properties": properties,
        "required": sorted(properties),
        "additionalProperties": False,
    }


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        (closed(a={"$ref": "#"}), "properties.a.$ref"),
        ({"$ref": "#"}, "$ref"),
        ({"$ref": "#/$defs/a", "$defs": {"a": closed(b={"$ref": "#/$defs/a"})}}, "$ref"),
        ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, "items.$ref"),
        ({"anyOf": [closed(a={"$ref": "#"}), {"$ref": "#"}]}, "anyOf[0].properties.a.$ref"),
        ({"type": "object", "properties": {"a": closed(b={"$ref": "#/properties/a"})}},
         "properties.a.properties.b.$ref"),
    ],
)  # fmt: skip
def test_a_schema_that_holds_itself_without_end_is_refused(
    schema: dict[str, Any], place: str
) -> None:
    with pytest.raises(InvalidArgument, match=re.escape(f"s: {place}: ") + ".*without end"):
        check_enforceable(schema, "s")


@pytest.mark.parametrize(
    "schema",
    [
        closed(next={"anyOf": [{"$ref": "#"}, {"type": "null"}]}),
        {"type": "object", "properties": {"kids": {"type": "array", "items": {"$ref": "#"}}}},
        {"type": ["object", "null"], "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
        {"type": "array", "items": {"$ref": "#"}, "maxItems": 2},
        {"oneOf": [{"$ref": "#/$defs/a"}, {"enum": [1]}], "$defs": {"a": closed(b={"$ref": "#"})}},
    ],
)
def test_a_schema_that_may_end_is_taken_though_it_holds_itself(schema: dict[str, Any]) -> None:
    check_enforceable(schema, "s")


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"type": "integer", "minimum": 5, "maximum": 1}, "minimum"),
        ({"type": "integer", "exclusiveMinimum": 1, "exclusiveMaximum": 2}, "exclusiveMinimum"),
        ({"type": "integer", "minimum": 1.5}, "minimum"),
        ({"type": "integer", "maximum": 2**63}, "maximum"),
        ({"type": "number", "exclusiveMinimum": 1, "maximum": 1}, "exclusiveMinimum"),
        ({"type": "string", "minLength": 5, "maxLength": 1}, "minLength"),
        ({"type": "string", "maxLength": 2**31}, "maxLength"),
        ({"type": "array", "items": {}, "minItems": 1.0}, "minItems"),
        ({"type": "array", "minItems": 5, "maxItems": 1}, "minItems"),
        ({"type": "array", "prefixItems": [{}, {}], "maxItems": 1}, "maxItems"),
        ({"type": "array", "prefixItems": [{}], "items": False, "minItems": 2}, "minItems"),
        ({"type": "object", "properties": {"a": {}}, "required": ["b"]}, "required"),
        (closed(a={}) | {"minProperties": 2}, "minProperties"),
        (closed(a={}, b={}) | {"maxProperties": 1}, "maxProperties"),
        (closed(a=False), "properties.a"),
        ({"anyOf": [False, {"type": "null"}]}, "anyOf[0]"),
        (closed(**{'a"': {}}), "properties"),
        ({"enum": []}, "enum"),
        ({"type": "string", "enum": ["a", 1]}, "enum"),
        ({"type": "string", "const": None}, "const"),
        ({"minimum": 1}, "minimum"),
        ({"required": ["a"]}, "required"),
        ({"$ref": "#/$defs/a", "maxLength": 3, "$defs": {"a": {"type": "string"}}}, "maxLength"),
        ({"type": "object", "properties": {}, "anyOf": [{"type": "object"}]}, "properties"),
        ({"type": "string", "anyOf": [{"type": "string"}, {"type": "null"}]}, "type"),
        ({"type": "string", "format": "date", "pattern": "a"}, "pattern"),
        ({"$ref": "#a", "$defs": {"a": {"$anchor": "a"}}}, "$ref"),
        ({"$ref": "#/anyOf/0", "anyOf": [{}]}, "anyOf"),
        ({"anyOf": [{"$ref": "#/anyOf/1"}, {"type": "null"}]}, "anyOf[0].$ref"),
        ({"$ref": "#/hidden", "hidden": {"multipleOf": 2}}, "$ref"),
        ({"$defs": {"a": {"$id": "http://x/y"}}}, "$defs.a.$id"),
        ({"$dynamicRef": "#"}, "$dynamicRef"),
    ],
)  # fmt: skip
def test_what_no_value_can_have_or_the_engine_passes_over_is_refused_with_the_place(
    schema: dict[str, Any], place: str
) -> None:
    with pytest.raises(InvalidArgument, match=re.escape(f"s: {place}: ")):
        check_enforceable(schema, "s")


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "const": "a", "title": "A", "default": "a"},
        {"type": "number", "enum": [1, 2.5]},
        {"type": "object", "anyOf": [closed(a={}), {"properties": {"b": {}}, "required": ["b"]}]},
        {"type": "number", "minimum": 0, "maximum": 1},
        {"type": "string", "format": "uri", "minLength": 1, "maxLength": 2083},
        {"$ref": "#/$defs/a", "description": "b", "$defs": {"a": {"type": ["integer", "null"]}}},
        {"type": "array", "prefixItems": [{}, {}], "items": False, "minItems": 2, "maxItems": 2},
        {"items": {"type": "null"}, "minItems": 1},
    ],
)
def test_what_schema_libraries_write_is_taken(schema: dict[str, Any]) -> None:
    check_enforceable(schema, "s")


def test_numbers_that_are_none_in_json_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="NaN is no JSON number"):
        parse_schema('{"type": "number", "minimum": NaN}', "s")
