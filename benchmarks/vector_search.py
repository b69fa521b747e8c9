"""Dense search through gRPC against bare FAISS, and filtered search, at one size.

    python -m benchmarks.vector_search [--points 100000] [--callers 64]

Vectors are drawn around 1,000 centres (384 dimensions); bare FAISS is the same kind of index with the
same ef, searched in batches of as many queries as there are callers.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import faiss
import grpc
import numpy as np
from forebay.v1 import collection_pb2 as pb
from forebay.v1 import collection_pb2_grpc
from google.protobuf import json_format

from benchmarks.common import RESULTS, machine
from benchmarks.load import grpc_load
from benchmarks.retrieval_server import running

WIDTH, QUERIES, EF = 384, 500, 64


def vectors(count: int, seed: int) -> np.ndarray:
    """Unit vectors around centres that are the same for every seed."""
    centres = np.random.default_rng(0).normal(size=(1000, WIDTH)).astype(np.float32)
    random = np.random.default_rng(seed)
    out = np.empty((count, WIDTH), np.float32)
    for start in range(0, count, 50_000):
        n = min(50_000, count - start)
        noise = random.normal(size=(n, WIDTH)).astype(np.float32)
        out[start : start + n] = centres[random.integers(0, 1000, n)] + noise
    return out / np.linalg.norm(out, axis=1, keepdims=True)


def recall(found: list[list[int]], truth: np.ndarray) -> float:
    """Share of the true 10 that were found."""
    return float(np.mean([len(set(f) & set(t.tolist())) / 10 for f, t in zip(found, truth, strict=True)]))  # fmt: skip


def search(stub, query: np.ndarray, condition: dict | None = None, **extra) -> list[int]:
    """Ids of one search."""
    request = pb.SearchRequest(collection="bench", vector=query.tolist(), **extra)
    request.with_payload = False
    if condition:
        json_format.ParseDict(condition, request.filter)
    return [int(h.id) for h in stub.Search(request).hits]


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--points", type=int, default=100_000)
    parser.add_argument("--callers", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=8.0)
    args = parser.parse_args()
    data, queries = vectors(args.points, 1), vectors(QUERIES, 2)
    truth = faiss.knn(queries, data, 10, metric=faiss.METRIC_INNER_PRODUCT)[1]
    out: dict[str, object] = {"machine": machine(), "points": args.points, "callers": args.callers}
    with tempfile.TemporaryDirectory() as home, running(Path(home), "") as (channel, _):
        stub = collection_pb2_grpc.CollectionServiceStub(channel)
        create = pb.CreateCollectionRequest(collection="bench", config={"dimensions": WIDTH})
        stub.CreateCollection(create)

        def messages():
            yield pb.UpsertStreamRequest(header={"collection": "bench"})
            for start in range(0, args.points, 1000):
                part = pb.UpsertStreamRequest()
                for i in range(start, min(args.points, start + 1000)):
                    point = part.points.points.add(id=str(i), vector=data[i].tolist())
                    point.payload.update({"n": i % 100})
                yield part

        began = time.monotonic()
        stub.UpsertStream(messages())
        out["upsert_points_per_s"] = args.points / (time.monotonic() - began)
        get = pb.GetCollectionRequest(collection="bench")
        while (info := stub.GetCollection(get).collection).indexed_points < 0.9 * args.points:
            time.sleep(1)
        out["built_after_s"] = time.monotonic() - began
        out["memory_mb"] = info.memory_bytes / 2**20
        out["recall@10"] = recall([search(stub, q) for q in queries], truth)
        for share in (1, 10, 50):
            chosen = np.flatnonzero(np.arange(args.points) % 100 < share)
            best = faiss.knn(queries, data[chosen], 10, metric=faiss.METRIC_INNER_PRODUCT)[1]
            condition = {"range": {"key": "n", "lt": share}}
            times = time.monotonic()
            found = [search(stub, q, condition) for q in queries]
            out[f"filtered {share}%"] = {
                "recall@10": recall(found, chosen[best]),
                "ms": (time.monotonic() - times) / QUERIES * 1e3,
            }
        port = int(grpc_port(channel))
        bodies = [
            {"collection": "bench", "vector": q.tolist(), "limit": 10, "with_payload": False}
            for q in queries
        ]
        load = grpc_load(
            port, "forebay.v1.CollectionService/Search", bodies, args.callers, args.seconds
        )
        out["grpc"] = {"rps": load.rps, "p50_ms": load.p50_ms, "p99_ms": load.p99_ms}
    index = faiss.IndexHNSWFlat(WIDTH, 16, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = 100
    began = time.monotonic()
    index.add(data)
    out["bare_build_s"] = time.monotonic() - began
    index.hnsw.efSearch = EF
    done, began = 0, time.monotonic()
    while time.monotonic() - began < args.seconds:
        start = done % (QUERIES - args.callers)
        index.search(queries[start : start + args.callers], 10)
        done += args.callers
    out["bare_qps"] = done / (time.monotonic() - began)
    out["bare_recall@10"] = recall(index.search(queries, 10)[1].tolist(), truth)
    text = json.dumps(out, indent=1)
    (RESULTS / f"vector_search_{args.points}.json").write_text(text + "\n")
    print(text)


def grpc_port(channel: grpc.Channel) -> str:
    """The port that a channel was opened to."""
    return channel._channel.target().decode().rpartition(":")[2]  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
