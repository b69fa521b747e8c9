"""What each part may import, looked up in a fresh process; and the docs' lists against the code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import generate_latest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("forebay.settings", ["grpc", "onnxruntime", "torch", "fastapi"]),
        ("forebay_gateway.app", ["onnxruntime", "torch", "vllm", "forebay_server", "sqlalchemy"]),
        ("forebay_server.app", ["torch", "transformers", "sklearn", "onnx", "forebay_exporters"]),
        ("forebay_server.core.batcher", ["onnxruntime", "asyncio", "sqlalchemy"]),
        ("forebay_cli.main", ["torch", "onnxruntime", "fastapi", "sklearn"]),
    ],
)
def test_a_part_does_not_pull_in_what_it_must_not(module: str, forbidden: list[str]) -> None:
    code = f"import sys, {module}; print([m for m in {forbidden!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_the_metrics_page_lists_what_is_exposed() -> None:
    from fastapi import FastAPI
    from forebay_gateway.app import Measured
    from forebay_server.observability.metrics import SIZES, Metrics
    from prometheus_client import CollectorRegistry

    metrics = Metrics()
    metrics.watch_models(lambda: [("m", 1, 5)])
    metrics.watch_collections(lambda: [("c", dict.fromkeys(SIZES, 1.0))])
    metrics.watch_batches(lambda: (1, 2))
    metrics.watch_follower(lambda: 0.5)
    metrics.generation.watch(list)
    http = CollectorRegistry()
    Measured(FastAPI(), http)
    text = (metrics.exposition() + generate_latest(http)).decode()
    exposed = set(re.findall(r"^# TYPE (\S+) (?:histogram|gauge|counter)$", text, re.M))
    exposed = {n for n in exposed if not n.endswith("_created")}
    page = (ROOT / "docs" / "metrics.md").read_text()
    assert set(re.findall(r"^\| `(\w+)`", page, re.M)) == exposed


def test_the_readmes_services_are_the_contracts() -> None:
    from forebay.methods import methods

    readme = (ROOT / "README.md").read_text()
    for service in {m.service for m in methods().values() if m.service.startswith("forebay.")}:
        assert service.rpartition(".")[2] in readme
