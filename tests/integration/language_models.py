"""Repositories with the tiny language model, for tests; where it was not made they skip saying so."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.conftest import KEPT, ROOT

TINY, TINY_OPENVINO = KEPT / "tiny-lm", KEPT / "tiny-lm-openvino"
CONFIG = """
engine: {engine}
engine_options: {options}
default_for: [generation]
generation: {{tool_parser: {parser}, max_running: {running}, max_queue_size: 4096,
  prices: {{prompt: 1.0, completion: 2.0}}}}
"""


def openvino_models(root: Path, running: int = 32, name: str = "tiny") -> Path:
    """A repository with the tiny model for the embedded engine."""
    pytest.importorskip("openvino_genai")
    if not TINY_OPENVINO.is_dir():
        pytest.skip("the tiny language model was not made: `make tiny-lm`")
    return _put(root, name, TINY_OPENVINO, "openvino", "{kv_cache_gb: 1}", "''", running)


def vllm_python() -> Path:
    """The Python that has vLLM: FOREBAY_TEST_VLLM_PYTHON, else .venv-vllm."""
    given = os.environ.get("FOREBAY_TEST_VLLM_PYTHON")
    python = Path(given) if given else ROOT / ".venv-vllm" / "bin" / "python"
    if not python.exists():
        pytest.skip("no environment with vLLM: `make vllm`")
    return python


def vllm_models(root: Path, running: int = 256, options: str = "") -> Path:
    """A repository with the tiny model for vLLM."""
    vllm_python()
    if not TINY.is_dir():
        pytest.skip("the tiny language model was not made: `make tiny-lm`")
    wanted = options or "{dtype: float32, enforce_eager: true}"
    return _put(root, "tiny", TINY, "vllm", wanted, "hermes", running)


def _put(
    root: Path, name: str, source: Path, engine: str, options: str, parser: str, running: int
) -> Path:
    folder = root / name
    shutil.copytree(source, folder / "1")
    (folder / "model.yaml").write_text(
        CONFIG.format(engine=engine, options=options, parser=parser, running=running)
    )
    return root
