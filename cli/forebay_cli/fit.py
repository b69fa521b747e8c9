"""A cost model from a running server: short closed loops, and what its answers say of their time."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

#: Words that are one token each in nearly every vocabulary.
WORDS = [
    "the",
    "of",
    "a",
    "time",
    "water",
    "power",
    "house",
    "light",
    "stone",
    "field",
    "wind",
    "city",
    "paper",
    "night",
]
CALLERS = (1, 2, 4, 8, 16, 32, 64)
Make = Callable[[random.Random], Any]


@dataclass(frozen=True, slots=True)
class Fitted:
    """What a live fit found. `length`: tokens by requested length, special tokens included."""

    model: Any  # forebay_server.capacity.cost.CostModel
    lengths: dict[int, int]


def fit_live(
    channel: grpc.Channel,
    metadata: Sequence[tuple[str, str]],
    name: str,
    lengths: Sequence[int],
    seconds: float = 1.5,
    rows: int = 1,
) -> Fitted:
    """Fit `name` on a running server.

    Args:
        lengths: tokens of the texts, special tokens included; one loop each.
        seconds: of each loop.
        rows: rows of a tabular call.

    Raises:
        grpc.RpcError: a call failed.
        ValueError: the model's task is not one of those that are batched.
    """
    from forebay_server.capacity.cost import Sample, fit

    samples: list[Sample] = []
    overheads: list[float] = []
    seen: dict[int, int] = {}
    method, makes, answer = _calls(channel, metadata, name, lengths, rows)
    write: Callable[[Any], bytes] = lambda m: m.SerializeToString()  # noqa: E731
    call = channel.unary_unary(
        method, request_serializer=write, response_deserializer=answer.FromString
    )
    for length, make in makes.items():
        for callers in CALLERS:
            for took, reply in _loop(call, metadata, make, callers, seconds):
                timing, usage = reply.timing, reply.usage
                tokens = round(usage.tokens / max(1, usage.items)) if usage.tokens else 1
                seen[length] = tokens
                compute = timing.compute_ms / 1e3
                if compute > 0:
                    samples.append(Sample(timing.batch_rows, tokens, compute))
                    if callers in (2, 4, 8):
                        overheads.append(max(0.0, took - compute - timing.queue_ms / 1e3))
    # Every call of a batch tells of it: count the batch once.
    once = {(s.rows, s.length, s.seconds): s for s in samples}
    items = "rows" if method.endswith("Predict") else "texts"
    source: dict[str, object] = {"model": name, "kind": "running server", "items": items}
    return Fitted(fit(list(once.values()), overheads, source), seen)


def _loop(
    call: Any, metadata: Sequence[tuple[str, str]], make: Make, callers: int, seconds: float
) -> list[tuple[float, Any]]:
    """(latency, answer) of calls of so many callers, one after the other each. Threads: gRPC's own
    machinery waits without Python, so they disturb the server little."""
    out: list[tuple[float, Any]] = []
    faults: list[BaseException] = []
    begin = time.perf_counter()
    until = begin + seconds
    warm = begin + seconds / 5

    def run(seed: int) -> None:
        rng = random.Random(seed)
        try:
            while (before := time.perf_counter()) < until:
                reply = call(make(rng), metadata=metadata, timeout=30)
                if before > warm:
                    out.append((time.perf_counter() - before, reply))
        except BaseException as e:
            faults.append(e)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if faults:
        raise faults[0]
    return out


def _calls(
    channel: grpc.Channel,
    metadata: Sequence[tuple[str, str]],
    name: str,
    lengths: Sequence[int],
    rows: int,
) -> tuple[str, dict[int, Make], Any]:
    from forebay.v1 import classification_pb2, embedding_pb2, model_pb2, model_pb2_grpc, tabular_pb2

    stub = model_pb2_grpc.ModelServiceStub(channel)
    found = stub.GetModel(model_pb2.GetModelRequest(model=name), metadata=metadata, timeout=30)
    task = model_pb2.Task.Name(found.model.task).removeprefix("TASK_").lower().replace("_", "-")

    def text(length: int, rng: random.Random) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(max(1, length - 2)))

    if task == "embedding":

        def embed(n: int) -> Make:
            return lambda rng: embedding_pb2.EmbedRequest(model=name, texts=[text(n, rng)])

        makes = {n: embed(n) for n in lengths}
        return "/forebay.v1.EmbeddingService/Embed", makes, embedding_pb2.EmbedResponse
    if task == "text-classification":

        def classify(n: int) -> Make:
            return lambda rng: classification_pb2.ClassifyRequest(model=name, texts=[text(n, rng)])

        makes = {n: classify(n) for n in lengths}
        path = "/forebay.v1.ClassificationService/Classify"
        return path, makes, classification_pb2.ClassifyResponse
    if task in ("tabular-regression", "tabular-classification"):
        make = _rows(channel, metadata, name, rows)
        return "/forebay.v1.TabularService/Predict", {1: make}, tabular_pb2.PredictResponse
    raise ValueError(
        f"{name} is a {task} model; embedding, classification and tabular can be fitted"
    )


def _rows(channel: grpc.Channel, metadata: Sequence[tuple[str, str]], name: str, rows: int) -> Make:
    """Rows of random values within the signature's ranges."""
    from forebay.v1 import tabular_pb2 as pb
    from forebay.v1 import tabular_pb2_grpc

    stub = tabular_pb2_grpc.TabularServiceStub(channel)
    features = stub.GetSignature(
        pb.GetSignatureRequest(model=name), metadata=metadata, timeout=30
    ).features

    def make(rng: random.Random) -> pb.PredictRequest:
        request = pb.PredictRequest(model=name)
        for f in features:
            column = request.columns.add(name=f.name)
            if f.type == pb.FEATURE_TYPE_STRING:
                column.strings.extend(rng.choice(f.categories or ["a"]) for _ in range(rows))
            else:
                high = f.max if f.max > f.min else f.min + 1
                column.numbers.extend(rng.uniform(f.min, high) for _ in range(rows))
        return request

    return make
