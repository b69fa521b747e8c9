"""Vector search through gRPC: 1 million vectors of 384 dimensions, beside bare FAISS and beside peers.

    python -m benchmarks.vector_search                     # all: about an hour on 2 cores
    python -m benchmarks.vector_search --points 100000 --kinds hnsw
    python -m benchmarks.vector_search --part load --kinds hnsw      # and so on, in pieces
    python -m benchmarks.vector_search --part peers

Parts: `load` streams the points to a server of its own and waits until its index is built (kept in
.forebay/vectors, so that it is done once); `search` opens it again and measures; `peers` runs other
libraries on the first 100,000 points, each in an environment of its own under .forebay/peers (made by
`python -m benchmarks.peers.vector_peers --install`).

Bare FAISS reads the very file that the server has built: recall at equal parameters is equal by
construction. It searches in batches as large as the server's are on average, by as many threads of
one each as there are cores, or in one batch of all callers by all cores, whichever is faster.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
from forebay.twin.v1 import collection_pb2 as twin
from forebay.v1 import collection_pb2 as pb
from forebay.v1 import collection_pb2_grpc
from google.protobuf import json_format
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks import vector_data
from benchmarks.common import RESULTS, ROOT, machine, median
from benchmarks.load import frames_load

SEARCH = "forebay.v1.CollectionService/Search"
#: Queries of the recall of filtered and of flat search; others take all.
FEW = 300
TARGET = 0.95
KINDS = {"hnsw": "INDEX_TYPE_HNSW", "flat": "INDEX_TYPE_FLAT", "ivf_pq": "INDEX_TYPE_IVF_PQ"}
#: What makes a search look further, by kind; the least that reaches TARGET is measured.
STEPS = {"hnsw": (64, 96, 128, 192, 256, 384, 512, 768), "ivf_pq": (16, 32, 64, 128)}
HUGE = 2 << 20
FIELD = {"hnsw": "ef_search", "ivf_pq": "probes"}


class Server:
    """A server of this repository with collections in a folder that stays."""

    def __init__(self, home: Path) -> None:
        from forebay_cli.up import free_port

        self.home, self.port, metrics = home, free_port(), free_port()
        home.mkdir(parents=True, exist_ok=True)
        environ = {
            **os.environ,
            "FOREBAY_HOME": str(home),
            "FOREBAY_GRPC_PORT": str(self.port),
            "FOREBAY_MODELS__STARTERS": "false",
            "FOREBAY_OBSERVABILITY__METRICS_PORT": str(metrics),
        }
        with (home / "log").open("ab") as log:
            command = [sys.executable, "-m", "forebay_cli", "serve"]
            self.process = subprocess.Popen(command, env=environ, stderr=log, stdout=log)
        self.metrics = f"http://127.0.0.1:{metrics}/metrics"
        options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self.port}", options)
        self.stub = collection_pb2_grpc.CollectionServiceStub(self.channel)
        check = health_pb2_grpc.HealthStub(self.channel).Check
        began = time.monotonic()
        while True:
            try:
                if check(health_pb2.HealthCheckRequest(), timeout=5).status == 1:
                    break
            except grpc.RpcError:
                pass  # it does not listen yet
            assert self.process.poll() is None and time.monotonic() - began < 300
            time.sleep(0.05)
        self.started_s = time.monotonic() - began

    @property
    def memory(self) -> dict[str, float]:
        """Megabytes resident, now and at most."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        most = int(re.search(r"VmHWM:\s+(\d+)", status)[1])  # type: ignore[index]
        now = psutil.Process(self.process.pid).memory_info().rss
        return {"rss_mb": now / 2**20, "peak_mb": most / 2**10}

    @property
    def cpu_s(self) -> float:
        """Processor time that it has taken."""
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system

    def info(self) -> pb.Collection:
        """The collection's facts."""
        return self.stub.GetCollection(pb.GetCollectionRequest(collection="bench")).collection

    def batches(self) -> tuple[float, float]:
        """(batches, searches) so far, by its metrics."""
        import urllib.request

        text = urllib.request.urlopen(self.metrics).read().decode()
        found = [
            re.search(rf'forebay_batch_rows_{x}{{model="collections".*?}} (\S+)', text)
            for x in ("count", "sum")
        ]
        return tuple(float(f[1]) if f else 0.0 for f in found)  # type: ignore[return-value]

    def close(self) -> None:
        """Stop; the index is saved."""
        self.channel.close()
        self.process.terminate()
        self.process.wait(300)


