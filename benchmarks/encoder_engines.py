"""Engines and precisions for MiniLM on this CPU: speed beside ONNX Runtime fp32, quality on SciFact.

    python -m benchmarks.encoder_engines speed [--rounds 5]     # and served
    python -m benchmarks.encoder_engines served [--rounds 3]
    python -m benchmarks.encoder_engines quality [NAME ...]

Speed: every candidate in turn within each round; figures are medians, ratios are of the same round.
Quality: nDCG@10 of the 300 test queries over 5,183 abstracts, exact search; needs the data folder.
Served: `forebay up` with the starter as it is made, through gRPC by ghz with 64 callers and with one,
beside the bare ONNX Runtime fp32 loop in the same rounds.
All add to benchmarks/results/encoder_engines.{json,md,png}.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from forebay_exporters import quantize, scifact
from forebay_exporters.tune import Loaded, items, throughput
from forebay_server.core.interfaces import Batch
from forebay_server.repository.manifest import ModelConfig, read_config

from benchmarks import common
from benchmarks.load import Load, grpc_load

EMBED = "forebay.v1.EmbeddingService/Embed"
KEPT = common.RESULTS / "encoder_engines.json"
SHAPES = ((1, 20), (32, 20), (8, 128))
LAYERS = range(6)
FFN = [f"l{i}.{which}" for i in LAYERS for which in ("wide", "narrow")]
#: ONNX Runtime's int8 variants: nodes that stay fp32. All are per channel, with VNNI where it is.
LEFT_OUT = {
    "all": [],
    "narrow out": [n for n in FFN if n.endswith("narrow")],
    "feed-forward out": FFN,
    "attention out": [f"l{i}.attention" for i in LAYERS],
}
REFERENCE = "onnxruntime fp32"


def candidates(folder: Path, scratch: Path) -> dict[str, Callable[[], Loaded]]:
    """Name -> loads it. The int8 files of ONNX Runtime are made in `scratch` when they are needed."""

    def served(**config: Any) -> Callable[[], Loaded]:
        return lambda: Loaded(folder, ModelConfig(**config))

    def openvino(precision: str, **more: Any) -> Callable[[], Loaded]:
        return served(engine="openvino", engine_options={"precision": precision, **more})

    def quantised(name: str) -> Callable[[], Loaded]:
        def load() -> Loaded:
            path = scratch / f"{name.replace(' ', '_')}.onnx"
            if not path.exists():
                quantize.int8_dynamic(folder / "model.onnx", path, LEFT_OUT[name])
            return Loaded(folder, ModelConfig(engine="onnxruntime"), path)

        return load

    return {
        REFERENCE: served(engine="onnxruntime"),
        **{f"onnxruntime int8, {n}": quantised(n) for n in LEFT_OUT},
        "openvino fp32": openvino("fp32"),
        "openvino bf16": openvino("bf16"),
        "openvino int8, groups of 32": openvino("int8", group_size=32),
        "openvino int8, groups of 64": openvino("int8", group_size=64),
    }


@contextmanager
def all_candidates():
    """The candidates, with a scratch folder that goes away."""
    with tempfile.TemporaryDirectory() as scratch:
        yield candidates(common.starters() / "minilm" / "1", Path(scratch))


def cpu_seconds(loaded: Loaded, rows: int, length: int, seconds: float) -> float:
    """CPU seconds of a batch, all threads: what other work on the machine changes little."""
    engine = loaded.engines[0]
    batch = Batch(items([length] * rows), length, rows)
    inputs = engine.prepare(batch)
    runs, start, spent = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - start < seconds or runs < 2:
        engine.finish(engine.execute(inputs), batch)
        runs += 1
    return (time.process_time() - spent) / runs


def speed(rounds: int, seconds: float) -> dict[str, Any]:
    """Texts a second by shape: medians, and the median ratio to the reference of the same round."""
    out: dict[str, Any] = {}
    with all_candidates() as makers:
        engines = {name: make() for name, make in makers.items()}
        for rows, length in SHAPES:
            rates: dict[str, list[float]] = {name: [] for name in engines}
            costs: dict[str, list[float]] = {name: [] for name in engines}
            for _ in range(rounds):
                for name, engine in engines.items():
                    rates[name].append(throughput(engine, rows, length, seconds))
                    costs[name].append(cpu_seconds(engine, rows, length, seconds) / rows)
            for name, values in rates.items():
                ratio = np.median(np.array(values) / np.array(rates[REFERENCE]))
                saved = np.median(np.array(costs[REFERENCE]) / np.array(costs[name]))
                out.setdefault(name, {})[f"{rows}x{length}"] = {
                    "texts_s": round(float(np.median(values)), 1),
                    "ratio": float(ratio),
                    "cpu_ms_a_text": round(float(np.median(costs[name])) * 1e3, 3),
                    "cpu_ratio": float(saved),
                }
    return out


def quality(names: list[str]) -> dict[str, Any]:
    """nDCG@10, and the cosine of each query's vector with the reference's."""
    data = common.ROOT.parent / "shared" / "data" / "retrieval" / "scifact"
    corpus = scifact.read(data)
    out: dict[str, Any] = {}
    with all_candidates() as makers:
        original = makers[REFERENCE]().embed(list(corpus.queries.values()))
        for name in names or makers:
            engine = makers[name]()
            began = time.monotonic()
            found = scifact.score(engine.embed, corpus)
            cosine = (engine.embed(list(corpus.queries.values())) * original).sum(axis=1)
            out[name] = {
                **found,
                "min_cosine": float(cosine.min()),
                "mean_cosine": float(cosine.mean()),
                "seconds": round(time.monotonic() - began, 1),
            }
            print(name, out[name], flush=True)
            keep("quality", {name: out[name]})
            engine.close()
    return out


def served(rounds: int, seconds: float) -> dict[str, Any]:
    """The default profile through gRPC, in ratios to the bare fp32 loop: medians over rounds."""
    short = [{"texts": [common.text_of(20, i)]} for i in range(64)]
    lengths = common.mixed_lengths(256)
    mixed = [{"texts": [common.text_of(n, i)]} for i, n in enumerate(lengths)]
    folder = common.starters() / "minilm" / "1"
    bare = Loaded(folder, ModelConfig(engine="onnxruntime"))
    own = Loaded(folder, read_config(folder.parent / "model.yaml"))
    series: dict[str, list[float]] = {}

    def add(name: str, value: float) -> float:
        series.setdefault(name, []).append(value)
        return value

    def naive() -> float:
        """Texts a second of the bare loop on mixed lengths: batches of 32 as they come."""
        done, start = 0, time.perf_counter()
        work = items(lengths)
        while time.perf_counter() - start < seconds:
            bare.run([work[(done + i) % len(work)] for i in range(32)])
            done += 32
        series.setdefault("naive_texts", []).append(done)
        return done / (time.perf_counter() - start)

    def load(name: str, requests: list[Any]) -> Load:
        """ghz with 64 callers; keeps the CPU milliseconds a text of server and generator."""
        before = _children()
        got = grpc_load(port, EMBED, requests, 64, seconds)
        after = _children()
        for part in before:
            add(f"{name}_{part}_cpu_ms", (after[part] - before[part]) / got.calls * 1e3)
        return got

    with common.serving() as (port, _):
        for requests in (short, mixed, mixed):
            grpc_load(port, EMBED, requests, 64, seconds)
        for _ in range(rounds):
            limit = add("bare_32x20", throughput(bare, 32, 20, seconds / 2))
            cost = add("bare_20_cpu_ms", cpu_seconds(bare, 32, 20, seconds / 4) / 32 * 1e3)
            grpc = load("grpc_20", short)
            both = series["grpc_20_server_cpu_ms"][-1] + series["grpc_20_generator_cpu_ms"][-1]
            add("grpc_20_cpu_ratio", cost / both)
            limit = (limit + add("bare_32x20", throughput(bare, 32, 20, seconds / 2))) / 2
            add("grpc_20", grpc.rps)
            add("grpc_20_p50_ms", grpc.p50_ms)
            add("grpc_20_p99_ms", grpc.p99_ms)
            add("grpc_20_ratio", grpc.rps / limit)
            engine = add("engine_32x20", throughput(own, 32, 20, seconds / 2))
            add("grpc_20_of_own_engine", grpc.rps / engine)
            spent = time.process_time()
            fifo = add("bare_mixed", naive())
            fifo_cost = (time.process_time() - spent) / series["naive_texts"][-1] * 1e3
            spread = add("grpc_mixed", load("grpc_mixed", mixed).rps)
            add("grpc_mixed_ratio", spread / fifo)
            both = (
                series["grpc_mixed_server_cpu_ms"][-1] + series["grpc_mixed_generator_cpu_ms"][-1]
            )
            add("bare_mixed_cpu_ms", fifo_cost)
            add("grpc_mixed_cpu_ratio", fifo_cost / both)
            one = add("one_bare_ms", 1e3 / throughput(own, 1, 20, seconds / 2))
            lone = add("one_grpc_ms", grpc_load(port, EMBED, short[:1], 1, seconds / 2).p50_ms)
            add("one_over_bare_ms", lone - one)
            add("one_bare_fp32_ms", 1e3 / throughput(bare, 1, 20, seconds / 2))
    return {
        name: {
            "median": round(float(np.median(values)), 3),
            "least": round(min(values), 3),
            "most": round(max(values), 3),
        }
        for name, values in series.items()
    }


def _children() -> dict[str, float]:
    """CPU seconds so far of the server's processes, and of generators that have ended."""
    alive = psutil.Process().children(recursive=True)
    times = [p.cpu_times() for p in alive]
    ended = os.times()
    return {
        "server": sum(t.user + t.system for t in times),
        "generator": ended.children_user + ended.children_system,
    }


