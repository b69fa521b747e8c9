"""`forebay eval` as its users run it: jobs, table, JSON, plot; and a judge by ragas, which needs an
environment of its own: FOREBAY_TEST_RAGAS_PYTHON names its Python."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, Live, Start, copy_models
from tests.integration.gateway import Gateway
from tests.integration.random_lm import random_model
from tests.integration.scripted_upstream import ScriptedUpstream
from tests.integration.test_knowledge import create, upload, wait
from tests.integration.test_upstream import put

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def judge() -> Iterator[ScriptedUpstream]:
    running = ScriptedUpstream()
    yield running
    running.stop()


@pytest.fixture(scope="module")
def live(
    starters: Path, judge: ScriptedUpstream, start: Start, tmp_path_factory: pytest.TempPathFactory
) -> Live:
    from forebay.v1 import knowledge_pb2_grpc

    root = copy_models(starters, tmp_path_factory.mktemp("m") / "models", "minilm")
    random_model(root)
    put(root, "far", {"base_url": judge.url, "model": "scripted"})
    live = start(root)
    stub = knowledge_pb2_grpc.KnowledgeServiceStub(live.channel)
    create(stub, "handbook", language="en")
    pdf = ROOT / "examples" / "handbook.pdf"
    upload(stub, "handbook", ("handbook.pdf", pdf.read_bytes()))
    wait(stub, "handbook")
    return live


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    file = tmp_path / "questions.ndjson"
    lines = [
        {"query": "What may a hotel cost?", "relevant_texts": ["140 euros"], "answers": ["140 euros"]},
        {"query": "Who approves flights?", "relevant_documents": ["handbook.pdf"], "answers": ["a director"]},
    ]  # fmt: skip
    file.write_text("\n".join(json.dumps(line) for line in lines))
    return file


def forebay(live: Live, *arguments: str, python: str = sys.executable) -> str:
    paths = os.pathsep.join(str(ROOT / p) for p in ("contract", "cli"))
    environ = {
        **{k: v for k, v in os.environ.items() if not k.startswith("FOREBAY_")},
        "FOREBAY_GRPC_PORT": live.target.rpartition(":")[2],
        "PYTHONPATH": paths,
    }
    command = [python, "-m", "forebay_cli", *arguments]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_configurations_are_compared_and_kept(live: Live, questions: Path, tmp_path: Path) -> None:
    out, plot = tmp_path / "out.json", tmp_path / "out.png"
    flags = ["--answer", "--rerank", "minilm", "--mode", "hybrid", "--mode", "keyword"]
    files = ["--output", str(out), "--plot", str(plot), "--name", "first"]
    text = forebay(live, "eval", "handbook", str(questions), *flags, *files)
    for name in ("hybrid + minilm", "keyword", "recall@5", "faithfulness", "exact_match"):
        assert name in text
    results = json.loads(out.read_text())["results"]
    assert [r["name"] for r in results] == [
        "hybrid",
        "hybrid + minilm",
        "keyword",
        "keyword + minilm",
    ]
    hybrid = {m["name"]: m for m in results[0]["metrics"]}
    assert hybrid["recall@5"]["value"] == 1.0 and hybrid["faithfulness"]["n"] == 2
    assert plot.read_bytes().startswith(b"\x89PNG")
    kept = forebay(live, "eval", "handbook")
    assert "first" in kept and "done" in kept and "recall@5" in kept


def ragas_python() -> str:
    python = os.environ.get("FOREBAY_TEST_RAGAS_PYTHON", "")
    if not python:
        pytest.skip("FOREBAY_TEST_RAGAS_PYTHON names no Python that has ragas")
    return python


def judgement(messages: list[dict[str, str]]) -> str:
    """What a judge would say to ragas' prompts, in the forms that they ask for."""
    prompt = messages[-1]["content"]
    if "break down each sentence" in prompt:
        return json.dumps({"statements": ["A hotel may cost 140 euros.", "Flights are free."]})
    if "directly inferred" in prompt:
        verdicts = [("A hotel may cost 140 euros.", 1), ("Flights are free.", 0)]
        found = [{"statement": s, "reason": "r", "verdict": v} for s, v in verdicts]
        return json.dumps({"statements": found})
    if "noncommittal" in prompt:
        return json.dumps({"question": "What may a hotel cost?", "noncommittal": 0})
    if "classify" in prompt and "attributed" in prompt:
        found = [{"statement": "s", "reason": "r", "attributed": 1}]
        return json.dumps({"classifications": found})
    return json.dumps({"reason": "r", "verdict": 1})


@pytest.mark.parametrize("name", ["far", "random"])
def test_a_judge_gives_figures_or_failures_never_nan(
    live: Live, judge: ScriptedUpstream, questions: Path, tmp_path: Path, name: str
) -> None:
    """One judge knows the forms; the other, our engine with random weights, says nonsense."""
    python = ragas_python()
    judge.script = judgement
    gateway = Gateway(live)
    out = tmp_path / "out.json"
    try:
        flags = ["--mode", "hybrid", "--judge", name, "--url", gateway.url, "--output", str(out)]
        forebay(live, "eval", "handbook", str(questions), *flags, python=python)
    finally:
        gateway.stop()
    found: dict[str, Any] = {
        m["name"]: m for m in json.loads(out.read_text())["results"][0]["metrics"]
    }
    mine = {n.removeprefix("judge: "): m for n, m in found.items() if n.startswith("judge: ")}
    assert set(mine) == {"faithfulness", "answer_relevance", "context_precision", "context_recall"}
    assert all(m["value"] == m["value"] and m["n"] + m["failures"] == 2 for m in mine.values())
    if name == "far":
        assert mine["faithfulness"]["value"] == 0.5 and mine["faithfulness"]["n"] == 2
        assert mine["context_recall"]["value"] == 1.0
    else:
        assert mine["faithfulness"]["failures"] == 2