@contextmanager
def serving(home: Path) -> Iterator[Server]:
    """A server for some time."""
    server = Server(home)
    try:
        yield server
    finally:
        server.close()


def home_of(kind: str, points: int) -> Path:
    """Where a loaded server's state is kept."""
    return vector_data.FOLDER / f"home_{kind}_{points}"


def recall(found: list[list[int]], truth: Any) -> float:
    """Share of the true 10 that were found."""
    same = [len(set(f) & set(t.tolist())) / 10 for f, t in zip(found, truth, strict=True)]
    return float(np.mean(same))


# Loading.


def load_points(kind: str, data: Any) -> dict[str, Any]:
    """Stream all points to an empty server; returns when its index is built."""
    with serving(home_of(kind, len(data))) as server:
        create = pb.CreateCollectionRequest(collection="bench")
        config = {"dimensions": vector_data.WIDTH, "index": {"type": KINDS[kind]}}
        json_format.ParseDict(config, create.config)
        server.stub.CreateCollection(create)
        upsert = server.channel.stream_unary(
            "/forebay.v1.CollectionService/UpsertStream",
            request_serializer=twin.UpsertStreamRequest.SerializeToString,
            response_deserializer=pb.UpsertStreamResponse.FromString,
        )

        def messages() -> Iterator[twin.UpsertStreamRequest]:
            yield twin.UpsertStreamRequest(header=pb.UpsertHeader(collection="bench"))
            for start in range(0, len(data), 1000):
                part = twin.UpsertStreamRequest()
                for i, row in enumerate(np.asarray(data[start : start + 1000]), start):
                    point = part.points.points.add(id=str(i), vector=row.tobytes())
                    point.payload.update({"n": i % 100, "title": f"Point number {i}"})
                yield part

        began = time.monotonic()
        upsert(messages())
        written = time.monotonic() - began
        while server.info().indexed_points < 0.999 * len(data):
            time.sleep(0.5)
        built = time.monotonic() - began
        out = {
            "upsert_points_per_s": len(data) / written,
            "built_after_s": built,
            **server.memory,
            "index_mb": server.info().memory_bytes / 2**20,
        }
        began = time.monotonic()
    return {**out, "saved_in_s": time.monotonic() - began}


# Searching.


def stream(server: Server, queries: Any, condition: dict | None = None, **extra: Any) -> Any:
    """(ids found, searches a second) of one SearchStream."""
    call = server.channel.unary_stream(
        "/forebay.v1.CollectionService/SearchStream",
        request_serializer=twin.SearchStreamRequest.SerializeToString,
        response_deserializer=pb.SearchStreamResponse.FromString,
    )
    request = twin.SearchStreamRequest()
    for q in queries:
        one = request.requests.add(
            collection="bench", vector=q.tobytes(), limit=10, with_payload=False, **extra
        )
        if condition:
            json_format.ParseDict(condition, one.filter)
    found: list[list[int]] = [[]] * len(queries)
    began = time.monotonic()
    for answer in call(request):
        found[answer.index] = [int(h.id) for h in answer.response.hits]
    return found, len(queries) / (time.monotonic() - began)


def bare(
    index: Any, queries: Any, params: Any, batch: int, callers: int, seconds: float
) -> tuple[dict[str, float], float]:
    """Searches a second of FAISS alone in two ways to use the cores, and the least processor time,
    in microseconds, that one took."""
    import faiss

    out: dict[str, float] = {}
    least = 1e9
    cores = os.cpu_count() or 1
    for way, threads, size, each in (
        ("a thread a core", cores, batch, 1),
        ("one batch", 1, callers, cores),
    ):
        done = [0] * threads
        until = time.monotonic() + seconds / 2

        def run(t: int, size=size, each=each, done=done, until=until) -> None:
            faiss.omp_set_num_threads(each)
            at = t * 37
            while time.monotonic() < until:
                at = (at + size) % (len(queries) - size)
                index.search(queries[at : at + size], 10, params=params)
                done[t] += size

        began, cpu = time.monotonic(), time.process_time()
        workers = [threading.Thread(target=run, args=(t,)) for t in range(threads)]
        for w in workers:
            w.start()
        for w in workers:
            w.join()
        out[way] = sum(done) / (time.monotonic() - began)
        least = min(least, (time.process_time() - cpu) / max(1, sum(done)) * 1e6)
    return out, least


