"""Soak: hours of mixed traffic in minutes, and whether anything grows or is answered wrongly.

    python -m benchmarks.soak [--minutes 20] [--keep]

On the fast lane: tabular (by Python, and by the lane itself), embed, classify, rerank, ModelInfer and vector search, in Poisson arrivals
with ten seconds of bursts each minute; downloads, which are server streams; and predictions by HTTP. A
share of the calls is taken back; some connections are dropped in the middle of calls, some read so slowly
that the server has to wait. Every answer is checked against its own request. The server's proportional memory, descriptors, threads, asyncio tasks and Python
objects are sampled, before, during and after. With --keep it writes benchmarks/results/soak.{json,md,png}.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from forebay.v1 import collection_pb2 as pb
from forebay.v1 import collection_pb2_grpc

from benchmarks import common
from benchmarks.openloop import Workload, path, run, text, workloads
from benchmarks.openloop.live import Served, serve
from benchmarks.peers.models import forest
from benchmarks.soak_traffic import Requests, Streams

EVERY_S = 5.0
DIMENSIONS = 64
POINTS = 500
CONNECTIONS = {
    "main": {"count": 6},
    "shaky": {"count": 4, "drop_every_s": 4.0},
    "slow": {"count": 2, "read_bytes_per_s": 60_000, "window": 65535, "stream_window": 65535},
}
#: Calls a second, connection, share that is taken back.
TRAFFIC = [
    ("tabular", 300, "main", 0.02),
    ("tabular", 60, "shaky", 0.0),
    ("trees", 300, "main", 0.02),
    ("trees", 60, "shaky", 0.0),
    ("infer", 100, "main", 0.02),
    ("search", 40, "main", 0.02),
    ("classify", 20, "main", 0.05),
    ("embed", 15, "main", 0.05),
    ("embed", 5, "shaky", 0.05),
    ("rerank", 4, "main", 0.1),
    ("rerank", 2, "shaky", 0.0),
    ("embed_many", 0.3, "shaky", 0.0),
    ("embed_many", 0.8, "slow", 0.2),
]
#: Ends that the client itself brought about, and refusals: no fault of the server's.
ALLOWED = {"OK", "TAKEN_BACK", "CONNECTION_DROPPED", "RESOURCE_EXHAUSTED"}
#: What may differ between the second fifth and the last one: MB, descriptors, threads, tasks.
BOUNDS = {"pss_mb": 5.0, "descriptors": 3.0, "threads": 2.0, "tasks": 3.0}


def search(server: Served) -> Workload:
    """A collection of random vectors; each call searches by one of them, which must come first."""
    rng = np.random.default_rng(11)
    vectors = rng.normal(size=(POINTS, DIMENSIONS)).astype(np.float32)
    with grpc.insecure_channel(server.target) as channel:
        stub = collection_pb2_grpc.CollectionServiceStub(channel)
        request = pb.CreateCollectionRequest(collection="soak")
        request.config.dimensions = DIMENSIONS
        stub.CreateCollection(request)
        points = [pb.Point(id=f"p{i}", vector=v) for i, v in enumerate(vectors)]
        stub.UpsertPoints(pb.UpsertPointsRequest(collection="soak", points=points))
    out = Workload("search", "forebay.v1.CollectionService/Search")
    at = path(pb.SearchResponse, "hits.id")
    for i in range(0, POINTS, 5):
        found = pb.SearchRequest(collection="soak", vector=vectors[i], limit=5)
        out.add(found, [text(at, f"p{i}")])
    return out


def spec_of(server: Served, models: Path, minutes: int, scale: float) -> dict[str, Any]:
    """The whole run."""
    made = {n: f(models) for n, f in workloads.ALL.items() if n != "forest"}
    made["trees"] = workloads.trees(models)
    made["search"] = search(server)
    rate = scale * sum(t[1] for t in TRAFFIC)
    bursts = {"rate": rate, "arrivals": "onoff", "on_s": 0.2, "off_s": 0.6}
    return {
        "rate": rate,
        "target": server.target,
        "connections": CONNECTIONS,
        "workloads": [
            {
                **made[name].spec(
                    weight=weight,
                    connection=connection,
                    cancel_share=cancelled,
                    cancel_after_ms=8,
                    deadline_ms=60_000,
                ),
                "name": f"{name} {connection}",
            }
            for name, weight, connection, cancelled in TRAFFIC
        ],
        "phases": [
            phase
            for minute in range(minutes)
            for phase in (
                {"name": f"poisson {minute}", "seconds": 50, "rate": rate},
                {"name": f"bursts {minute}", "seconds": 10, **bursts},
            )
        ],
        "interval_ms": 5000,
        "seed": 17,
    }


class Sampler:
    """What the server's process holds, as the system sees it."""

    def __init__(self, server: Served) -> None:
        self._server = server
        self._done = threading.Event()
        self._begin = time.monotonic()
        self.samples: list[dict[str, float]] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def sample(self) -> dict[str, float]:
        """Now."""
        s = self._server
        return {
            "at_s": round(time.monotonic() - self._begin, 1),
            "pss_mb": s.pss_mb(),
            "descriptors": s.descriptors(),
            "threads": s.threads(),
        }

    def stop(self) -> None:
        """No more."""
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._done.wait(EVERY_S):
            self.samples.append(self.sample())


