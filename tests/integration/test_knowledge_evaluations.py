"""Evaluations of knowledge bases as jobs: kept, begun again, and left out where their file is broken."""

from __future__ import annotations

import time
from pathlib import Path

import grpc
import pytest
from forebay.v1 import collection_pb2, knowledge_pb2_grpc
from forebay.v1 import knowledge_pb2 as pb

from tests.conftest import Live, Start, copy_models
from tests.integration.test_knowledge import HANDBOOK, create, upload, wait


@pytest.fixture(scope="module")
def models(starters: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_models(starters, tmp_path_factory.mktemp("models") / "models", "minilm")


def test_an_evaluation_is_a_job_whose_results_are_kept(
    models: Path, start: Start, tmp_path: Path
) -> None:
    live = start(models, home=tmp_path)
    stub = knowledge_pb2_grpc.KnowledgeServiceStub(live.channel)
    create(stub, "office", language="en", chunks={"method": "CHUNK_METHOD_HEADING"})
    upload(stub, "office", ("handbook.md", HANDBOOK))
    wait(stub, "office")
    request = pb.StartEvaluationRequest(knowledge_base="office", name="nightly")
    request.items.add(
        query="How many days of paid holiday does an employee have?",
        relevant_texts=["thirty days"],
        answers=["thirty days", "thirty"],
    )
    request.items.add(query="What may a hotel cost?", relevant_documents=["handbook.md"])
    request.items.add(query="Who composed the ninth symphony?", answers=["Beethoven"])
    request.runs.add(name="hybrid", answer=True)
    request.runs.add(name="words", answer=True).retrieval.mode = collection_pb2.SEARCH_MODE_KEYWORD
    request.runs.add(name="broken", answer=True, model="nobody")
    job = stub.StartEvaluation(request).evaluation
    asked = pb.GetEvaluationRequest(knowledge_base="office", evaluation=job.id)
    deadline = time.monotonic() + 30
    while job.status == pb.EVALUATION_STATUS_RUNNING:
        assert time.monotonic() < deadline
        time.sleep(0.05)
        job = stub.GetEvaluation(asked).evaluation
    assert job.status == pb.EVALUATION_STATUS_DONE and job.progress == 1 and job.items == 3
    results = {r.name: {m.name: m for m in r.metrics} for r in job.results}
    good = results["hybrid"]
    assert (good["recall@5"].value, good["recall@5"].n) == (1.0, 2)
    assert good["context_recall"].n == 2 and good["exact_match"].n == 2
    assert good["answered"].value == pytest.approx(2 / 3)
    assert good["faithfulness"].value == 1.0 and good["faithfulness"].n == 2
    assert 0 < good["answer_relevance"].value <= 1
    assert {m.failures for m in results["broken"].values()} == {3}
    assert all(m.value == m.low == m.high == 0 for m in results["broken"].values())
    assert all(m.value == m.value for r in results.values() for m in r.values()), "NaN"
    live.stop()
    live = start(models, home=tmp_path)
    stub = knowledge_pb2_grpc.KnowledgeServiceStub(live.channel)
    kept = stub.ListEvaluations(pb.ListEvaluationsRequest(knowledge_base="office")).evaluations
    assert [(e.name, e.status) for e in kept] == [("nightly", pb.EVALUATION_STATUS_DONE)]
    assert kept[0] == job
    gone = pb.DeleteEvaluationRequest(knowledge_base="office", evaluation=job.id)
    stub.DeleteEvaluation(gone)
    with pytest.raises(grpc.RpcError) as caught:
        stub.GetEvaluation(asked)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    live.stop()


def evaluate(live: Live, queries: int) -> pb.Evaluation:
    """Start an evaluation of so many queries over a new base of one document."""
    stub = knowledge_pb2_grpc.KnowledgeServiceStub(live.channel)
    create(stub, "office")
    upload(stub, "office", ("handbook.md", HANDBOOK))
    wait(stub, "office")
    request = pb.StartEvaluationRequest(knowledge_base="office")
    for i in range(queries):
        request.items.add(query=f"question {i} on hotels", relevant_documents=["handbook.md"])
    return stub.StartEvaluation(request).evaluation


def test_an_evaluation_that_was_cut_off_begins_again(
    models: Path, start: Start, tmp_path: Path
) -> None:
    live = start(models, home=tmp_path)
    job = evaluate(live, 300)
    live.stop()
    live = start(models, home=tmp_path)
    stub = knowledge_pb2_grpc.KnowledgeServiceStub(live.channel)
    asked = pb.GetEvaluationRequest(knowledge_base="office", evaluation=job.id)
    deadline = time.monotonic() + 60
    while stub.GetEvaluation(asked).evaluation.status != pb.EVALUATION_STATUS_DONE:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    live.stop()


def test_an_evaluation_whose_file_is_broken_is_left_out_and_named_in_the_log(
    models: Path, start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    live = start(models, home=tmp_path)
    job = evaluate(live, 1)
    live.stop()
    (kept,) = tmp_path.rglob(f"{job.id}.json")
    kept.with_name("broken.json").write_bytes(b"{")
    live = start(models, home=tmp_path)
    stub = knowledge_pb2_grpc.KnowledgeServiceStub(live.channel)
    asked = pb.GetEvaluationRequest(knowledge_base="office", evaluation=job.id)
    assert stub.GetEvaluation(asked).evaluation.id == job.id
    asked.evaluation = "broken"
    with pytest.raises(grpc.RpcError) as refused:
        stub.GetEvaluation(asked)
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND
    assert "broken.json" in caplog.text
    live.stop()
