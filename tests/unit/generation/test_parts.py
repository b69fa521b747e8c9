"""Fair queueing, the gate, tool calls in a stream, stop strings, templates, schemas, breakers."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest
from forebay.errors import InvalidArgument, QueueFull
from forebay_server.core.expressions import check_regex
from forebay_server.core.fairness import FairQueue
from forebay_server.core.generation import (
    ChatContext,
    GenerationDelta,
    GenerationRequest,
    SamplingParameters,
    Structure,
    ToolMode,
    ToolSpec,
)
from forebay_server.core.structure import check_enforceable, fault_of
from forebay_server.generation.channel import Channel
from forebay_server.generation.detokenize import Detokenizer
from forebay_server.generation.errors import TemplateRefused
from forebay_server.generation.frames import plain
from forebay_server.generation.gate import Gate
from forebay_server.generation.hermes import HermesParser
from forebay_server.generation.json_regex import regex_of
from forebay_server.generation.templates import render
from forebay_server.generation.upstream import REST_S, TRIP, Breaker
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers


def test_a_lone_entry_goes_before_a_flood_that_came_first() -> None:
    queue: FairQueue[str] = FairQueue()
    for i in range(100):
        queue.put("flood", 10, f"flood{i}")
    assert [queue.get() for _ in range(5)] == [f"flood{i}" for i in range(5)]
    queue.put("lone", 10, "lone")
    assert "lone" in [queue.get(), queue.get()]


def test_a_key_owes_nothing_for_what_it_took_back() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.put("steady", 10, "steady0")
    assert queue.get() == "steady0"
    for ticket in [queue.put("sorry", 1000, f"sorry{i}") for i in range(50)]:
        queue.drop(ticket)
    queue.put("sorry", 10, "again")
    for i in range(1, 20):
        queue.put("steady", 10, f"steady{i}")
    assert "again" in [queue.get(), queue.get()]
    while queue.get() is not None:
        pass
    # What was served is owed for all the same.
    queue.drop(queue.put("sorry", 1000, "no"))
    queue.put("sorry", 500, "long")
    assert queue.get() == "long"
    queue.drop(queue.put("sorry", 1000, "no"))
    queue.put("sorry", 10, "next")
    queue.put("steady", 10, "first")
    assert [queue.get(), queue.get()] == ["first", "next"]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 50)), min_size=1, max_size=80))
def test_nothing_is_lost_and_keys_keep_their_order(entries: list[tuple[str, int]]) -> None:
    queue: FairQueue[tuple[str, int]] = FairQueue()
    for n, (key, cost) in enumerate(entries):
        queue.put(key, cost, (key, n))
    got = [queue.get() for _ in entries]
    assert queue.get() is None and len(queue) == 0
    for key in "abc":
        numbers = [n for k, n in filter(None, got) if k == key]
        assert numbers == sorted(numbers) and len(numbers) == sum(k == key for k, _ in entries)


def test_priority_goes_first_and_dropped_entries_never() -> None:
    queue: FairQueue[str] = FairQueue()
    ticket = queue.put("a", 1, "dropped")
    queue.put("a", 1, "low")
    queue.put("a", 1, "high", priority=1)
    queue.drop(ticket)
    assert [queue.get(), queue.get(), queue.get()] == ["high", "low", None]


async def test_the_gate_bounds_what_runs_and_what_waits() -> None:
    gate = Gate(capacity=2, max_queue_size=1)
    inside: list[int] = []
    most = 0

    async def one(n: int, leave: asyncio.Event) -> None:
        nonlocal most
        async with gate.enter("k", 1, 1):
            inside.append(n)
            most = max(most, gate.running)
            await leave.wait()

    leave = asyncio.Event()
    tasks = [asyncio.create_task(one(i, leave)) for i in range(3)]
    while len(inside) < 2:
        await asyncio.sleep(0)
    assert gate.waiting == 1
    with pytest.raises(QueueFull):
        async with gate.enter("k", 1, 1):
            pass
    tasks[2].cancel()
    await asyncio.gather(tasks[2], return_exceptions=True)
    assert gate.waiting == 0
    leave.set()
    await asyncio.gather(*tasks[:2])
    assert (gate.running, most) == (0, 2)


CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "x}\\"{", "b": [1, {"c": 2}]}}\n</tool_call>'
ARGUMENTS = {"a": 'x}"{', "b": [1, {"c": 2}]}


@given(st.lists(st.integers(1, 9), min_size=1, max_size=60))
def test_tool_calls_are_the_same_however_the_stream_is_cut(cuts: list[int]) -> None:
    text = f"Well. {CALL}\n{CALL}"
    parser, said, calls = HermesParser(), "", {}
    at = i = 0
    while at < len(text):
        piece = text[at : at + cuts[i % len(cuts)]]
        at, i = at + len(piece), i + 1
        more, pieces = parser.feed(piece)
        said += more
        for p in pieces:
            call = calls.setdefault(p.call, {"id": p.id, "name": p.name, "arguments": ""})
            call["arguments"] += p.arguments
    more, pieces = parser.finish()
    assert said + more == "Well. " and not pieces
    assert [json.loads(c["arguments"]) for c in calls.values()] == [ARGUMENTS, ARGUMENTS]
    assert all(c["name"] == "f" and c["id"] for c in calls.values())


NOT_AN_OBJECT = [
    f'<tool_call>{{"name": "f", "arguments": {v}}}</tool_call>' for v in ("false", "[1]", '"a"')
]


def test_arguments_in_a_string_are_an_object() -> None:
    parser = HermesParser()
    said, pieces = parser.feed('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>')
    assert not said and json.loads(pieces[0].arguments) == {"a": 1}


def test_a_forced_call_keeps_to_its_schema() -> None:
    def sent(mode: ToolMode, **tool: Any) -> dict[str, Any]:
        context = ChatContext([], [ToolSpec("f", **tool)], mode)
        request = GenerationRequest("a", SamplingParameters(), chat=context)
        return plain(request)["chat"]["tools"][0]["function"]

    schema = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    assert sent("required", parameters=schema)["strict"]
    assert sent("named")["strict"] and sent("named")["parameters"] == {"type": "object"}
    assert "strict" not in sent("auto", parameters=schema)
    beyond = {"type": "object", "not": {"required": ["b"]}}
    assert "strict" not in sent("required", parameters=beyond)


@pytest.mark.parametrize(
    "text",
    ["a <tool_call> b", "<tool_call>{no json}</tool_call>", "a < b", *NOT_AN_OBJECT],
)
def test_text_that_is_no_call_stays_text(text: str) -> None:
    parser = HermesParser()
    said = "".join(parser.feed(c)[0] for c in text)
    assert said + parser.finish()[0] == text
    assert parser.calls == 0


def byte_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@given(st.text(max_size=40), st.lists(st.text(min_size=1, max_size=4), max_size=3))
def test_stop_strings_cut_where_they_first_begin(text: str, stop: list[str]) -> None:
    tokenizer = byte_tokenizer()
    detokenizer = Detokenizer(tokenizer, stop)
    out = "".join(detokenizer.feed([i]) for i in tokenizer.encode(text).ids)
    if detokenizer.stopped_by:
        assert text.startswith(out + detokenizer.stopped_by)
        assert not any(s in out for s in stop)
    else:
        assert out + detokenizer.rest() == text
        assert not any(s in text for s in stop)


def test_templates_have_the_helpers_of_hugging_face_and_are_in_a_sandbox() -> None:
    source = "{{ messages[0].content }}{{ {'a': 'é<'} | tojson }}{% for x in [1, 2] %}{% break %}{% endfor %}"
    assert render(source, [{"content": "hi"}]) == 'hi{"a": "é<"}'
    with pytest.raises(TemplateRefused, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}", [])
    with pytest.raises(TemplateRefused):
        render("{{ ''.__class__.__mro__[1].__subclasses__() }}", [])


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "multipleOf": 3},
        {"type": "array", "items": {"not": {"type": "string"}}},
        {"anyOf": [{"type": "string"}, {"type": "array", "uniqueItems": True}]},
        {"type": "string", "format": "color"},
        {"$ref": "https://example.com/schema"},
        {"type": "string", "pattern": "(?=a)b"},
        {"type": "strin"},
        {"type": "object", "properties": {"a": 5}},
    ],
)
def test_schemas_that_would_be_passed_over_are_refused(schema: object) -> None:
    with pytest.raises(InvalidArgument):
        check_enforceable(schema, "s")


def test_good_schemas_pass_and_their_expressions_match_their_values() -> None:
    schema = {
        "type": "object",
        "properties": {
            "n": {"type": "integer", "minimum": 1, "maximum": 12},
            "s": {"type": "string"},
        },
        "required": ["n"],
        "additionalProperties": False,
    }
    check_enforceable(schema, "s")
    regex = regex_of(schema)
    assert regex is not None
    assert re.fullmatch(regex, '{"n": 12, "s": "a\\"b"}')
    assert not re.fullmatch(regex, '{"n": 13}')
    assert not re.fullmatch(regex, '{"n":\n\n1}')
    assert regex_of({"type": "object"}) is None
    check_regex(r"^(a|b)[a-z]{2,3}\d+?.*$", "r")


@pytest.mark.parametrize(
    ("structure", "good", "bad"),
    [
        (Structure("json_schema", '{"type": "integer"}'), "5", '"5"'),
        (Structure("json_object"), "{}", "[]"),
        (Structure("regex", "a+"), "aa", "ab"),
        (Structure("choice", ("x", "y")), "x", "z"),
    ],
)
def test_answers_are_checked_against_their_form(structure: Structure, good: str, bad: str) -> None:
    assert fault_of(structure, good) is None
    assert fault_of(structure, bad)


async def test_a_slow_reader_gets_merged_deltas_and_every_token() -> None:
    channel = Channel(1)
    for i in range(5):
        channel.put(GenerationDelta(text=str(i), tokens=1))
    channel.put(GenerationDelta(tokens=1, finish_reason="stop"))
    got = [d async for d in channel.read()]
    assert [(d.text, d.tokens, d.finish_reason) for d in got] == [("01234", 6, "stop")]


def test_a_circuit_opens_after_failures_and_lets_one_call_try() -> None:
    now = [0.0]
    breaker = Breaker(lambda: now[0])
    for _ in range(TRIP):
        assert breaker.wait_s() == 0
        breaker.begin()
        breaker.end(False)
    assert breaker.wait_s() == REST_S
    now[0] += REST_S
    assert breaker.wait_s() == 0
    breaker.begin()
    assert breaker.wait_s() > 0, "one at a time"
    breaker.end(True)
    assert breaker.wait_s() == 0


def test_numbers_that_no_double_holds_are_not_allowed() -> None:
    schema = {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]}
    regex = regex_of(schema)
    assert regex is not None
    for good in ("0", "-12.5", "1e+10", "9.25E-99"):
        assert re.fullmatch(regex, f'{{"x":{good}}}'), good
    for bad in ("1e+999", "9" * 400, "01"):
        assert not re.fullmatch(regex, f'{{"x":{bad}}}'), bad
