"""`forebay export tune`: the quickest way to serve an encoder on this machine, by measurement.

Candidates are engines and precisions on the same artefact, then threads and instances, then length
buckets. All are measured in turn within each round, so that the machine's drift hits them alike, and
compared by their ratio to ONNX Runtime as the server's defaults run it. A candidate whose vectors
are too far from the original's is shown, and not taken. The winner is written into model.yaml.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from forebay_server.core.batcher import BatchingEngineClient
from forebay_server.core.interfaces import Batch, Engine, EngineRequest, Item, TokenInput
from forebay_server.engines.factory import open_all
from forebay_server.repository.inspect import describe
from forebay_server.repository.loading import Defaults, engine_spec
from forebay_server.repository.manifest import TEXT_TASKS, ModelConfig, read_config
from numpy.typing import NDArray

from forebay_exporters import scifact
from forebay_exporters.artefact import ExportError

#: Least mean and least single cosine with the original that a candidate may have.
MIN_MEAN_COSINE, MIN_COSINE = 0.995, 0.98
#: Share of nDCG@10 that may be lost, where SciFact is given.
MAX_NDCG_LOSS = 0.01
SHAPES = ((1, 20), (32, 20), (32, 128))
WORKLOADS = (*(f"{r}x{n}" for r, n in SHAPES), "mixed")
#: Least and greatest length of the mixed workload, which CALLERS texts in flight make.
MIXED = (5, 256)
CALLERS = 64
#: Steps that lengths are padded up to: fine for short texts, where a token is a large share.
BUCKETS = (*range(4, 65, 4), *range(72, 129, 8), *range(144, 513, 16))
#: What cosines are measured on when no texts are given: short, long, odd.
TEXTS = (
    "A man is eating food.",
    "Dynamic batching gathers many small calls into full batches for the model.",
    "what is the weather like in san francisco tomorrow morning",
    "Aspirin inhibits the production of prostaglandins, which cause inflammation and pain.",
    "The court held that the contract was void, because neither party had signed it.",
    "def mean(values): return sum(values) / len(values)",
    "Ein Vorbecken speist die Turbinen eines Kraftwerks.",
    "2 + 2 = 4",
    "The patient was given 20 mg of the drug twice a day for six weeks. " * 8,
)


class Loaded:
    """An encoder, loaded as model.yaml would have it.

    Args:
        folder: a version's folder.
        file: a model file instead of the folder's own, with the same signature.
    """

    def __init__(self, folder: Path, config: ModelConfig, file: Path | None = None) -> None:
        from tokenizers import Tokenizer

        manifest = describe(folder)
        if manifest.task not in TEXT_TASKS or manifest.tokenizer_file is None:
            raise ExportError(
                f"{folder.parent.name} is a {manifest.task} model; encoders are tuned"
            )
        self.tokenizer = Tokenizer.from_file(str(folder / manifest.tokenizer_file))
        defaults = Defaults()
        spec = engine_spec(
            folder.parent.name, 1, folder, manifest, config, defaults, self.tokenizer
        )
        self.spec = spec if file is None else replace(spec, path=str(file))
        self.longest = manifest.max_tokens or 512
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(self.longest)
        self.engines: list[Engine] = open_all(self.spec)

    @property
    def lacks(self) -> str:
        """The engine that was asked for and cannot be had here; empty when it is there."""
        return ", ".join(self.engines[0].info().get("providers_missing", ()))

    def run(self, items: Sequence[Item]) -> NDArray[np.float32]:
        """One batch on the first instance."""
        engine, batch = self.engines[0], Batch(items, max(i.length for i in items), len(items))
        return np.stack([np.asarray(r) for r in engine.finish(_executed(engine, batch), batch)])

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit vectors of texts (a classifier's logits, made so long), near lengths together."""
        ids = [np.array(e.ids, np.int64) for e in self.tokenizer.encode_batch(list(texts))]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        rows: dict[int, NDArray[np.float32]] = {}
        while order:
            count = max(1, min(32, self.spec.policy.max_batch_tokens // len(ids[order[0]])))
            part, order = order[:count], order[count:]
            found = self.run([Item(TokenInput(ids[i]), len(ids[i])) for i in part])
            rows.update(zip(part, found, strict=True))
        out = np.stack([rows[i] for i in range(len(ids))]).astype(np.float32)
        return out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-12)

    def close(self) -> None:
        """Close the engines."""
        for engine in self.engines:
            engine.close()


def _executed(engine: Engine, batch: Batch) -> Any:
    return engine.execute(engine.prepare(batch))


def items(lengths: Sequence[int]) -> list[Item]:
    """Random words of these numbers of tokens."""
    rng = np.random.default_rng(1)
    return [Item(TokenInput(rng.integers(1000, 20_000, n)), n) for n in lengths]


def throughput(loaded: Loaded, rows: int, length: int, seconds: float) -> float:
    """Texts a second on one fixed batch in a loop: by all instances at once, or by one instance for a
    lone text, which cannot be shared out."""
    batch = Batch(items([length] * rows), length, rows)
    engines = loaded.engines if rows > 1 else loaded.engines[:1]
    for engine in engines:
        _executed(engine, batch)

    def loop(engine: Engine) -> float:
        inputs = engine.prepare(batch)
        done, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            engine.finish(engine.execute(inputs), batch)
            done += rows
        return done / (time.perf_counter() - start)

    with ThreadPoolExecutor(len(engines)) as pool:
        return sum(pool.map(loop, engines))


def served(client: BatchingEngineClient, lengths: Sequence[int], seconds: float) -> float:
    """Texts a second through queue and batcher, with CALLERS texts in flight."""
    work = [EngineRequest([item]) for item in items(lengths)]
    free, done = threading.Semaphore(0), 0

    def submit(i: int) -> None:
        (completion,) = client.submit([replace(work[i % len(work)])])
        completion.add_done_callback(lambda _: free.release())

    start = time.perf_counter()
    for i in range(CALLERS):
        submit(i)
    while time.perf_counter() - start < seconds:
        free.acquire()
        submit(CALLERS + done)
        done += 1
    spent = time.perf_counter() - start
    for _ in range(CALLERS):
        free.acquire()
    return done / spent


@dataclass(slots=True)
class Candidate:
    """One way to serve, and what was measured of it. `keys`: what it would add to model.yaml."""

    name: str
    keys: dict[str, Any]
    rates: dict[str, list[float]] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    mean_cosine: float = 0.0
    min_cosine: float = 0.0
    ndcg: float | None = None
    fault: str = ""

    @property
    def score(self) -> float:
        """Geometric mean of the ratios to the reference; 0 when it cannot be taken."""
        if self.fault or not self.ratios:
            return 0.0
        return math.exp(sum(map(math.log, self.ratios.values())) / len(self.ratios))

    def rate(self, workload: str) -> float:
        """Median texts a second."""
        return float(np.median(self.rates[workload])) if self.rates.get(workload) else 0.0


def precisions() -> list[Candidate]:
    """Engines and precisions; the first is the reference."""
    made = [Candidate("onnxruntime", {"engine": "onnxruntime", "engine_options": {}})]
    for precision in ("fp32", "bf16", "int8"):
        options = {"engine_options": {"precision": precision}}
        made.append(Candidate(f"openvino {precision}", {"engine": "openvino", **options}))
    return made


def threadings(best: Candidate, _: int) -> list[Candidate]:
    """One session on all cores, against sessions of their own with fewer threads each."""
    cores = os.cpu_count() or 1
    ways = {(cores, 1), (1, cores), (max(1, cores // 2), 2)} if cores > 1 else set()
    out = []
    for threads, instances in sorted(ways, reverse=True):
        execution = {"intra_op_threads": threads, "instances": instances}
        if instances > 1:
            execution["lone_threads"] = cores
        name = f"{best.name}, {instances} x {threads} threads"
        out.append(Candidate(name, {**best.keys, "execution": execution}))
    return out


def bucketed(best: Candidate, longest: int) -> list[Candidate]:
    """Lengths as they come, against steps: fewer shapes to prepare, more padding."""
    steps = [b for b in BUCKETS if b < longest] + [longest]
    stepped = {**best.keys, "batching": {"length_buckets": steps}}
    return [best, Candidate(f"{best.name}, length buckets", stepped)]


def measure(
    folder: Path,
    config: ModelConfig,
    group: list[Candidate],
    *,
    rounds: int,
    seconds: float,
    texts: Sequence[str],
    progress: Callable[[str], None],
) -> None:
    """Load all candidates, measure them in turn, compare with the first."""
    loaded: dict[str, Loaded] = {}
    clients: dict[str, BatchingEngineClient] = {}
    mixed = np.random.default_rng(7).integers(MIXED[0], MIXED[1] + 1, 256).tolist()
    try:
        for one in group:
            one.rates, one.fault = {}, ""
            try:
                made = Loaded(folder, merged(config, one.keys))
            except Exception as e:
                one.fault = str(getattr(e, "message", e))[:200]
                continue
            if made.lacks:
                one.fault = f"{made.lacks} cannot be had on this machine"
                made.close()
                continue
            loaded[one.name] = made
            clients[one.name] = BatchingEngineClient(made.engines)
        reference = group[0]
        if reference.name not in loaded:
            raise ExportError(f"the model cannot be loaded: {reference.fault}")
        mixed = [min(n, loaded[reference.name].longest) for n in mixed]
        original = loaded[reference.name].embed(texts)
        live = [c for c in group if c.name in loaded]
        for one in live:
            cosine = (loaded[one.name].embed(texts) * original).sum(axis=1)
            one.mean_cosine, one.min_cosine = float(cosine.mean()), float(cosine.min())
            served(clients[one.name], mixed, seconds)  # shapes that are met first cost more
        for turn in range(rounds):
            progress(f"round {turn + 1} of {rounds}")
            for one in live:
                for (rows, length), name in zip(SHAPES, WORKLOADS, strict=False):
                    got = throughput(loaded[one.name], rows, length, seconds)
                    one.rates.setdefault(name, []).append(got)
                got = served(clients[one.name], mixed, seconds * 3)
                one.rates.setdefault("mixed", []).append(got)
        for one in live:
            for name, values in one.rates.items():
                one.ratios[name] = float(
                    np.median(np.array(values) / np.array(reference.rates[name]))
                )
    finally:
        for client in clients.values():
            client.close()


def merged(config: ModelConfig, keys: dict[str, Any]) -> ModelConfig:
    """A model.yaml with a candidate's keys."""
    data = config.model_dump()
    for key, value in keys.items():
        data[key] = {**data[key], **value} if isinstance(value, dict) else value
    return ModelConfig.model_validate(data)


@dataclass(slots=True)
class Outcome:
    """What was found. `groups`: the candidates as they were compared, the reference first."""

    best: Candidate
    groups: list[list[Candidate]]


def tune(
    root: Path,
    name: str,
    *,
    version: int | None = None,
    rounds: int = 3,
    seconds: float = 0.5,
    texts: Sequence[str] = TEXTS,
    judge: scifact.Corpus | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """Measure, and write the winner's profile into `<root>/<name>/model.yaml`.

    Args:
        version: the version that is measured; default: the newest.
        judge: SciFact; a precision that loses more than MAX_NDCG_LOSS of nDCG@10 is not taken.

    Raises:
        ExportError: no such model, not an encoder, or it cannot be loaded.
    """
    folder = _version(root / name, version)
    path = root / name / "model.yaml"
    config = read_config(path)
    spent: dict[str, Any] = {
        "rounds": rounds,
        "seconds": seconds,
        "texts": texts,
        "progress": progress,
    }
    first = precisions()
    measure(folder, config, first, **spent)
    for one in first:
        if not one.fault and (one.mean_cosine < MIN_MEAN_COSINE or one.min_cosine < MIN_COSINE):
            one.fault = f"cosine below {MIN_MEAN_COSINE} on average or {MIN_COSINE} at least"
    best = _judged(folder, config, first, judge, progress)
    groups = [first]
    for ways in (threadings, bucketed):
        compared = ways(best, _longest(folder))
        if compared:
            measure(folder, config, compared, **spent)
            groups.append(compared)
            best = max(compared, key=lambda c: c.score)
    write_profile(path, best, groups)
    return Outcome(best, groups)


def _judged(
    folder: Path,
    config: ModelConfig,
    group: list[Candidate],
    judge: scifact.Corpus | None,
    progress: Callable[[str], None],
) -> Candidate:
    """The quickest whose nDCG@10 holds; without SciFact the quickest."""
    while True:
        best = max(group, key=lambda c: c.score)
        if judge is None or best is group[0]:
            return best
        for one in (group[0], best):
            if one.ndcg is None:
                progress(f"nDCG@10 of {one.name}")
                loaded = Loaded(folder, merged(config, one.keys))
                one.ndcg = scifact.score(loaded.embed, judge)["ndcg@10"]
                loaded.close()
        assert best.ndcg is not None and group[0].ndcg is not None
        if best.ndcg >= group[0].ndcg * (1 - MAX_NDCG_LOSS):
            return best
        best.fault = f"nDCG@10 falls by more than {MAX_NDCG_LOSS:.0%}"


def _version(model: Path, version: int | None) -> Path:
    have = (
        sorted(int(p.name) for p in model.iterdir() if p.name.isdigit()) if model.is_dir() else []
    )
    if not have:
        raise ExportError(f"{model.parent} has no model {model.name!r} with numbered versions")
    if version is not None and version not in have:
        raise ExportError(f"{model.name} has no version {version}; it has {have}")
    return model / str(version or have[-1])


def _longest(folder: Path) -> int:
    return describe(folder).max_tokens or 512


def write_profile(path: Path, best: Candidate, groups: list[list[Candidate]]) -> None:
    """The winner's keys into model.yaml; its other keys stay. The figures go above them as comments."""
    data: dict[str, Any] = (yaml.safe_load(path.read_text()) or {}) if path.exists() else {}
    for key, value in best.keys.items():  # engine_options of another engine must not shine through
        data[key] = (
            {**data.get(key, {}), **value}
            if key != "engine_options" and isinstance(value, dict)
            else value
        )
    lines = ["# By `forebay export tune` on this machine; texts a second, ratio to ONNX Runtime."]
    lines += [f"# {line}" for line in table(groups[0])]
    part = path.with_suffix(".part")
    part.write_text("\n".join(lines) + "\n" + yaml.safe_dump(data, sort_keys=False))
    part.replace(path)


def table(group: list[Candidate]) -> list[str]:
    """Lines of a Markdown table."""
    judged = any(c.ndcg is not None for c in group)
    head = ["way", *WORKLOADS, "cosine: mean", "least", *(["nDCG@10"] if judged else []), ""]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for one in group:
        cells = [one.name]
        for name in WORKLOADS:
            known = name in one.ratios
            cells.append(f"{one.rate(name):.0f} ({one.ratios[name]:.2f})" if known else "-")
        known = bool(one.ratios)
        cells += [f"{one.mean_cosine:.4f}", f"{one.min_cosine:.4f}"] if known else ["-", "-"]
        if judged:
            cells.append(f"{one.ndcg:.4f}" if one.ndcg is not None else "-")
        lines.append("| " + " | ".join([*cells, one.fault]) + " |")
    return lines
