"""Answers that a language model writes: by the embedded engine, and by an upstream for its words."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from forebay.v1 import key_pb2, key_pb2_grpc, knowledge_pb2_grpc, usage_pb2, usage_pb2_grpc
from forebay.v1 import knowledge_pb2 as pb
from google.protobuf import json_format

from tests.conftest import Live, Start, copy_models
from tests.integration.gateway import Gateway
from tests.integration.language_models import openvino_models
from tests.integration.random_lm import random_model
from tests.integration.scripted_upstream import ScriptedUpstream
from tests.integration.test_knowledge import create, upload, wait
from tests.integration.test_upstream import put

HANDBOOK = b"""# Handbook

## Holidays

Every employee has thirty days of paid holiday a year. Holidays that are not taken expire in March.

## Travel

Train tickets are booked by the office. Flights need the approval of a director.
A hotel may cost at most 140 euros a night.
"""
Stub = knowledge_pb2_grpc.KnowledgeServiceStub


@pytest.fixture(scope="module")
def upstream() -> Iterator[ScriptedUpstream]:
    running = ScriptedUpstream()
    yield running
    running.stop()


@pytest.fixture(scope="module")
def models(
    starters: Path, upstream: ScriptedUpstream, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    root = copy_models(starters, tmp_path_factory.mktemp("models") / "models", "minilm")
    random_model(root)
    put(root, "far", {"base_url": upstream.url, "model": "scripted"})
    return root


@pytest.fixture(scope="module")
def live(models: Path, start: Start) -> Live:
    return start(models, knowledge__max_answer_tokens=40)


@pytest.fixture(scope="module")
def stub(live: Live) -> Stub:
    stub = Stub(live.channel)
    create(stub, "office", language="en", chunks={"method": "CHUNK_METHOD_HEADING"})
    upload(stub, "office", ("handbook.md", HANDBOOK), ("cats.txt", b"Cats sleep most of the day."))
    wait(stub, "office")
    return stub


def ask(stub: Stub, question: str, model: str = "far", **fields: Any) -> pb.AskResponse:
    request = pb.AskRequest(knowledge_base="office", question=question, model=model)
    return stub.Ask(json_format.ParseDict(fields, request))


def test_the_embedded_engine_writes_and_its_tokens_are_counted(stub: Stub, live: Live) -> None:
    """Random words: none of them is shown as if the documents said it."""
    usage = usage_pb2_grpc.UsageServiceStub(live.channel)

    def counted() -> tuple[int, float]:
        rows = usage.ListUsage(usage_pb2.ListUsageRequest()).rows
        mine = [r.counters for r in rows if r.model == "random"]
        return sum(c.tokens for c in mine), sum(c.cost for c in mine)

    before = counted()
    answer = ask(stub, "How many days of holiday?", "random")
    assert answer.method == pb.ANSWER_METHOD_WRITTEN
    assert answer.written_by.model == "random" and answer.served_by.model == "minilm"
    used = answer.generation_usage
    assert used.prompt_tokens > 50 and 1 <= used.completion_tokens <= 40
    assert all(c.verified for c in answer.citations)
    assert answer.unsupported or answer.citations or len(answer.answer.split()) < 2
    after = counted()
    assert after[0] - before[0] == used.prompt_tokens + used.completion_tokens
    money = (used.prompt_tokens + 2 * used.completion_tokens) / 1e6
    assert after[1] - before[1] == pytest.approx(money)


def test_a_stream_is_as_the_whole_answer_and_a_client_that_leaves_stops_the_engine(
    stub: Stub, live: Live
) -> None:
    request = pb.AskStreamRequest(knowledge_base="office", question="Holiday?", model="random")
    events = list(stub.AskStream(request))
    kinds = [e.WhichOneof("event") for e in events]
    assert kinds[0] == "stage" and kinds[-2:] == ["usage", "done"]
    whole = ask(stub, "Holiday?", "random")
    assert "".join(e.token.text for e in events) == whole.answer
    assert events[-1].done.generation_usage.completion_tokens
    engine = live.server.repository.pool.loaded[("random", 1)].client
    call = stub.AskStream(request)
    for event in call:
        if event.WhichOneof("event") == "token":
            break
    call.cancel()
    deadline = time.monotonic() + 10
    while engine.gate.running:
        assert time.monotonic() < deadline, "the engine still writes"
        time.sleep(0.02)


def test_a_client_that_leaves_cuts_the_upstream_off(stub: Stub, upstream: ScriptedUpstream) -> None:
    upstream.script = lambda m: "word " * 400
    upstream.pause_s = 0.02
    upstream.cut_off.clear()
    request = pb.AskStreamRequest(knowledge_base="office", question="Holiday?", model="far")
    call = stub.AskStream(request)
    for event in call:
        if event.WhichOneof("event") == "token":
            break
    call.cancel()
    assert upstream.cut_off.wait(5)
    upstream.pause_s = 0.0


def test_citations_are_verified_and_the_rest_is_marked(
    stub: Stub, upstream: ScriptedUpstream
) -> None:
    text = HANDBOOK.decode()

    def script(messages: list[dict[str, str]]) -> str:
        prompt = messages[-1]["content"]
        number = next(n for n in "1234" if f"[{n}] ## Travel" in prompt)
        return (
            f'A hotel may cost "at most 140 euros a night" [{number}]. '
            f'It is "always 200 euros a day" [{number}]. Flights are free [9]. Cats love it.'
        )

    upstream.script = script
    answer = ask(stub, "What may a hotel cost?")
    assert upstream.asked[-1].endswith("Question: What may a hotel cost?")
    assert "Answer the question from the following context" in upstream.asked[-1]
    assert answer.method == pb.ANSWER_METHOD_WRITTEN
    assert all(c.verified and text[c.start : c.end] == c.quote for c in answer.citations)
    assert answer.citations[0].quote == "at most 140 euros a night"
    marked = {answer.answer[u.start : u.end]: u.reason for u in answer.unsupported}
    assert marked['"always 200 euros a day"'] == pb.UNSUPPORTED_REASON_QUOTE_NOT_FOUND
    assert marked["[9]"] == pb.UNSUPPORTED_REASON_NO_SUCH_SOURCE
    assert marked["Cats love it."] == pb.UNSUPPORTED_REASON_NO_CITATION


def test_not_in_the_documents_is_an_answer(stub: Stub, upstream: ScriptedUpstream) -> None:
    upstream.script = lambda m: "NOT IN THE DOCUMENTS."
    request = pb.AskStreamRequest(knowledge_base="office", question="Who is Bach?", model="far")
    events = list(stub.AskStream(request))
    assert events[-1].done.method == pb.ANSWER_METHOD_NOT_FOUND
    said = "".join(e.token.text for e in events)
    assert "NOT IN" not in said and said.startswith("The documents do not hold")
    upstream.script = lambda m: "   "
    silent = ask(stub, "How many days of paid holiday does an employee have?")
    assert silent.method == pb.ANSWER_METHOD_EXTRACTED and "thirty days" in silent.answer
    asked = len(upstream.asked)
    extracted = ask(stub, "How many days of paid holiday does an employee have?", extract=True)
    assert extracted.method == pb.ANSWER_METHOD_EXTRACTED and len(upstream.asked) == asked


def test_a_follow_up_is_rewritten(stub: Stub, upstream: ScriptedUpstream) -> None:
    def script(messages: list[dict[str, str]]) -> str:
        if messages[-1]["content"].startswith("Rewrite the last question"):
            return "Who approves flights of employees?"
        return "A director approves flights [1]."

    upstream.script = script
    history = [{"role": "TURN_ROLE_USER", "text": "May I fly?"}]
    answer = ask(stub, "And who approves it?", history=history, explain=True)
    assert answer.query == "Who approves flights of employees?"
    assert [s.name for s in answer.steps] == ["rewrite", "search"]
    assert list(answer.steps[0].queries) == [answer.query]
    assert answer.generation_usage.prompt_tokens == 200  # two calls


def test_expansion_and_hyde_are_steps_that_find_more(
    stub: Stub, upstream: ScriptedUpstream
) -> None:
    def script(messages: list[dict[str, str]]) -> str:
        prompt = messages[-1]["content"]
        if "other wordings" in prompt:
            return "1. How long do cats sleep?\n2. When do cats rest?\n3. one too many?\n4. x"
        return "A cat sleeps nearly the whole day."

    upstream.script = script
    request = pb.RetrieveRequest(knowledge_base="office", query="feline slumber", explain=True)
    fields = {"expand": {"model": "far", "queries": 2}, "hyde": {"model": "far"}}
    json_format.ParseDict(fields, request.retrieval)
    found = stub.Retrieve(request)
    assert [s.name for s in found.steps] == ["expand", "hyde", "search"]
    assert list(found.steps[0].queries) == ["How long do cats sleep?", "When do cats rest?"]
    assert list(found.steps[1].queries) == ["A cat sleeps nearly the whole day."]
    assert found.chunks[0].name == "cats.txt"
    bare = pb.RetrieveRequest(knowledge_base="office", query="x", retrieval={"hyde": {}})
    with pytest.raises(grpc.RpcError) as caught:
        stub.Retrieve(bare)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "knowledge.writer" in caught.value.details()


def test_an_upstream_that_fails_is_said(stub: Stub) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        ask(stub, "x", model="nobody")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_a_budget_is_reserved_and_given_back(models: Path, start: Start) -> None:
    live = start(models, auth__required="always", knowledge__writer="random")
    _, secret = live.run(live.server.keys.create("admin", ("admin", "infer", "read")))
    admin = [("authorization", f"Bearer {secret}")]
    stub = Stub(live.channel)
    stub.CreateKnowledgeBase(pb.CreateKnowledgeBaseRequest(knowledge_base="b"), metadata=admin)
    text = {"knowledge_base": "b", "name": "cats", "text": "Cats sleep most of the day."}
    stub.IngestText(pb.IngestTextRequest(**text), metadata=admin)
    deadline = time.monotonic() + 30
    asked = pb.ListDocumentsRequest(knowledge_base="b", status=4)
    while not stub.ListDocuments(asked, metadata=admin).documents:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    keys = key_pb2_grpc.KeyServiceStub(live.channel)
    made = keys.CreateKey(
        key_pb2.CreateKeyRequest(
            name="small", scopes=["KEY_SCOPE_INFER"], limits={"budget_tokens": 3000}
        ),
        metadata=admin,
    )
    small = [("authorization", f"Bearer {made.secret}")]
    question = pb.AskRequest(knowledge_base="b", question="Do cats sleep?")
    used = 0
    with pytest.raises(grpc.RpcError) as caught:
        for _ in range(40):
            answer = stub.Ask(question, metadata=small)
            g = answer.generation_usage
            used += g.prompt_tokens + g.completion_tokens
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert 1000 < used <= 3000
    standing = live.run(live.server.budgets.standing(made.key.id))
    assert standing.reserved_tokens == 0
    live.stop()


def test_the_tiny_model_answers_from_the_context(
    starters: Path, start: Start, tmp_path: Path
) -> None:
    """A trained model, small as it is: its answer is right and its citation verified."""
    root = openvino_models(tmp_path / "models")
    copy_models(starters, root, "minilm")
    prompt = "Context:\n{context}\n\nQuestion: {question}"
    live = start(root, knowledge__writer="tiny", knowledge__answer_prompt=prompt)
    stub = Stub(live.channel)
    create(stub, "codes", language="en")
    things = {"lamp": "482", "boat": "Rome", "garden": "771"}
    for thing, code in things.items():
        text = f"The code of the {thing} is {code}."
        upload(stub, "codes", (f"{thing}.txt", text.encode()))
    wait(stub, "codes")
    right = 0
    for thing in things:
        request = pb.AskRequest(
            knowledge_base="codes", question=f"What is the code of the {thing}?"
        )
        request.retrieval.top_k = 2
        answer = stub.Ask(request)
        assert answer.method == pb.ANSWER_METHOD_WRITTEN
        right += any(c.verified and c.name == f"{thing}.txt" for c in answer.citations)
    assert right >= 2
    live.stop()


REFUSAL = "I cannot help with that."


@pytest.fixture
def refusing(upstream: ScriptedUpstream) -> Iterator[None]:
    script = upstream.script
    upstream.script, upstream.refuses = lambda messages: REFUSAL, True
    yield
    upstream.script, upstream.refuses = script, False


@pytest.mark.usefixtures("refusing")
def test_a_refusal_is_said_and_is_no_answer(stub: Stub, gateway: Gateway) -> None:
    question = "How many days of holiday are there?"
    answer = ask(stub, question, history=[{"role": "TURN_ROLE_USER", "text": "Hello"}])
    assert (answer.answer, answer.method) == (REFUSAL, pb.ANSWER_METHOD_REFUSED)
    assert not answer.citations and not answer.unsupported and answer.sources
    assert answer.query == question and answer.written_by.model == "far"
    request = pb.AskStreamRequest(knowledge_base="office", question=question, model="far")
    events = list(stub.AskStream(request))
    assert "".join(e.token.text for e in events) == REFUSAL
    assert events[-1].done.method == pb.ANSWER_METHOD_REFUSED
    assert not any(e.WhichOneof("event") in ("citation", "unsupported") for e in events)
    body = {"question": question, "model": "far"}
    told = gateway.http.post("/api/v1/knowledge/office:ask", json=body).json()
    assert (told["answer"], told["method"]) == (REFUSAL, "ANSWER_METHOD_REFUSED")
    streamed = gateway.http.post("/api/v1/knowledge/office:askStream", json=body).text
    assert '"ANSWER_METHOD_REFUSED"' in streamed
    item = {"query": question, "answers": ["thirty"]}
    runs = [{"name": "a", "answer": True, "model": "far"}]
    asked = json_format.ParseDict({"items": [item], "runs": runs}, pb.EvaluateRequest())
    asked.knowledge_base = "office"
    figures = {m.name: m for m in stub.Evaluate(asked).results[0].metrics}
    assert figures["answered"].value == figures["f1"].value == 0
    assert figures["faithfulness"].n == 0


def test_an_answer_that_ends_in_a_refusal(stub: Stub, upstream: ScriptedUpstream) -> None:
    upstream.script, upstream.then_refuses = lambda messages: "Thirty days. ", REFUSAL
    try:
        answer = ask(stub, "How many days of holiday are there?")
    finally:
        upstream.then_refuses = ""
    assert (answer.answer, answer.method) == ("Thirty days. " + REFUSAL, pb.ANSWER_METHOD_REFUSED)
    assert [(u.start, u.end) for u in answer.unsupported] == [(0, 12)]
