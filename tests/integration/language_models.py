"""Repositories with language models, for tests.

`random_*`: random weights, made in seconds, for everything that needs a real engine and no sense in
what it says. The others need the trained tiny model; where it was not made they skip saying so.
"""

from __future__ import annotations

import hashlib
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
#: Full precision: random weights have close rivals, and answers are compared.
OPENVINO = "{kv_cache_gb: 1, properties: {INFERENCE_PRECISION_HINT: f32}}"
VLLM = "{dtype: float32, enforce_eager: true}"


def random_folder() -> Path:
    """A Hugging Face folder with random weights, made once for each state of its maker."""
    from forebay_exporters.tiny_lm import folder, random_weights

    digest = hashlib.sha256()
    for module in (folder, random_weights):
        digest.update(Path(str(module.__file__)).read_bytes())
    out = KEPT / f"random-lm-{digest.hexdigest()[:12]}"
    if not out.is_dir():
        random_weights.make(out)
    return out


def random_openvino(root: Path, running: int = 32, name: str = "tiny", config: str = "") -> Path:
    """A repository with random weights for the embedded engine; `config` goes into model.yaml."""
    from forebay_exporters.openvino_export import convert

    source = random_folder()
    converted = source.with_name(f"{source.name}-openvino")
    if not converted.is_dir():
        convert(source, converted)
    return _put(root, name, converted, "openvino", OPENVINO, "''", running, config)


def random_vllm(root: Path, running: int = 256, options: str = VLLM) -> Path:
    """A repository with random weights for vLLM."""
    vllm_python()
    return _put(root, "tiny", random_folder(), "vllm", options, "hermes", running)


def openvino_models(root: Path, running: int = 32, name: str = "tiny") -> Path:
    """A repository with the trained tiny model for the embedded engine."""
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


def _put(
    root: Path,
    name: str,
    source: Path,
    engine: str,
    options: str,
    parser: str,
    running: int,
    config: str = "",
) -> Path:
    folder = root / name
    shutil.copytree(source, folder / "1")
    (folder / "model.yaml").write_text(
        CONFIG.format(engine=engine, options=options, parser=parser, running=running) + config
    )
    return root
