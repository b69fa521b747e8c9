"""Language models from Hugging Face folders to TensorRT-LLM engines. NOT RUN YET: needs a GPU.

    python -m forebay_exporters.tensorrt_llm_export SOURCE OUT '{"max_batch_size": 64}'

Written against the documented LLM API of tensorrt_llm 1.x. An engine fits the GPU it was built on
and the version it was built by, and no other. Runs in the environment that has tensorrt_llm, which
need not have Forebay: nothing of it is imported here.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

#: Files that are served as they are.
KEPT = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
LIMITS = ("max_batch_size", "max_input_len", "max_seq_len", "max_num_tokens")
PARALLEL = ("tensor_parallel_size", "pipeline_parallel_size", "dtype")


def build(source: Path, out: Path, options: Mapping[str, Any]) -> None:
    """Build an engine into `out`/engine, whole or not at all.

    Args:
        options: LIMITS, PARALLEL, and `quantization`: a QuantAlgo such as FP8 or W4A16_AWQ.
    """
    from tensorrt_llm._tensorrt_engine import LLM  # pyright: ignore[reportMissingImports]
    from tensorrt_llm.llmapi import (  # pyright: ignore[reportMissingImports]
        BuildConfig,
        QuantAlgo,
        QuantConfig,
    )

    unknown = sorted(set(options) - {*LIMITS, *PARALLEL, "quantization"})
    if unknown:
        raise ValueError(f"the option {unknown[0]!r} is not known")
    wanted: dict[str, Any] = {k: v for k, v in options.items() if k in PARALLEL}
    if "quantization" in options:
        wanted["quant_config"] = QuantConfig(quant_algo=QuantAlgo[options["quantization"]])
    limits = BuildConfig(**{k: v for k, v in options.items() if k in LIMITS})
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    llm = LLM(model=str(source), build_config=limits, trust_remote_code=False, **wanted)
    llm.save(str(part / "engine"))
    llm.shutdown()
    for name in KEPT:
        if (source / name).exists():
            shutil.copy(source / name, part / name)
    shutil.rmtree(out, ignore_errors=True)
    part.rename(out)


def export_tensorrt_llm(
    source: Path,
    root: Path,
    name: str,
    version: int,
    python: Path,
    options: Mapping[str, Any],
    say: Callable[[str], None] = lambda _: None,
) -> Path:
    """Put a built engine at `<root>/<name>/<version>`, by the Python that has tensorrt_llm.

    Raises ExportError.
    """
    from forebay_exporters.artefact import ExportError

    if not (source / "config.json").exists() or not any(source.glob("*.safetensors")):
        raise ExportError(f"{source} is no Hugging Face folder with safetensors")
    out = root / name / str(version)
    out.parent.mkdir(parents=True, exist_ok=True)
    say("building the engine; this takes minutes")
    done = subprocess.run(
        [str(python), "-P", __file__, str(source), str(out), json.dumps(dict(options))],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no words"])[-1]
        raise ExportError(f"the engine could not be built: {last}")
    settings = out.parent / "model.yaml"
    if not settings.exists():
        settings.write_text("engine: tensorrt_llm\n")
    return out


if __name__ == "__main__":
    build(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
