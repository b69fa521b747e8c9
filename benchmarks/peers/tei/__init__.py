"""text-embeddings-inference: `--tei PATH` names its router, built with the ONNX Runtime backend.

There is no package to install it from, so it has not been run here.
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.peers.doors import openai_http
from benchmarks.peers.spec import Candidate, Ports
from benchmarks.processes import Processes


def candidate(binary: Path, model: Path) -> Candidate:
    """The router on the token states of the same weights; it pools by itself."""

    def start(ports: Ports, home: Path) -> Processes:
        folder = home / "model"
        (folder / "onnx").mkdir(parents=True)
        (folder / "1_Pooling").mkdir()
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            (folder / name).symlink_to(model / "hidden" / name)
        (folder / "onnx" / "model.onnx").symlink_to(model / "hidden" / "model.onnx")
        pooling = {"word_embedding_dimension": 384, "pooling_mode_mean_tokens": True}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
        command = [str(binary), "--model-id", str(folder), "--hostname", "127.0.0.1"]
        command += ["--port", str(ports["http"]), "--dtype", "float32", "--auto-truncate"]
        return Processes([*command, "--max-client-batch-size", "256"], home / "log")

    def ways(_home: Path, _workload: str):
        return (openai_http("minilm"),)

    return Candidate("text-embeddings-inference", "", "peer", start, ways)
