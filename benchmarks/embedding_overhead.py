"""What each layer costs on embeddings: the bare model, + batcher, + gRPC, + gateway.

    python -m benchmarks.embedding_overhead [--seconds 6] [--rounds 3]

All layers are measured in turn within one run, so that the machine's drift hits them alike.
Writes benchmarks/results/embedding_overhead.{json,md,png}.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from forebay.v1.embedding_pb2 import EmbedRequest
from forebay_server.core.batcher import BatchingEngineClient
from forebay_server.core.completion import RequestCompletion
from forebay_server.core.interfaces import Batch, EngineRequest, Item, TokenInput
from forebay_server.core.queue import Cut, Entry, RequestQueue
from forebay_server.engines.onnx import OnnxEngine
from forebay_server.repository.inspect import describe
from forebay_server.repository.loading import Defaults, engine_spec
from forebay_server.repository.manifest import ModelConfig

from benchmarks import common
from benchmarks.load import frames_load, grpc_load, http_load

EMBED = "forebay.v1.EmbeddingService/Embed"


class FifoQueue(RequestQueue):
    """The naive batcher: the first items in line, padded to the longest, up to the batch's rows."""

    def push(self, completion: RequestCompletion, *_: Any) -> None:
        completion.waiting_rows = len(completion.request.items)
        self.waiting_rows += completion.waiting_rows
        line: list[Entry] = self.__dict__.setdefault("line", [])
        line.extend(Entry(completion, i, x) for i, x in enumerate(completion.request.items))

    def full_batch_waits(self) -> bool:
        return self.waiting_rows >= self.policy.max_batch_size

    def cut(self, *_: Any) -> Cut | None:
        line: list[Entry] = self.__dict__.setdefault("line", [])
        chosen, self.__dict__["line"] = line[:32], line[32:]
        if not chosen:
            return None
        for entry in chosen:
            entry.owner.waiting_rows -= 1
        self.waiting_rows -= len(chosen)
        longest = max(e.item.length for e in chosen)
        return Cut(Batch([e.item for e in chosen], longest, len(chosen)), chosen)