def large_pages(index: Any) -> None:
    """Move the vectors and links of a flat or HNSW index to pages of 2 MB, where there are such."""
    import faiss

    storage = faiss.downcast_index(index.storage) if hasattr(index, "storage") else index
    if not hasattr(storage, "get_xb"):
        return
    areas = [(int(storage.get_xb()), storage.ntotal * storage.d * 4)]
    if hasattr(index, "hnsw"):
        links = index.hnsw.neighbors
        areas.append((int(links.data()), links.size() * 4))
    libc = ctypes.CDLL(None)
    for start, size in areas:
        first, last = -(-start // HUGE) * HUGE, (start + size) // HUGE * HUGE
        for advice in (14, 25):  # MADV_HUGEPAGE, MADV_COLLAPSE (linux/mman.h)
            libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(max(0, last - first)), advice)


def measure(kind: str, data: Any, queries: Any, truth: Any, args: Any) -> dict[str, Any]:
    """All figures of one kind of index."""
    import faiss

    few = slice(0, FEW if kind == "flat" else len(queries))
    out: dict[str, Any] = {}
    with serving(home_of(kind, len(data))) as server:
        out["started_s"] = server.started_s
        began = time.monotonic()
        while server.info().indexed_points < 0.99 * len(data):  # what a load cut off has left
            time.sleep(1)
        out["waited_s"] = time.monotonic() - began
        out["memory"] = server.memory
        extra: dict[str, Any] = {}
        if kind in STEPS:
            curve = out["recall_by"] = {}
            for step in STEPS[kind]:
                extra = {FIELD[kind]: step}
                curve[step] = recall(stream(server, queries, **extra)[0], truth)
                if curve[step] >= TARGET:
                    break
            out[FIELD[kind]] = extra[FIELD[kind]]
        found, _ = stream(server, queries[few], **extra)
        out["recall@10"] = recall(found, truth[few])
        if kind == "hnsw":
            out["filtered"] = filtered(server, data, queries[:FEW], extra)
        folder = next((server.home / "collections").glob("*/index"))
        index = faiss.read_index(str(folder / "dense.built"))
        params = {
            # As the server has it, which is faster than FAISS's default.
            "hnsw": lambda s: faiss.SearchParametersHNSW(efSearch=s, bounded_queue=False),
            "ivf_pq": lambda s: faiss.SearchParametersIVF(nprobe=s),
            "flat": lambda s: None,
        }[kind](out.get(FIELD.get(kind, "")))
        same = index.search(queries[few], 10, params=params)[1]
        out["bare_recall@10"] = recall(same.tolist(), truth[few])
        out["rounds"] = [one_round(server, index, params, queries, extra, args) for _ in range(args.rounds)]  # fmt: skip
        # The server has its memory in large pages (docs/adr/0027), other programs have not.
        batch, callers = max(1, round(out["rounds"][-1]["batch"])), args.callers
        large_pages(index)
        again = [bare(index, queries, params, batch, callers, args.seconds) for _ in range(args.rounds)]  # fmt: skip
        out["bare_large_pages_rps"] = median([max(ways.values()) for ways, _ in again])
    for name in (
        "rps",
        "p50_ms",
        "p99_ms",
        "bare_rps",
        "ratio",
        "payload_rps",
        "cpu_us",
        "bare_cpu_us",
        "cpu_ratio",
        "batch",
    ):
        out[name] = median([r[name] for r in out["rounds"]])
    return out


