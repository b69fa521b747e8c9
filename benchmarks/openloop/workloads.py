"""Calls whose right answers are known: from the bare models, run one item at a time.

Texts are told apart by their answers: each check reads enough of the vector that another text's
does not pass.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from forebay.oip import open_inference_pb2 as oip
from forebay.v1 import classification_pb2, embedding_pb2, rerank_pb2, tabular_pb2
from numpy.typing import NDArray

from benchmarks.common import text_of
from benchmarks.openloop import Workload, double, floats, path, single, text

#: Values of a vector that are looked at.
LOOKED_AT = 32


class _Bare:
    """A starter model, alone."""

    def __init__(self, models: Path, name: str) -> None:
        folder = models / name / "1"
        self.manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(
            str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        self._tokenizer: Any = None
        if self.manifest.get("tokenizer_file"):
            from tokenizers import Tokenizer

            self._tokenizer = Tokenizer.from_file(str(folder / self.manifest["tokenizer_file"]))
            self._tokenizer.no_padding()

    def text(self, given: str) -> NDArray[np.float32]:
        """The model's first output for one text, without its first dimension."""
        ids = np.array([self._tokenizer.encode(given).ids], np.int64)
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        return np.asarray(self.session.run(None, feeds)[0])[0]

    def vector(self, given: str) -> NDArray[np.float32]:
        """The same, as a unit vector."""
        value = self.text(given)
        return value / np.linalg.norm(value)


def tabular(models: Path, rows: int = 200) -> Workload:
    """TabularService.Predict: one row of the housing forest a call."""
    bare = _Bare(models, "housing")
    features = bare.manifest["tabular"]["features"]
    rng = random.Random(5)
    out = Workload("tabular", "forebay.v1.TabularService/Predict")
    at = path(tabular_pb2.PredictResponse, "predictions.value")
    for _ in range(rows):
        row: dict[str, Any] = {}
        for f in features:
            if f.get("categories"):
                row[f["name"]] = rng.choice(f["categories"])
            else:  # within a tenth of the range: forests are flat at the far ends
                row[f["name"]] = round(f["min"] + (f["max"] - f["min"]) * rng.random(), 4)
        feeds = {
            n: np.array([[v]], object if isinstance(v, str) else np.float32) for n, v in row.items()
        }
        value = float(np.asarray(bare.session.run(None, feeds)[0]).reshape(-1)[0])
        request = tabular_pb2.PredictRequest(model="housing")
        request.rows.add().update(row)
        out.add(request, [double(at, value, max(1e-3, 1e-6 * abs(value)))])
    return out


def trees(models: Path, rows: int = 200) -> Workload:
    """TabularService.Predict: one row a call of `forest`, a model that is nothing but a regressor's trees;
    the fast lane answers most of such calls by itself."""
    bare = _Bare(models, "forest")
    features = bare.manifest["tabular"]["features"]
    rng = random.Random(6)
    out = Workload("trees", "forebay.v1.TabularService/Predict")
    at = path(tabular_pb2.PredictResponse, "predictions.value")
    for _ in range(rows):
        row = {f["name"]: round(rng.uniform(f["min"], f["max"]), 4) for f in features}
        feeds = {bare.manifest["inputs"][0]["name"]: np.array([[*row.values()]], np.float32)}
        value = float(np.asarray(bare.session.run(None, feeds)[0]).reshape(-1)[0])
        request = tabular_pb2.PredictRequest(model="forest")
        request.rows.add().update(row)
        out.add(request, [double(at, value, max(1e-3, 1e-6 * abs(value)))])
    return out


