"""One vector library on the same points; run by vector_peers in the library's own environment.

    PYTHON vector_peer.py NAME FOLDER SECONDS

FOLDER holds points.npy, queries.npy and truth.npy. Each library builds HNSW as Forebay does (16 links,
100 candidates while building) where it has it. Its search is made to look further until recall@10 is
0.95; then it searches for some seconds in each of several ways (one query a call by 1, 2 or 8 threads;
64 queries a call where it takes them), and the fastest counts. Prints JSON.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

TARGET = 0.95
EFS = (32, 48, 64, 96, 128, 192, 256, 384)


class Chroma:
    """HNSW by hnswlib, in process."""

    many = True

    def __init__(self, folder: Path, points: Any) -> None:
        import chromadb

        self._folder = str(folder)
        client = chromadb.PersistentClient(path=self._folder)
        hnsw = {"space": "cosine", "max_neighbors": 16, "ef_construction": 100, "ef_search": 64}
        self._table = client.create_collection("bench", configuration={"hnsw": hnsw})
        size = min(5000, client.get_max_batch_size())
        for start in range(0, len(points), size):
            rows = points[start : start + size]
            ids = [str(i) for i in range(start, start + len(rows))]
            self._table.add(ids=ids, embeddings=rows)

    steps = EFS

    def step(self, ef: int) -> None:
        import chromadb
        from chromadb.api.shared_system_client import SharedSystemClient

        self._table.modify(configuration={"hnsw": {"ef_search": ef}})
        SharedSystemClient.clear_system_cache()  # only a new client searches by what was modified
        self._table = chromadb.PersistentClient(path=self._folder).get_collection("bench")

    def search(self, queries: Any) -> list[list[int]]:
        found = self._table.query(query_embeddings=queries, n_results=10, include=[])
        return [[int(i) for i in row] for row in found["ids"]]


class QdrantLocal:
    """qdrant-client's local mode: all vectors compared in numpy."""

    many = False
    steps = (0,)

    def __init__(self, folder: Path, points: Any) -> None:
        from qdrant_client import QdrantClient, models

        self._models = models
        self._client = QdrantClient(":memory:")
        vectors = models.VectorParams(size=points.shape[1], distance=models.Distance.COSINE)
        self._client.create_collection("bench", vectors_config=vectors)
        for start in range(0, len(points), 5000):
            rows = points[start : start + 5000]
            ids = list(range(start, start + len(rows)))
            self._client.upsert("bench", models.Batch(ids=ids, vectors=rows.tolist()))

    def step(self, _: int) -> None:
        pass

    def search(self, queries: Any) -> list[list[int]]:
        return [
            [p.id for p in self._client.query_points("bench", query=q, limit=10).points]
            for q in queries
        ]


class Lance:
    """LanceDB, IVF_HNSW_SQ of one partition."""

    many = False
    steps = EFS

    def __init__(self, folder: Path, points: Any) -> None:
        import lancedb
        import pyarrow as pa

        vectors = pa.FixedSizeListArray.from_arrays(pa.array(points.reshape(-1)), points.shape[1])
        table = pa.table({"id": pa.array(np.arange(len(points))), "vector": vectors})
        self._table = lancedb.connect(str(folder)).create_table("bench", table)
        self._table.create_index(
            metric="cosine",
            index_type="IVF_HNSW_SQ",
            num_partitions=1,
            m=16,
            ef_construction=100,
        )
        self._ef = 64

    def step(self, ef: int) -> None:
        self._ef = ef

    def search(self, queries: Any) -> list[list[int]]:
        return [
            self._table.search(q)
            .distance_type("cosine")
            .nprobes(1)
            .ef(self._ef)
            .refine_factor(2)
            .limit(10)
            .select(["id"])
            .to_arrow()["id"]
            .to_pylist()
            for q in queries
        ]


class MilvusLite:
    """milvus-lite: HNSW where it has it, else IVF_FLAT."""

    many = True
    steps = EFS

    def __init__(self, folder: Path, points: Any) -> None:
        from pymilvus import MilvusClient

        folder.mkdir(parents=True)
        self._client = MilvusClient(str(folder / "milvus.db"))
        self.kind = ""
        self._client.create_collection(
            "bench", dimension=points.shape[1], metric_type="COSINE", auto_id=False
        )
        for start in range(0, len(points), 2000):
            rows = points[start : start + 2000]
            data = [{"id": start + i, "vector": v.tolist()} for i, v in enumerate(rows)]
            self._client.insert("bench", data)
        self._client.flush("bench")
        for kind, params in (
            ("HNSW", {"M": 16, "efConstruction": 100}),
            ("IVF_FLAT", {"nlist": 1024}),
        ):
            try:
                self._client.release_collection("bench")
                for name in self._client.list_indexes("bench"):
                    self._client.drop_index("bench", name)
                wanted = self._client.prepare_index_params()
                wanted.add_index("vector", index_type=kind, metric_type="COSINE", params=params)
                self._client.create_index("bench", wanted)
                self._client.load_collection("bench")
                self.kind = kind
                break
            except Exception as e:
                print(f"milvus-lite takes no {kind}: {e}"[:300], file=sys.stderr)
        self._params: dict[str, int] = {}

    def step(self, ef: int) -> None:
        self._params = {"ef": ef} if self.kind == "HNSW" else {"nprobe": ef // 8}

    def search(self, queries: Any) -> list[list[int]]:
        found = self._client.search(
            "bench", data=queries.tolist(), limit=10, search_params={"params": self._params}
        )
        return [[hit["id"] for hit in row] for row in found]


def recall(found: list[list[int]], truth: Any) -> float:
    same = [len(set(f) & set(t.tolist())) / 10 for f, t in zip(found, truth, strict=True)]
    return float(np.mean(same))


def rate(
    search: Callable[[Any], Any], queries: Any, threads: int, size: int, seconds: float
) -> float:
    """Queries a second of a closed loop."""
    done = [0] * threads
    until = time.monotonic() + seconds

    def run(t: int) -> None:
        at = t * 37
        while time.monotonic() < until:
            at = (at + size) % (len(queries) - size)
            search(queries[at : at + size])
            done[t] += size

    began = time.monotonic()
    workers = [threading.Thread(target=run, args=(t,)) for t in range(threads)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    return sum(done) / (time.monotonic() - began)


PEERS = {
    "chromadb": Chroma,
    "qdrant-client": QdrantLocal,
    "lancedb": Lance,
    "milvus-lite": MilvusLite,
}


def main() -> None:
    name, folder, seconds = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])
    points, queries = np.load(folder / "points.npy"), np.load(folder / "queries.npy")
    truth = np.load(folder / "truth.npy")
    began = time.monotonic()
    peer: Any = PEERS[name](folder / name, points)
    out: dict[str, Any] = {"built_s": time.monotonic() - began, "recall_by": {}}
    few = slice(0, 100 if name == "qdrant-client" else 500)
    for step in peer.steps:
        peer.step(step)
        found = [row for q in queries[few] for row in peer.search(q[None])]
        out["recall_by"][step] = out["recall@10"] = recall(found, truth[few])
        if out["recall@10"] >= TARGET:
            break
    out["step"] = step
    out["kind"] = getattr(peer, "kind", "")
    ways = {f"{t} threads": (t, 1) for t in (1, 2, 8)}
    if peer.many:
        ways["64 a call"] = (1, 64)
    out["ways"] = {w: rate(peer.search, queries, t, n, seconds) for w, (t, n) in ways.items()}
    out["rps"] = max(out["ways"].values())
    print(json.dumps(out))


if __name__ == "__main__":
    main()
