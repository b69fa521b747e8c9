"""A cost model from a running server: short closed loops, and what its answers say of their time."""

from __future__ import annotations

import itertools
import random
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
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
#: Calls tell what they take beside the engine while the machine has time for their callers too.
FEW = 4
#: Requests of a loop, written before it begins: callers that write them take the server's cores.
REQUESTS = 32
#: Callers that take more of a core than this are what bounds the rate, and not the server.
MOST_CLIENT = 0.4
#: Tables are fitted by calls of so many rows, and of a share of them: what a row adds shows between.
FEWER_ROWS = 8
Make = Callable[[random.Random], Any]


@dataclass(frozen=True, slots=True)
class _Loop:
    """Latencies with their answers, the seconds that they came in, and how much of a core their
    callers took."""

    answers: list[tuple[float, bytes]]
    seconds: float
    client_share: float


@dataclass(frozen=True, slots=True)
class Fitted:
    """What a live fit found. `lengths`: tokens by requested length, special tokens included."""

    model: Any  # forebay_server.capacity.cost.CostModel
    lengths: dict[int, int]


def fit_live(
    channel: grpc.Channel,
    metadata: Sequence[tuple[str, str]],
    name: str,
    lengths: Sequence[int],
    seconds: float = 1.5,
    rows: int = 1,
    instances: int = 1,
    most: int = 512,
) -> Fitted:
    """Fit `name` on a running server.

    Args:
        lengths: tokens of the texts, special tokens included; one loop each.
        seconds: of each loop.
        rows: rows of a tabular call.
        instances: engines that the server has for the model.
        most: rows that a batch takes there. A call of more rides in several batches, and its answer adds
            their times up: what it costs is fitted by calls of one of its parts.

    Raises:
        grpc.RpcError: a call failed.
        ValueError: the model's task is not one of those that are batched, or a batch takes fewer rows.
    """
    from forebay_server.capacity.cost import Sample, fit
    from forebay_server.capacity.simulation import Call

    alone: set[Sample] = set()
    beside: set[Sample] = set()  # with as many others as there are instances
    overheads: dict[int, list[float]] = {}
    between: list[float] = []  # two batches of an engine that always has work
    seen: dict[int, int] = {}
    part = Call.of_table(rows, most)
    method, makes, answer = _calls(channel, metadata, name, lengths, part.rows)
    table = method.endswith("Predict")
    call = channel.unary_unary(method)
    requests = {n: _written(make, n) for n, make in makes.items()}
    # Lengths in turn: a slow spell of the machine must not pass for one of them.
    for callers, length in itertools.product(CALLERS, makes):
        loop = _loop(call, metadata, requests[length], callers, seconds)
        batches: set[Sample] = set()
        for took, data in loop.answers:
            reply = answer.FromString(data)
            timing, usage = reply.timing, reply.usage
            if table and timing.batch_rows < length:
                raise ValueError(
                    f"{length} rows of {name} are more than one batch takes there: say with "
                    "--max-batch-size how many it takes"
                )
            tokens = round(usage.tokens / max(1, usage.items)) if usage.tokens else 1
            seen[length] = tokens
            compute = timing.compute_ms / 1e3
            if compute > 0:
                # Every call of a batch tells of it: a set counts the batch once.
                batches.add(Sample(timing.batch_rows, tokens, compute))
                if callers <= FEW:
                    beyond = took - compute - timing.queue_ms / 1e3
                    overheads.setdefault(length, []).append(max(0.0, beyond))
        (alone if callers < max(2, instances) else beside).update(batches)
        busy = callers == CALLERS[-1] and batches and loop.client_share < MOST_CLIENT
        if busy and not (table and length < part.rows):
            cycle = loop.seconds * instances / len(batches)
            between.append(max(0.0, cycle - statistics.mean(b.seconds for b in batches)))
    contention = _contention(alone, beside, instances)
    share = 1 / (1 + contention * (instances - 1))
    samples = [*alone, *(replace(s, seconds=s.seconds * share) for s in beside)]
    source: dict[str, object] = {"model": name, "kind": "running server"}
    source["items"] = "rows" if table else "texts"
    row_s = _row_s(overheads) if table else 0.0
    rest = [max(0.0, s - row_s * n) for n, each in overheads.items() for s in each]
    between_s = statistics.median(between) if between else 0.0
    model = replace(fit(samples, rest, source), contention=contention, between_s=between_s)
    return Fitted(replace(model, call_s=model.call_s + (row_s * rows if table else 0.0)), seen)


def _written(make: Make, seed: int) -> list[bytes]:
    rng = random.Random(seed)
    return [make(rng).SerializeToString() for _ in range(REQUESTS)]


def _row_s(overheads: Mapping[int, Sequence[float]]) -> float:
    """What a row adds to what a table's call takes beside the engine: the interpreter reads it."""
    small, large = min(overheads), max(overheads)
    if large == small:
        return 0.0
    middle = [statistics.median(overheads[n]) for n in (small, large)]
    return max(0.0, middle[1] - middle[0]) / (large - small)


def _contention(alone: set[Any], beside: set[Any], instances: int) -> float:
    """By batches of the sizes that ran both ways."""
    if instances == 1:
        return 0.0
    found = []
    for shape in {(s.rows, s.length) for s in alone}:
        ways = [[s.seconds for s in x if (s.rows, s.length) == shape] for x in (alone, beside)]
        if all(ways):
            found.append(statistics.median(ways[1]) / statistics.median(ways[0]) - 1)
    return max(0.0, statistics.median(found) if found else 0.0) / (instances - 1)


def _loop(
    call: Any,
    metadata: Sequence[tuple[str, str]],
    requests: Sequence[bytes],
    callers: int,
    seconds: float,
) -> _Loop:
    """Calls of so many callers, one after the other each. Threads: gRPC's own machinery waits without
    Python, so they disturb the server little."""
    out: list[tuple[float, bytes]] = []
    faults: list[BaseException] = []
    begin = time.perf_counter()
    until = begin + seconds
    warm = begin + seconds / 5

    def run(first: int) -> None:
        mine = itertools.islice(itertools.cycle(requests), first % len(requests), None)
        try:
            while (before := time.perf_counter()) < until:
                reply = call(next(mine), metadata=metadata, timeout=30)
                if before > warm:
                    out.append((time.perf_counter() - before, reply))
        except BaseException as e:
            faults.append(e)

    cpu = time.process_time()
    threads = [threading.Thread(target=run, args=(i,)) for i in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if faults:
        raise faults[0]
    share = (time.process_time() - cpu) / (time.perf_counter() - begin)
    return _Loop(out, until - warm, share)


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
        make = _rows(channel, metadata, name)
        sizes = sorted({max(1, rows // FEWER_ROWS), rows})
        return (
            "/forebay.v1.TabularService/Predict",
            {n: partial(make, n) for n in sizes},
            tabular_pb2.PredictResponse,
        )
    raise ValueError(
        f"{name} is a {task} model; embedding, classification and tabular can be fitted"
    )


def _rows(
    channel: grpc.Channel, metadata: Sequence[tuple[str, str]], name: str
) -> Callable[[int, random.Random], Any]:
    """Makes requests of so many rows, of random values within the signature's ranges."""
    from forebay.v1 import tabular_pb2 as pb
    from forebay.v1 import tabular_pb2_grpc

    stub = tabular_pb2_grpc.TabularServiceStub(channel)
    features = stub.GetSignature(
        pb.GetSignatureRequest(model=name), metadata=metadata, timeout=30
    ).features

    def make(rows: int, rng: random.Random) -> pb.PredictRequest:
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
