"""Which batch policy a model should have on this machine: each is run, by the server's own queue and
engines, under closed loops of callers. The transport is left out: it does not depend on the policy.
"""

from __future__ import annotations

import os
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from forebay_server.capacity.fitting import item_of, newest
from forebay_server.core.batcher import QUICK_S, BatchingEngineClient, hop_s
from forebay_server.core.interfaces import BatchPolicy, Engine, EngineRequest, EngineSpec, Item
from forebay_server.engines.factory import open_all
from forebay_server.repository import loading
from forebay_server.repository.inspect import describe
from forebay_server.repository.manifest import TEXT_TASKS, Manifest, read_config

#: Throughputs this near each other are one: the lower latency decides.
ALIKE = 0.03
#: A lone caller may wait this much longer than with the candidate that is best for it: a delay that
#: fills batches under full load must not be paid for by everybody else.
ALONE = 1.25


@dataclass(frozen=True, slots=True)
class Candidate:
    """What is tried: instances, threads of each (and of a run without others beside it, 0 = the same),
    and how batches are cut."""

    instances: int
    threads: int
    policy: BatchPolicy
    lone_threads: int = 0


@dataclass(frozen=True, slots=True)
class Point:
    """A candidate under so many callers: calls a second, latencies in seconds, rows of a batch."""

    candidate: Candidate
    callers: int
    per_s: float
    p50_s: float
    p99_s: float
    batch_rows: float


