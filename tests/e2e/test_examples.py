"""The clients in examples/ against a live gateway: each as its user runs it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, Live, Start, copy_models
from tests.integration.gateway import Gateway

EXAMPLES = ROOT / "examples"
QUESTION = "What may a hotel cost?"


@pytest.fixture(scope="module")
def live(starters: Path, start: Start, tmp_path_factory: pytest.TempPathFactory) -> Live:
    return start(copy_models(starters, tmp_path_factory.mktemp("m") / "models", "minilm"))


@pytest.fixture(scope="module")
def gateway(live: Live) -> Iterator[Gateway]:
    running = Gateway(live)
    http = running.http
    config = {"knowledge_base": "handbook", "config": {"language": "en"}}
    http.post("/api/v1/knowledge", json=config).raise_for_status()
    file = {"file": ("handbook.pdf", (EXAMPLES / "handbook.pdf").read_bytes())}
    form = {"knowledge_base": "handbook"}
    http.post("/api/v1/knowledge:upload", data=form, files=file).raise_for_status()
    deadline = time.monotonic() + 30
    path = "/api/v1/knowledge/handbook/documents?status=DOCUMENT_STATUS_READY"
    while not http.get(path).json()["documents"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    yield running
    running.stop()


def said(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_node_streams_an_answer(gateway: Gateway) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("no Node.js: apt install nodejs")
    out = said(node, str(EXAMPLES / "node" / "ask.mjs"), gateway.url, "handbook", QUESTION)
    assert "140 euros a night" in out and "handbook.pdf, page 2, verified" in out


@pytest.mark.slow
def test_go_streams_an_answer(gateway: Gateway) -> None:
    go = shutil.which("go") or shutil.which("/usr/local/go/bin/go")
    if go is None:
        pytest.skip("no Go toolchain: https://go.dev/dl")
    out = said(go, "run", str(EXAMPLES / "go" / "ask.go"), gateway.url, "handbook", QUESTION)
    assert "140 euros a night" in out and "handbook.pdf, page 2, verified true" in out


@pytest.mark.parametrize("file", ["langchain_retriever.py", "llamaindex_retriever.py"])
def test_retrievers_find(gateway: Gateway, file: str) -> None:
    out = said(sys.executable, str(EXAMPLES / "python" / file), gateway.url, "handbook", QUESTION)
    assert out.startswith("handbook.pdf") and "Employee handbook" in out
