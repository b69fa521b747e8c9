"""Vectors for benchmarks of search: real sentence embeddings, and more drawn like them.

    python -m benchmarks.vector_data [--points 1000000]

Real: 42,000 sentences of the data folder, 4 to 60 words long (abstracts, questions, reviews,
speeches, a book, ...), embedded by minilm-int8 (384 dimensions). 2,000 of them, taken by chance, are
the queries and are no points.

Drawn: a million texts are not at hand, and would take minilm most of an hour. So what is more than
40,000 is drawn: a real embedding, moved a random part of the way to one of its eight nearest
neighbours, with Gaussian noise of the covariance of such neighbours' differences, normalised. Noise
has the size of a third of a neighbour's distance. `difficulty` compares what HNSW finds among drawn
and among as many real vectors, with real queries for both: it says whether drawn ones are easier.

All is kept in .forebay/vectors.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import KEPT, starters
from benchmarks.retrieval_server import data_folder

WIDTH, QUERIES, SENTENCES = 384, 2000, 42_000
NEIGHBOURS, NOISE = 8, 1 / 3
FOLDER = KEPT / "vectors"
Floats = Any


def texts(data: Path) -> Iterator[str]:
    """Texts of the data folder, long and short."""
    with gzip.open(data / "retrieval/scifact/corpus.jsonl.gz", "rt") as file:
        for line in file:
            yield json.loads(line)["text"]
    for line in (data / "retrieval/scifact/queries.jsonl").open():
        yield json.loads(line)["text"]
    for line in (data / "qa/nq_open_dev.jsonl").open():
        yield json.loads(line)["question"]
    for article in json.loads((data / "qa/xquad.en.json").read_bytes())["data"]:
        for paragraph in article["paragraphs"]:
            yield paragraph["context"]
            yield from (q["question"] for q in paragraph["qas"])
    with gzip.open(data / "instruct/gsm8k_train.jsonl.gz", "rt") as file:
        for line in file:
            yield json.loads(line)["question"]
    with gzip.open(data / "intent/clinc150_small.json.gz", "rt") as file:
        for part in json.load(file).values():
            yield from (row[0] for row in part)
    with gzip.open(data / "sentiment/rt_polarity.tsv.gz", "rt") as file:
        yield from (max(line.rstrip("\n").split("\t"), key=len) for line in file)
    with zipfile.ZipFile(data / "documents/txt/state_union.zip") as archive:
        for name in archive.namelist():
            if name.endswith(".txt"):
                yield archive.read(name).decode("utf-8", "replace").replace("\n", " ")
    with gzip.open(data / "text/darwin.txt.gz", "rt", errors="replace") as file:
        yield file.read().replace("\n", " ")


def sentences(data: Path) -> list[str]:
    """SENTENCES distinct ones, chosen by chance."""
    seen: dict[str, None] = {}
    for text in texts(data):
        for sentence in re.split(r"(?<=[.!?])\s+", text):
            sentence = " ".join(sentence.split())
            if 4 <= len(sentence.split()) <= 60:
                seen.setdefault(sentence)
    order = np.random.default_rng(3).permutation(len(seen))[:SENTENCES]
    every = list(seen)
    return [every[i] for i in order]


def embed(lines: list[str], threads: int = 0) -> Floats:
    """Unit vectors [n, 384] by the starter model minilm-int8."""
    import onnxruntime
    from tokenizers import Tokenizer

    folder = starters() / "minilm-int8" / "1"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(128)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options)
    order = sorted(range(len(lines)), key=lambda i: len(lines[i]))
    out = np.empty((len(lines), WIDTH), np.float32)
    began = time.monotonic()
    for start in range(0, len(order), 64):
        some = order[start : start + 64]
        found = tokenizer.encode_batch([lines[i] for i in some])
        width = max(len(e.ids) for e in found)
        ids = np.zeros((len(some), width), np.int64)
        mask = np.zeros((len(some), width), np.int64)
        for row, e in enumerate(found):
            ids[row, : len(e.ids)] = e.ids
            mask[row, : len(e.ids)] = 1
        out[some] = session.run(None, {"input_ids": ids, "attention_mask": mask})[0]
        if start // 64 % 20 == 0:
            rate = (start + 64) / (time.monotonic() - began)
            print(f"embedded {start + len(some)} of {len(lines)}, {rate:.0f}/s", file=sys.stderr)
    return out / np.linalg.norm(out, axis=1, keepdims=True)


def real() -> tuple[Floats, Floats]:
    """(points, queries) that are embeddings of sentences."""
    path = FOLDER / "real.npy"
    if not path.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        np.save(path, embed(sentences(data_folder())))
    vectors = np.load(path)
    order = np.random.default_rng(7).permutation(len(vectors))
    return vectors[order[QUERIES:]], vectors[order[:QUERIES]]


def drawn(count: int, base: Floats, seed: int = 1) -> Floats:
    """Vectors [count, 384] drawn like the real ones, as the module says."""
    import faiss

    near = faiss.knn(base, base, NEIGHBOURS + 1, metric=faiss.METRIC_INNER_PRODUCT)[1][:, 1:]
    random = np.random.default_rng(seed)
    some = random.integers(0, len(base), 20_000)
    differences = base[near[some, random.integers(0, NEIGHBOURS, len(some))]] - base[some]
    root = np.linalg.cholesky(np.cov(differences.T) + 1e-7 * np.eye(WIDTH)).astype(np.float32)
    out = np.empty((count, WIDTH), np.float32)
    for start in range(0, count, 50_000):
        n = min(50_000, count - start)
        i = random.integers(0, len(base), n)
        j = near[i, random.integers(0, NEIGHBOURS, n)]
        part = random.random((n, 1), np.float32)
        noise = random.standard_normal((n, WIDTH), np.float32) @ root.T
        rows = base[i] + part * (base[j] - base[i]) + np.float32(NOISE) * noise
        out[start : start + n] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return out


def points(count: int) -> tuple[Floats, Floats, int]:
    """(points [count, 384], queries [2000, 384], how many points are real): all real ones first."""
    base, queries = real()
    if count <= len(base):
        return base[:count], queries, count
    path = FOLDER / f"points_{count}.npy"
    if not path.exists():
        np.save(path, np.concatenate([base, drawn(count - len(base), base)]))
    return np.load(path, mmap_mode="r"), queries, len(base)


def truth(data: Floats, queries: Floats, name: str, k: int = 10) -> Any:
    """The true nearest [q, k] by inner product; kept by name, "" = not kept."""
    import faiss

    path = FOLDER / f"truth_{name}.npy"
    if name and path.exists():
        return np.load(path)
    best: list[tuple[Any, Any]] = []
    for start in range(0, len(data), 100_000):
        rows = np.ascontiguousarray(data[start : start + 100_000])
        scores, at = faiss.knn(queries, rows, k, metric=faiss.METRIC_INNER_PRODUCT)
        best.append((scores, at + start))
    scores = np.concatenate([b[0] for b in best], axis=1)
    at = np.concatenate([b[1] for b in best], axis=1)
    out = np.take_along_axis(at, np.argsort(-scores, axis=1, kind="stable")[:, :k], 1)
    if name:
        np.save(path, out)
    return out


def difficulty() -> dict[str, dict[int, float]]:
    """recall@10 of HNSW (M 16) by ef, among real vectors and among as many drawn ones."""
    import faiss

    base, queries = real()
    n = len(base)
    out: dict[str, dict[int, float]] = {}
    for name, rows in (("real", base), ("drawn", drawn(n, base, seed=5))):
        best = truth(rows, queries, "")
        index = faiss.IndexHNSWFlat(WIDTH, 16, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = 100
        index.add(rows)
        out[name] = {}
        for ef in (16, 32, 64, 128):
            params = faiss.SearchParametersHNSW(efSearch=ef)
            found = index.search(queries, 10, params=params)[1]
            same = [len(set(f) & set(t)) / 10 for f, t in zip(found.tolist(), best.tolist(), strict=True)]  # fmt: skip
            out[name][ef] = float(np.mean(same))
    return out


def main() -> None:
    """Make and keep them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--points", type=int, default=1_000_000)
    parser.add_argument("--difficulty", action="store_true")
    args = parser.parse_args()
    data, queries, own = points(args.points)
    print(f"{len(data)} points, {own} of them real, {len(queries)} queries")
    if args.difficulty:
        print(json.dumps(difficulty(), indent=1))


if __name__ == "__main__":
    main()