def keep(part: str, figures: dict[str, Any]) -> None:
    """Add to what was measured before, and write table and plot."""
    result: dict[str, Any] = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    result["machine"] = common.machine()
    result.setdefault(part, {}).update(figures)
    result.setdefault("load_average", {})[part] = round(os.getloadavg()[0], 1)
    common.RESULTS.mkdir(parents=True, exist_ok=True)
    KEPT.write_text(json.dumps(result, indent=1) + "\n")
    KEPT.with_suffix(".md").write_text(page(result))
    plot(result)


def page(result: dict[str, Any]) -> str:
    """The results as a page."""
    fast, good = result.get("speed", {}), result.get("quality", {})
    shapes = [f"{r}x{n}" for r, n in SHAPES]
    lines = [
        "# Engines and precisions for MiniLM",
        "",
        f"{result['machine']}. `python -m benchmarks.encoder_engines speed`, `... quality`.",
        "Texts a second at batch x tokens, the bare engine in a loop; in brackets the ratio to ONNX",
        "Runtime fp32 of the same round, then the ratio of CPU time a text, which other work on the",
        "machine changes less. Quality on SciFact: 300 queries, 5,183 abstracts, exact search.",
        "",
        f"Load average at the end of each part (about 2 on a machine of one's own): "
        f"{result.get('load_average', {})}.",
        "",
        f"| engine | {' | '.join(shapes)} | least cosine | nDCG@10 | change |",
        "|---|" + "---|" * (len(shapes) + 3),
    ]
    before = good.get(REFERENCE, {}).get("ndcg@10")
    for name in dict.fromkeys([*fast, *good]):
        cells = [
            f"{f['texts_s']:.0f} ({f['ratio']:.2f}; {f['cpu_ratio']:.2f})"
            if (f := fast.get(name, {}).get(s))
            else "-"
            for s in shapes
        ]
        q = good.get(name)
        cells += [f"{q['min_cosine']:.4f}", f"{q['ndcg@10']:.4f}"] if q else ["-", "-"]
        cells += [f"{q['ndcg@10'] / before - 1:+.2%}" if q and before else "-"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    through = {n: f["median"] for n, f in result.get("served", {}).items()}
    if through:
        lines += [
            "",
            "## The default profile through gRPC",
            "",
            "Server and load generator on the same cores. Mixed: 5-256 tokens, uniform; the bare loop",
            "takes them 32 at a time as they come.",
            "",
            "| | bare fp32 loop | through gRPC | ratio | by CPU time, with the generator's |",
            "|---|---|---|---|---|",
            f"| 64 callers, 20 tokens, texts/s | {through['bare_32x20']:.0f} "
            f"| {through['grpc_20']:.0f} | {through['grpc_20_ratio']:.2f} "
            f"| {through['grpc_20_cpu_ratio']:.2f} |",
            f"| 64 callers, mixed lengths, texts/s | {through['bare_mixed']:.0f} "
            f"| {through['grpc_mixed']:.0f} | {through['grpc_mixed_ratio']:.2f} "
            f"| {through['grpc_mixed_cpu_ratio']:.2f} |",
            f"| one caller, 20 tokens, ms | {through['one_bare_fp32_ms']:.2f} "
            f"| {through['one_grpc_ms']:.2f} "
            f"| {through['one_grpc_ms'] / through['one_bare_fp32_ms']:.2f} | |",
            "",
            f"Of the bare engine of its own precision, 20 tokens: "
            f"{through['grpc_20_of_own_engine']:.2f}; one caller "
            f"{through['one_over_bare_ms']:+.2f} ms.",
        ]
    return "\n".join(lines) + "\n"


def plot(result: dict[str, Any]) -> None:
    """Quality against speed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 5))
    for name, q in result.get("quality", {}).items():
        if name in result.get("speed", {}):
            x = result["speed"][name]["32x20"]["cpu_ratio"]
            axis.scatter(x, q["ndcg@10"], color="#a5703b" if "openvino" in name else "#3b6ea5")
            axis.annotate(
                name, (x, q["ndcg@10"]), fontsize=7, xytext=(4, 4), textcoords="offset points"
            )
    axis.set_xlabel("texts a CPU second at 32 x 20 tokens, ONNX Runtime fp32 = 1")
    axis.set_ylabel("nDCG@10 on SciFact")
    figure.tight_layout()
    figure.savefig(KEPT.with_suffix(".png"), dpi=110)
    plt.close(figure)


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("speed", "quality", "served"))
    parser.add_argument("names", nargs="*")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, help="of each measurement: 0.3, served 4")
    arguments = parser.parse_args()
    if arguments.what == "quality":
        quality(arguments.names)
    if arguments.what == "speed":
        keep("speed", speed(arguments.rounds, arguments.seconds or 0.3))
    if arguments.what in ("speed", "served"):
        keep("served", served(arguments.rounds, max(2.5, arguments.seconds or 4.0)))
    print(KEPT.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