def forest(models: Path, calls: int = 40, rows: int = 500) -> Workload:
    """TabularService.Predict with columns: 500 rows of the housing forest a call."""
    bare = _Bare(models, "housing")
    features = bare.manifest["tabular"]["features"]
    rng = np.random.default_rng(6)
    out = Workload("forest", "forebay.v1.TabularService/Predict")
    at = path(tabular_pb2.PredictResponse, "predictions.value")
    for _ in range(calls):
        request = tabular_pb2.PredictRequest(model="housing")
        feeds: dict[str, Any] = {}
        for f in features:
            column = request.columns.add(name=f["name"])
            if f.get("categories"):
                texts = [str(v) for v in rng.choice(f["categories"], rows)]
                column.strings.extend(texts)
                feeds[f["name"]] = np.array(texts, object).reshape(-1, 1)
            else:
                numbers = rng.uniform(f["min"], f["max"], rows).round(4)
                column.numbers.extend(numbers)
                feeds[f["name"]] = numbers.astype(np.float32).reshape(-1, 1)
        values = np.asarray(bare.session.run(None, feeds)[0]).reshape(-1)
        checks = [
            double(at, float(values[i]), max(1e-3, 1e-6 * abs(float(values[i]))), i)
            for i in (0, rows // 2, rows - 1)
        ]
        out.add(request, checks)
    return out


def embed(models: Path, tokens: int = 20, calls: int = 100, model: str = "minilm") -> Workload:
    """EmbeddingService.Embed: one text of so many tokens a call."""
    bare = _Bare(models, model)
    out = Workload("embed", "forebay.v1.EmbeddingService/Embed")
    at = path(embedding_pb2.EmbedResponse, "embeddings.values")
    for seed in range(calls):
        given = text_of(tokens, seed)
        want = bare.vector(given)[:LOOKED_AT]
        out.add(embedding_pb2.EmbedRequest(model=model, texts=[given]), [floats(at, want, 2e-3)])
    return out


def embed_many(models: Path, texts: int = 64, calls: int = 8) -> Workload:
    """Embed with large answers: 64 texts are 98 kB."""
    bare = _Bare(models, "minilm")
    out = Workload("embed_many", "forebay.v1.EmbeddingService/Embed")
    at = path(embedding_pb2.EmbedResponse, "embeddings.values")
    for call in range(calls):
        given = [text_of(6, 1000 * call + i) for i in range(texts)]
        checks = [
            floats(at, bare.vector(given[i])[:LOOKED_AT], 2e-3, i)
            for i in (0, texts // 2, texts - 1)
        ]
        out.add(embedding_pb2.EmbedRequest(model="minilm", texts=given), checks)
    return out


def classify(models: Path, calls: int = 60) -> Workload:
    """ClassificationService.Classify. Int8 with scales by batch: a score may differ a little."""
    bare = _Bare(models, "sentiment")
    labels = bare.manifest["classification"]["labels"]
    out = Workload("classify", "forebay.v1.ClassificationService/Classify")
    kind = classification_pb2.ClassifyResponse
    at, score_at = path(kind, "results.labels.label"), path(kind, "results.labels.score")
    feelings = ["wonderful", "dreadful", "moving", "dull", "brilliant", "boring", "fine", "odd"]
    for seed in range(calls * 2):
        rng = random.Random(seed)
        given = f"A {rng.choice(feelings)} and {rng.choice(feelings)} film, number {seed}."
        logits = bare.text(given)
        scores = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        first, second = np.sort(scores)[::-1][:2]
        if first - second < 0.2:
            continue  # a near tie may fall either way
        want = labels[int(scores.argmax())]
        checks = [text(at, want), single(score_at, float(first), 0.12)]
        request = classification_pb2.ClassifyRequest(model="sentiment", texts=[given], top_k=1)
        out.add(request, checks)
    out.requests = out.requests[:calls]
    return out


def rerank(models: Path, calls: int = 20) -> Workload:
    """RerankService.Rerank with MiniLM: four documents by their cosine."""
    bare = _Bare(models, "minilm")
    out = Workload("rerank", "forebay.v1.RerankService/Rerank")
    at = path(rerank_pb2.RerankResponse, "results.score")
    for call in range(calls):
        query = text_of(8, 50_000 + call)
        documents = [text_of(12, 60_000 + 10 * call + i) for i in range(4)]
        unit = bare.vector(query)
        scores = sorted((float(bare.vector(d) @ unit) for d in documents), reverse=True)
        request = rerank_pb2.RerankRequest(model="minilm", query=query, documents=documents)
        out.add(request, [single(at, s, 2e-3, i) for i, s in enumerate(scores)])
    return out


def infer(models: Path, calls: int = 100) -> Workload:
    """The Open Inference Protocol's ModelInfer with raw tensors, on the model `iris`."""
    bare = _Bare(models, "iris")
    out = Workload("infer", "inference.GRPCInferenceService/ModelInfer")
    probabilities = next(o for o in bare.manifest["outputs"] if o["dtype"] == "FP32")["name"]
    rng = np.random.default_rng(3)
    for _ in range(calls):
        request = oip.ModelInferRequest(model_name="iris")
        feeds: dict[str, Any] = {}
        for given in bare.manifest["inputs"]:
            shape = [1, *given["shape"][1:]]
            feeds[given["name"]] = rng.uniform(0.1, 7.0, shape).astype(np.float32)
            request.inputs.add(name=given["name"], datatype="FP32", shape=shape)
            request.raw_input_contents.append(feeds[given["name"]].tobytes())
        want = np.asarray(bare.session.run([probabilities], feeds)[0])[0]
        request.outputs.add(name=probabilities)
        raw = path(oip.ModelInferResponse, "raw_output_contents")
        out.add(request, [floats(raw, want, 1e-4)])
    return out


ALL = {
    "tabular": tabular,
    "forest": forest,
    "embed": embed,
    "embed_many": embed_many,
    "classify": classify,
    "rerank": rerank,
    "infer": infer,
}
