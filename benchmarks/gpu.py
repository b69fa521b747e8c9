"""Texts a second on an NVIDIA GPU: ONNX Runtime's CUDA provider behind the server, beside the bare loop.

    python -m benchmarks.gpu [--providers cuda] [--seconds 5] [--rounds 3] [--bert FOLDER]

MiniLM is the starter model; `--bert` is a model folder of another encoder (an export of BERT-base,
say). Stops with a message where ONNX Runtime has no such provider. Writes
benchmarks/results/gpu.{json,md}. It has not been run: no GPU was at hand.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import onnxruntime as ort
from forebay_exporters.tune import Loaded, throughput
from forebay_server.repository.manifest import ModelConfig

from benchmarks import common
from benchmarks.load import grpc_load

EMBED = "forebay.v1.EmbeddingService/Embed"
NAMES = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
SHAPES = ((1, 20), (32, 20), (32, 128), (64, 128))
CALLERS = 256


def measure(folder: Path, providers: list[str], seconds: float, rounds: int) -> dict[str, Any]:
    """One model: the bare loop by shape, and through gRPC."""
    name = folder.name
    series: dict[str, list[float]] = {}
    yaml = f"default_for: [embedding]\nengine: onnxruntime\nproviders: [{', '.join(providers)}]\n"
    version = max((v for v in folder.iterdir() if v.name.isdigit()), key=lambda v: int(v.name))
    bare = Loaded(version, ModelConfig.model_validate({"providers": providers}))
    with tempfile.TemporaryDirectory() as home:
        shutil.copytree(folder, Path(home) / name, ignore=shutil.ignore_patterns("model.yaml"))
        (Path(home) / name / "model.yaml").write_text(yaml)
        with common.serving(FOREBAY_MODELS__ROOT=home) as (port, _):
            texts = {n: [{"texts": [common.text_of(n, i)]} for i in range(64)] for n in (20, 128)}
            for n, requests in texts.items():
                grpc_load(port, EMBED, requests, CALLERS, seconds)
                for _ in range(rounds):
                    for rows, length in SHAPES:
                        if length == n:
                            rate = throughput(bare, rows, length, seconds / 2)
                            series.setdefault(f"bare {rows}x{length}", []).append(rate)
                    served = grpc_load(port, EMBED, requests, CALLERS, seconds)
                    series.setdefault(f"gRPC, {n} tokens", []).append(served.rps)
    return {k: common.median(v) for k, v in series.items()}


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--providers", default="cuda", help="cuda, or tensorrt,cuda")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bert", type=Path, help="a second model folder")
    a = parser.parse_args()
    providers = a.providers.split(",")
    missing = [p for p in providers if NAMES.get(p) not in ort.get_available_providers()]
    if missing:
        raise SystemExit(
            f"ONNX Runtime here has no {', '.join(missing)}; it has "
            f"{', '.join(ort.get_available_providers())}: install 'forebay[gpu]' beside a driver"
        )
    folders = [common.starters() / "minilm", *([a.bert] if a.bert else [])]
    figures = {f.name: measure(f, providers, a.seconds, a.rounds) for f in folders}
    result = {"machine": common.machine(), "providers": providers, "texts_per_s": figures}
    (common.RESULTS / "gpu.json").write_text(json.dumps(result, indent=2) + "\n")
    lines = [
        "# Encoders on a GPU, texts a second",
        "",
        "| model | what | texts/s |",
        "|---|---|---|",
    ]
    for model, values in figures.items():
        lines += [f"| {model} | {what} | {rate:.0f} |" for what, rate in values.items()]
    text = "\n".join([*lines, ""])
    (common.RESULTS / "gpu.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