def one_round(
    server: Server, index: Any, params: Any, queries: Any, extra: dict[str, Any], args: Any
) -> dict[str, float]:
    """One turn of each: the server without and with payloads, then FAISS."""
    chosen = queries[:500]
    body = {"collection": "bench", "limit": 10, **extra}
    plain = [
        json_format.ParseDict(
            {**body, "vector": q.tolist(), "with_payload": False}, pb.SearchRequest()
        )
        for q in chosen
    ]
    before, cpu, at = server.batches(), server.cpu_s, machine_time()
    begun = resource.getrusage(resource.RUSAGE_CHILDREN)
    served = frames_load(server.port, SEARCH, plain, args.callers, args.seconds)
    done = resource.getrusage(resource.RUSAGE_CHILDREN)
    mine = server.cpu_s - cpu + done.ru_utime + done.ru_stime - begun.ru_utime - begun.ru_stime
    wall, busy = (b - a for a, b in zip(at, machine_time(), strict=True))
    after = server.batches()
    batch = (after[1] - before[1]) / max(1, after[0] - before[0])
    cpu = (server.cpu_s - cpu) / max(1, after[1] - before[1]) * 1e6
    whole = [
        json_format.ParseDict({**body, "vector": q.tolist()}, pb.SearchRequest()) for q in chosen
    ]
    with_payload = frames_load(server.port, SEARCH, whole, args.callers, args.seconds / 2)
    alone, bare_cpu = bare(index, queries, params, max(1, round(batch)), args.callers, args.seconds)
    best = max(alone.values())
    return {
        "rps": served.rps,
        "p50_ms": served.p50_ms,
        "p99_ms": served.p99_ms,
        "batch": batch,
        "cpu_us": cpu,
        "generator_cores": (mine - (server_cpu := cpu * (after[1] - before[1]) / 1e6)) / wall,
        "server_cores": server_cpu / wall,
        "others_cores": (busy - mine) / wall,
        "bare_cpu_us": bare_cpu,
        "cpu_ratio": bare_cpu / cpu,
        "payload_rps": with_payload.rps,
        "bare_rps": best,
        "ratio": served.rps / best,
        **{f"bare {k}": v for k, v in alone.items()},
    }


def machine_time() -> tuple[float, float]:
    """(seconds now, processor seconds that all programs have taken)."""
    t = psutil.cpu_times()
    return time.monotonic(), sum(t) - t.idle - t.iowait - t.guest - t.guest_nice


def filtered(server: Server, data: Any, queries: Any, extra: dict[str, Any]) -> dict[str, Any]:
    """Recall and speed where 1, 10 and 50 of 100 points match."""
    out = {}
    for share in (1, 10, 50):
        chosen = np.flatnonzero(np.arange(len(data)) % 100 < share)
        name = f"{len(data)}_{share}pc_{len(queries)}"
        best = vector_data.truth(np.asarray(data[chosen]), queries, name)
        condition = {"range": {"key": "n", "lt": share}}
        found, rate = stream(server, queries, condition, **extra)
        out[f"{share}%"] = {"recall@10": recall(found, chosen[best]), "searches_per_s": rate}
    return out


def main() -> None:
    """Measure, keep, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--points", type=int, default=1_000_000)
    parser.add_argument("--kinds", default="hnsw,flat,ivf_pq")
    parser.add_argument(
        "--part", default="all", choices=["all", "load", "search", "peers", "write"]
    )
    parser.add_argument("--callers", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    kept = RESULTS / "vector_search.json"
    results: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}

    def keep(section: str, name: str, value: Any) -> None:
        results.setdefault(section, {})[name] = value
        results["machine"] = machine()
        kept.write_text(json.dumps(results, indent=1) + "\n")
        print(json.dumps({name: value}, indent=1), flush=True)

    section = str(args.points)
    data, queries, real = vector_data.points(args.points)
    results.setdefault(section, {})["real_points"] = real
    for kind in args.kinds.split(","):
        loaded = (home_of(kind, args.points) / "collections").exists()
        if args.part == "load" or (args.part == "all" and not loaded):
            keep(section, f"load {kind}", load_points(kind, data))
        if args.part in ("all", "search"):
            truth = vector_data.truth(data, queries, section)
            keep(section, kind, measure(kind, data, queries, truth, args))
    if args.part in ("all", "peers"):
        from benchmarks.peers import vector_peers

        for name, value in vector_peers.run():
            keep("peers", name, value)
    if args.part in ("all", "peers", "write"):
        from benchmarks.vector_report import write

        write(results, RESULTS)


if __name__ == "__main__":
    os.chdir(ROOT)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that servers are stopped too
    main()