def slope(at: list[float], values: list[float]) -> float:
    """Median of the slopes of pairs (Theil and Sen), per hour."""
    t, v = np.array(at), np.array(values)
    i, j = np.triu_indices(len(t), 1)
    return float(np.median((v[j] - v[i]) / (t[j] - t[i]))) * 3600


def growth(samples: list[dict[str, float]], key: str) -> dict[str, float]:
    """How a series moved after its first fifth, when caches and pools have filled."""
    known = [s for s in samples if key in s]
    steady = known[len(known) // 5 :]
    at, values = [s["at_s"] for s in steady], [float(s[key]) for s in steady]
    part = max(1, len(values) // 4)
    return {
        "first": round(float(np.median(values[:part])), 2),
        "last": round(float(np.median(values[-part:])), 2),
        "most": round(max(values), 2),
        "per_hour": round(slope(at, values), 2),
    }


def judge(result: dict[str, Any]) -> list[str]:
    """What is not as it should be."""
    faults = []
    for key, bound in BOUNDS.items():
        g = result["growth"][key]
        if g["last"] - g["first"] > bound:
            faults.append(f"{key} grew from {g['first']} to {g['last']}")
    if result["wrong"]:
        faults.append(f"{result['wrong']} wrong answers")
    odd = {k: v for k, v in result["codes"].items() if k not in ALLOWED}
    if odd:
        faults.append(f"calls ended as {odd}")
    if result["client"]["unended"]:
        faults.append(f"{result['client']['unended']} calls never ended")
    before, after = result["before"], result["after"]
    for key in ("descriptors", "tasks", "connections"):
        if after[key] > before[key] + 3:
            faults.append(f"{key} were {before[key]} before and {after[key]} after the load")
    for key in ("waiting_calls", "held_bytes"):
        if after[key]:
            faults.append(f"{key} is {after[key]} after the load")
    return faults


def measure(minutes: int, scale: float) -> dict[str, Any]:
    """Load, samples, verdict."""
    with common.exact_starters() as models, tempfile.TemporaryDirectory() as folder:
        shutil.copytree(forest().parent, models / "forest", copy_function=os.link)
        inside = Path(folder, "inside.ndjson")
        command = (sys.executable, "-m", "benchmarks.soak_server", str(inside))
        http = {"FOREBAY_HTTP_PORT": "0", "FOREBAY_HTTP__GATEWAY": f"{folder}/none.sock"}
        with serve(models, command=command, FOREBAY_GRPC__LANE="fast", **http) as server:
            spec = spec_of(server, models, minutes, scale)
            # Models load at their first call, pools fill, and arenas with the first batch of full size:
            # that is no growth.
            bursts = {"arrivals": "onoff", "on_s": 0.2, "off_s": 0.6}
            warm = {"name": "warm", "seconds": 40, "rate": 1.5 * spec["rate"], **bursts}
            run({**spec, "phases": [warm]})
            time.sleep(3 * EVERY_S)
            before = {**_last(inside), "descriptors": server.descriptors()}
            streams = Streams(server)
            requests = Requests(server, int(before["http_port"]))
            sampler = Sampler(server)
            out = run(spec)
            sampler.stop()
            streams.stop()
            requests.stop()
            time.sleep(3 * EVERY_S)
            after = {**_last(inside), "descriptors": server.descriptors()}
            own = [json.loads(line) for line in inside.read_text().splitlines()]
            cpu = server.cpu_seconds()
    codes: dict[str, int] = {}
    calls: dict[str, dict[str, float]] = {}
    for phase in out["phases"]:
        for code, n in phase["codes"].items():
            codes[code] = codes.get(code, 0) + n
        for name, w in phase["workloads"].items():
            mine = calls.setdefault(name, {"offered": 0, "ok": 0, "wrong": 0})
            for key in mine:
                mine[key] += w[key]
    calls["downloads (streams)"] = streams.calls
    calls["predictions by HTTP"] = requests.calls
    inner = [s for s in own if before["at_s"] <= s["at_s"] < after["at_s"] - 3 * EVERY_S]
    result: dict[str, Any] = {
        "machine": common.machine(),
        "minutes": minutes,
        "codes": codes,
        "calls": calls,
        "wrong": out["wrong"] + streams.calls["wrong"] + requests.calls["wrong"],
        "said": out.get("samples", []),
        "client": out["client"],
        "before": before,
        "after": after,
        "server_cpu_s": round(cpu, 1),
        "growth": {
            **{k: growth(sampler.samples, k) for k in ("pss_mb", "descriptors", "threads")},
            **{k: growth(inner, k) for k in ("tasks", "objects")},
        },
        "samples": sampler.samples,
        "own": inner,
        "timeline": out["timeline"],
    }
    result["faults"] = judge(result)
    return result


def _last(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text().splitlines()[-1])


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    verdict = "; ".join(result["faults"]) or "nothing grew, no answer was wrong"
    lines = [
        f"# Soak: {result['minutes']} minutes of mixed traffic",
        "",
        f"{result['machine']}; fast lane; beside other work on the same cores. "
        "`python -m benchmarks.soak --keep`",
        "",
        f"Verdict: {verdict}.",
        "",
        "| calls | sent | answered | wrong |",
        "|---|---|---|---|",
        *(
            f"| {name} | {c['offered']} | {c['ok']} | {c['wrong']} |"
            for name, c in result["calls"].items()
        ),
        "",
        f"Ends: {', '.join(f'{k} {v}' for k, v in sorted(result['codes'].items()))}. "
        f"Connections opened: {result['client']['connections_opened']}.",
        "",
        "| | after a fifth of the time | at the end | most | slope per hour |",
        "|---|---|---|---|---|",
        *(
            f"| {key} | {g['first']:g} | {g['last']:g} | {g['most']:g} | {g['per_hour']:g} |"
            for key, g in result["growth"].items()
        ),
        "",
    ]
    return "\n".join(lines)


def plot(result: dict[str, Any], target: Path) -> None:
    """Memory, descriptors, tasks and calls over time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 6))
    outer = [s["at_s"] / 60 for s in result["samples"]]
    inner = [(s["at_s"] - result["before"]["at_s"]) / 60 for s in result["own"]]
    axes[0][0].plot(outer, [s["pss_mb"] for s in result["samples"]])
    axes[0][0].set_title("memory (PSS), MB")
    axes[0][0].set_ylim(0)
    for key in ("descriptors", "threads"):
        axes[0][1].plot(outer, [s[key] for s in result["samples"]], label=key)
    for key in ("tasks", "connections"):
        axes[0][1].plot(inner, [s[key] for s in result["own"]], label=key)
    axes[0][1].legend(fontsize=7)
    axes[1][0].plot(inner, [s["objects"] for s in result["own"]])
    axes[1][0].set_title("Python objects")
    axes[1][0].set_ylim(0)
    at = [b["at_s"] / 60 for b in result["timeline"]]
    axes[1][1].plot(at, [b["ok"] / 5 for b in result["timeline"]], label="answered, calls/s")
    axes[1][1].plot(at, [b["other"] / 5 for b in result["timeline"]], label="taken back or dropped")
    axes[1][1].legend(fontsize=7)
    for axis in axes.flat:
        axis.set_xlabel("minutes")
    figure.tight_layout()
    figure.savefig(target, dpi=80)


def main() -> None:
    """Measure, print, keep. The exit status says whether all is well."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=int, default=20)
    parser.add_argument("--scale", type=float, default=1.0, help="of the traffic")
    parser.add_argument("--keep", action="store_true")
    args = parser.parse_args()
    result = measure(args.minutes, args.scale)
    print(table(result))
    print(result["said"], result["before"], result["after"])
    if args.keep:
        (common.RESULTS / "soak.md").write_text(table(result))
        plot(result, common.RESULTS / "soak.png")
        for series in ("samples", "own", "timeline"):
            del result[series]
        (common.RESULTS / "soak.json").write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(1 if result["faults"] else 0)


if __name__ == "__main__":
    main()
