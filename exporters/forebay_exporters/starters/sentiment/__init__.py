"""`sentiment`: positive, negative or neutral, by a linear head on MiniLM's sentence vectors.

The head's parameters (head.safetensors, 5 KB) are in the repository; train.py is their recipe.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from forebay_exporters import quantize
from forebay_exporters.artefact import version_folder, write_manifest
from forebay_exporters.bert_graph import BertGraph
from forebay_exporters.parity import Bounds, report
from forebay_exporters.starters import minilm

LABELS = ["negative", "neutral", "positive"]
HEAD = Path(__file__).parent / "head.safetensors"
FACTS = Path(__file__).parent / "facts.json"


def make(root: Path, cache: Path, progress: minilm.Progress, name: str = "sentiment") -> Path:
    """The int8 model: encoder, mean, head, in one graph."""
    import onnx

    source = minilm.weights(cache, progress)
    progress("putting the sentiment head on the encoder", 0.3)
    head = load_file(str(HEAD))
    with version_folder(root, name, 1) as folder:
        config = json.loads((source / "config.json").read_text())
        graph = BertGraph(source / "model.safetensors", config)
        full = folder / "full.onnx"
        onnx.save(graph.build((head["weight"], head["bias"])), full)
        quantize.int8_dynamic(
            full, folder / "model.onnx", [*minilm.sensitive_layers(config), "logits"]
        )
        shutil.copy(source / "tokenizer.json", folder)
        _, limit = minilm.encoder(source)
        full.unlink()
        logits = minilm.reference(source, minilm.PARITY_TEXTS) @ head["weight"] + head["bias"]
        parity = report(
            _softmax(logits),
            _softmax(minilm.embed(folder / "model.onnx", source, minilm.PARITY_TEXTS)),
            Bounds(max_abs_diff=0.1, min_cosine=0.98),
        )
        facts = json.loads(FACTS.read_text())
        write_manifest(
            folder,
            "text-classification",
            libraries=minilm.LIBRARIES,
            description="Sentiment of English sentences: positive, negative or neutral",
            source={**minilm.SOURCE, "head": facts["source"]},
            precision="int8",
            tokenizer_file="tokenizer.json",
            classification={
                "output": "logits",
                "labels": LABELS,
                "activation": "softmax",
                "max_tokens": limit,
            },
            metrics=facts["metrics"],
            parity=parity,
        )
    (root / name / "model.yaml").write_text(
        "default_for: [text-classification]\ncache:\n  enabled: true\n"
    )
    return root / name / "1"


def _softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)