def candidates(spec: EngineSpec, longest: int) -> list[Candidate]:
    """All that is tried on this machine, the present one first."""
    cores = os.cpu_count() or 1
    splits = sorted({(1, cores), (1, 1), (cores, 1)} | ({(2, cores // 2)} if cores >= 4 else set()))
    policy = spec.policy
    policies = [policy]
    if spec.kind == "tokens":
        policies += [replace(policy, max_padding_tokens=n) for n in (0, 12, 64, 4096)]
    for delay in (0.0, 0.002):
        if spec.kind == "tokens":
            for tokens in (256, 512, 1024, 2048, 4096):
                if tokens >= longest:
                    rows = max(policy.max_batch_size, tokens // max(1, longest))
                    policies.append(
                        replace(
                            policy,
                            max_batch_tokens=tokens,
                            max_batch_size=min(128, rows),
                            max_queue_delay_s=delay,
                        )
                    )
        else:
            for rows in (16, 64, 256, 1024):
                policies.append(replace(policy, max_batch_size=rows, max_queue_delay_s=delay))
    own = Candidate(spec.instances, spec.intra_op_threads or cores, policy, spec.lone_threads)
    wide = cores if spec.kind == "tokens" and spec.engine == "onnxruntime" else 0
    every = [own]
    for i, t in splits:
        lone = wide if i > 1 and spec.isolation == "thread" else 0
        every += [Candidate(i, t, p, lone) for p in dict.fromkeys(policies)]
    return list(dict.fromkeys(every))


def sweep(
    folder: Path,
    lengths: Sequence[int],
    callers: Sequence[int] = (1, 8, 64),
    seconds: float = 1.5,
    rows: int = 1,
    progress: Callable[[Point], None] = lambda point: None,
) -> list[Point]:
    """Measure all candidates of a model folder.

    Args:
        lengths: tokens of the texts, drawn from evenly.
        seconds: of each point.
        rows: rows of a tabular call.

    Raises:
        FailedPrecondition: the model cannot be loaded; says why.
    """
    version, path = newest(folder)
    manifest = describe(path)
    tokenizer = loading.tokenizer_of(path, manifest) if manifest.task in TEXT_TASKS else None
    spec = loading.engine_spec(
        folder.name,
        version,
        path,
        manifest,
        read_config(folder / "model.yaml"),
        loading.Defaults(),
        tokenizer,
    )
    rng = np.random.default_rng(0)
    items = [item_of(spec, manifest, rng, rows, n) for n in lengths for _ in range(8)]
    rng.shuffle(items)
    out = []
    for (instances, threads, lone), group in _by_engines(candidates(spec, max(lengths))):
        engines = _engines(spec, manifest, instances, threads, lone)
        try:
            for candidate in group:
                for n in callers:
                    out.append(_measure(engines, candidate, items, n, seconds))
                    progress(out[-1])
        finally:
            for engine in engines:
                engine.close()
    return out


def recommended(points: Sequence[Point]) -> Candidate:
    """Of the candidates that keep a lone caller's latency, the one of the greatest throughput under
    the most callers; among those that are alike, the one whose calls wait least."""
    most = max(p.callers for p in points)
    alone = {p.candidate: p.p50_s for p in points if p.callers == 1}
    bound = ALONE * min(alone.values(), default=float("inf"))
    busy = [p for p in points if p.callers == most and alone.get(p.candidate, 0.0) <= bound]
    best = max(p.per_s for p in busy)
    near = [p for p in busy if p.per_s >= (1 - ALIKE) * best]
    return min(near, key=lambda p: p.p99_s + alone.get(p.candidate, 0.0)).candidate


def frontier(points: Sequence[Point]) -> list[Point]:
    """Points that no other one beats in both throughput and p99, by rising throughput."""
    out: list[Point] = []
    for p in sorted(points, key=lambda p: (-p.per_s, p.p99_s)):
        if not out or p.p99_s < out[-1].p99_s:
            out.append(p)
    return out[::-1]


def _by_engines(
    every: Sequence[Candidate],
) -> Iterator[tuple[tuple[int, int, int], list[Candidate]]]:
    groups: dict[tuple[int, int, int], list[Candidate]] = {}
    for one in every:
        groups.setdefault((one.instances, one.threads, one.lone_threads), []).append(one)
    yield from groups.items()


def _engines(
    spec: EngineSpec, manifest: Manifest, instances: int, threads: int, lone: int
) -> list[Engine]:
    spec = replace(spec, instances=instances, intra_op_threads=threads, lone_threads=lone)

    def load(engine: Engine) -> None:
        engine.load()
        engine.warmup(loading.WARMUP if manifest.task in TEXT_TASKS else ())

    return open_all(spec, load)


def _measure(
    engines: Sequence[Engine],
    candidate: Candidate,
    items: Sequence[Item],
    callers: int,
    seconds: float,
) -> Point:
    """A closed loop: each completion makes its caller's next request."""
    lent = [_Lent(e, candidate.policy) for e in engines]
    client = BatchingEngineClient(lent, hop_s=hop_s(len(lent)), here_s=QUICK_S)
    done: queue.SimpleQueue[float] = queue.SimpleQueue()
    latencies: list[float] = []
    sent = 0

    def send(now: float) -> None:
        nonlocal sent
        item = items[sent % len(items)]
        sent += 1
        (completion,) = client.submit([EngineRequest([item])])
        completion.add_done_callback(lambda c, at=now: done.put(at))

    begin = time.perf_counter()
    warm = begin + seconds / 4
    end = begin + seconds * 1.25
    for _ in range(callers):
        send(time.perf_counter())
    counted = 0
    while (now := time.perf_counter()) < end:
        at = done.get()
        now = time.perf_counter()
        if now > warm:
            counted += 1
            latencies.append(now - at)
        send(now)
    took = time.perf_counter() - warm
    stats = client.statistics
    mean = stats.rows / max(1, stats.batches)
    client.close(5.0)
    p50, p99 = np.quantile(latencies, [0.5, 0.99]) if latencies else (float("inf"),) * 2
    return Point(candidate, callers, counted / took, float(p50), float(p99), mean)


class _Lent:
    """An engine with a policy for a while: it lives on when the client that it is lent to ends."""

    def __init__(self, engine: Engine, policy: BatchPolicy) -> None:
        self.spec = replace(engine.spec, policy=policy)
        self.prepare = engine.prepare
        self.execute = engine.execute
        self.finish = engine.finish
        self.check_health = engine.check_health
        self.info = engine.info

    def load(self) -> None:
        """It is loaded."""

    def warmup(self, shapes: Sequence[tuple[int, int]]) -> None:
        """It is warm."""

    def close(self) -> None:
        """Its owner closes it."""