def engine() -> OnnxEngine:
    """MiniLM fp32 as the server loads it; alone, it runs on all cores."""
    folder = common.starters() / "minilm" / "1"
    from tokenizers import Tokenizer

    manifest = describe(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    spec = engine_spec("minilm", 1, folder, manifest, ModelConfig(), Defaults(), tokenizer)
    made = OnnxEngine(spec)
    made.load()
    made.warmup([(32, 20), (8, 64), (1, 256)])
    return made


def items(lengths: list[int]) -> list[Item]:
    """Token arrays of these lengths."""
    rng = np.random.default_rng(1)
    return [Item(TokenInput(rng.integers(1000, 20000, n)), n) for n in lengths]


def bare(model: OnnxEngine, seconds: float, rows: int, length: int) -> float:
    """Texts a second of session.run in a loop, one thread, fixed batches."""
    batch = Batch(items([length] * rows), length, rows)
    inputs = model.prepare(batch)
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        model.execute(inputs)
        done += rows
    return done / (time.perf_counter() - start)


def bare_latency(model: OnnxEngine, seconds: float) -> float:
    """Median milliseconds of one text of 20 tokens."""
    batch = Batch(items([20]), 20, 1)
    inputs = model.prepare(batch)
    times, start = [], time.perf_counter()
    while time.perf_counter() - start < seconds:
        before = time.perf_counter()
        model.finish(model.execute(inputs), batch)
        times.append(time.perf_counter() - before)
    return common.median(times) * 1e3


def closed_loop(client: Any, work: list[Item], callers: int, seconds: float) -> tuple[float, float]:
    """Texts a second and median milliseconds of callers that each wait for their answer."""
    until = time.perf_counter() + seconds
    times: list[float] = []
    lock = threading.Lock()

    def caller(start: int) -> None:
        at, mine = start, []
        while time.perf_counter() < until:
            done = threading.Event()
            before = time.perf_counter()
            (completion,) = client.submit([EngineRequest([work[at % len(work)]])])
            completion.add_done_callback(lambda _, d=done: d.set())
            done.wait()
            completion.result()
            after = time.perf_counter()
            if after <= until:  # what comes later is no part of the rate
                mine.append(after - before)
            at += callers
        with lock:
            times.extend(mine)

    with ThreadPoolExecutor(callers) as pool:
        list(pool.map(caller, range(callers)))
    return len(times) / seconds, common.median(times) * 1e3


def batcher(model: OnnxEngine, queue: type[RequestQueue] = RequestQueue) -> BatchingEngineClient:
    """The model's instances behind queue and batcher."""
    more = [model.share() for _ in range(model.spec.instances - 1)]
    client = BatchingEngineClient([model, *more])
    client._intake._queue = queue(model.spec.policy)
    return client


def measure(seconds: float, rounds: int) -> dict[str, Any]:
    """All figures, medians over rounds; ratios are medians of each round's ratio."""
    model = engine()
    short = [EmbedRequest(texts=[common.text_of(20, i)]) for i in range(64)]
    lengths = common.mixed_lengths(256)
    mixed = [EmbedRequest(texts=[common.text_of(n, i)]) for i, n in enumerate(lengths)]
    body = {"model": "minilm", "input": common.text_of(20, 0), "encoding_format": "base64"}
    series: dict[str, list[float]] = {}

    def keep(name: str, value: float) -> float:
        series.setdefault(name, []).append(value)
        return value

    aware = batcher(model)
    naive = batcher(engine(), FifoQueue)
    with (
        common.exact_starters() as root,
        common.serving(FOREBAY_MODELS__ROOT=str(root)) as (grpc_port, http_port),
    ):
        frames_load(grpc_port, EMBED, short, 64, 2)
        frames_load(grpc_port, EMBED, mixed, 64, 2)
        for _ in range(rounds):
            limit = keep("bare_32x20", bare(model, seconds, 32, 20))
            keep("batcher_20", (rate := closed_loop(aware, items([20] * 64), 64, seconds)[0]))
            keep("batcher_ratio", rate / limit)
            grpc = frames_load(grpc_port, EMBED, short, 64, seconds)
            keep("grpc_20", grpc.rps)
            keep("grpc_p50_ms", grpc.p50_ms)
            keep("grpc_p99_ms", grpc.p99_ms)
            again = bare(model, seconds / 2, 32, 20)
            keep("grpc_ratio", grpc.rps / ((limit + again) / 2))
            ghz = grpc_load(grpc_port, EMBED, short, 64, seconds)
            keep("ghz_20", ghz.rps)
            keep("ghz_ratio", ghz.rps / ((limit + again) / 2))
            http = http_load(http_port, "/v1/embeddings", [body], 64, seconds)
            keep("gateway_20", http.rps)
            keep("gateway_ratio", http.rps / ((limit + again) / 2))
            naive_rate = closed_loop(naive, items(lengths), 64, seconds)[0]
            aware_rate = closed_loop(aware, items(lengths), 64, seconds)[0]
            keep("mixed_fifo", naive_rate)
            keep("mixed_batcher", aware_rate)
            keep("mixed_ratio", aware_rate / naive_rate)
            keep("mixed_grpc", (m := frames_load(grpc_port, EMBED, mixed, 64, seconds).rps))
            keep("mixed_grpc_ratio", m / naive_rate)
            one = keep("one_bare_ms", bare_latency(model, seconds / 2))
            keep("one_batcher_ms", closed_loop(aware, items([20]), 1, seconds / 2)[1])
            lone = frames_load(grpc_port, EMBED, short[:1], 1, seconds / 2).p50_ms
            keep("one_grpc_ms", lone)
            keep("one_ghz_ms", grpc_load(grpc_port, EMBED, short[:1], 1, seconds / 2).p50_ms)
            keep("one_grpc_over_bare_ms", lone - one)
            keep(
                "one_gateway_ms",
                http_load(http_port, "/v1/embeddings", [body], 1, seconds / 2).p50_ms,
            )
    aware.close()
    naive.close()
    figures = {name: round(common.median(values), 3) for name, values in series.items()}
    spread = {n: [round(min(v), 3), round(max(v), 3)] for n, v in series.items()}
    return {"machine": common.machine(), "rounds": rounds, "median": figures, "spread": spread}


ROWS = (
    ("bare ONNX Runtime, 32 x 20 tokens", "bare_32x20", None, "one_bare_ms"),
    ("+ queue and batcher, 64 callers", "batcher_20", "batcher_ratio", "one_batcher_ms"),
    ("+ gRPC", "grpc_20", "grpc_ratio", "one_grpc_ms"),
    ("the same, load by ghz", "ghz_20", "ghz_ratio", "one_ghz_ms"),
    ("+ gateway, /v1/embeddings", "gateway_20", "gateway_ratio", "one_gateway_ms"),
)


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    m = result["median"]
    lines = [
        "# Overhead by layer: MiniLM fp32, texts of 20 tokens",
        "",
        f"{result['machine']}; medians of {result['rounds']} rounds, server and load on the same cores.",
        "Load of gRPC by prepared frames (benchmarks/openloop, 4 to 17 us of CPU a call), of HTTP by wrk.",
        "",
        "| layer | texts/s | ratio to bare | one caller, p50 ms |",
        "|---|---|---|---|",
    ]
    for label, rate, ratio, latency in ROWS:
        share = f"{m[ratio]:.2f}" if ratio else "1"
        lines.append(f"| {label} | {m[rate]:.0f} | {share} | {m[latency]:.2f} |")
    lines += [
        "",
        "Mixed lengths (5-256 tokens, uniform), 64 callers:",
        "",
        "| batcher | texts/s | ratio to naive FIFO |",
        "|---|---|---|",
        f"| naive FIFO, 32 rows, in process | {m['mixed_fifo']:.1f} | 1 |",
        f"| Forebay's, in process | {m['mixed_batcher']:.1f} | {m['mixed_ratio']:.2f} |",
        f"| Forebay's, through gRPC | {m['mixed_grpc']:.1f} | {m['mixed_grpc_ratio']:.2f} |",
        "",
    ]
    return "\n".join(lines)


def plot(result: dict[str, Any]) -> None:
    """Throughput and latency by layer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    m = result["median"]
    names = ["bare", "+ batcher", "+ gRPC", "by ghz", "+ gateway"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    left.bar(names, [m[r[1]] for r in ROWS], color="#3b6ea5")
    left.set_title("64 callers: texts/s")
    right.bar(names, [m[r[3]] for r in ROWS], color="#a5703b")
    right.set_title("one caller: p50 ms")
    figure.tight_layout()
    figure.savefig(common.RESULTS / "embedding_overhead.png", dpi=110)


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    common.RESULTS.mkdir(parents=True, exist_ok=True)
    result = measure(arguments.seconds, arguments.rounds)
    (common.RESULTS / "embedding_overhead.json").write_text(json.dumps(result, indent=2) + "\n")
    text = table(result)
    (common.RESULTS / "embedding_overhead.md").write_text(text)
    plot(result)
    print(text)


if __name__ == "__main__":
    main()
