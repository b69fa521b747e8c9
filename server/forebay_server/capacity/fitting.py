"""A cost model of a model folder: its engine is loaded here and run on batches of many shapes."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from forebay.errors import FailedPrecondition

from forebay_server.capacity.cost import CostModel, Sample, fit
from forebay_server.core.interfaces import Batch, BatchPolicy, Engine, EngineSpec, Item, TokenInput
from forebay_server.core.lane import padded
from forebay_server.engines.arrays import NUMPY
from forebay_server.engines.factory import open_all
from forebay_server.repository import loading
from forebay_server.repository.inspect import describe
from forebay_server.repository.manifest import Manifest, read_config

#: Each shape runs until it took this long, and this often at most.
SHAPE_S, MOST_RUNS = 0.4, 60


def newest(folder: Path) -> tuple[int, Path]:
    """A model folder's newest version; the folder itself when it has no numbered ones.

    Raises:
        FailedPrecondition: it is no folder.
    """
    if not folder.is_dir():
        raise FailedPrecondition(f"{folder} is no folder", reason="MODEL_REJECTED")
    numbered = [(int(p.name), p) for p in folder.iterdir() if p.is_dir() and p.name.isdigit()]
    return max(numbered) if numbered else (1, folder)


def fit_folder(
    folder: Path, lengths: Sequence[int] = (), defaults: loading.Defaults | None = None
) -> tuple[CostModel, BatchPolicy, int]:
    """The cost model of a model folder, its batch policy, and its instances.

    Args:
        lengths: tokens of the texts to come; by default up to the model's greatest.

    Raises:
        FailedPrecondition: the model cannot be loaded; says why.
    """
    version, path = newest(folder)
    config = read_config(folder / "model.yaml")

    manifest = describe(path)
    tokenizer = loading.tokenizer_of(path, manifest)
    spec = loading.engine_spec(
        folder.name, version, path, manifest, config, defaults or loading.Defaults(), tokenizer
    )
    # As it runs under load, beside others: alone it may have their cores too.
    (engine,) = open_all(replace(spec, instances=1, lone_threads=0))
    try:
        samples = measure(engine, manifest, lengths)
    finally:
        engine.close()
    policy = spec.policy
    items = "texts" if spec.kind == "tokens" else "rows"
    source: dict[str, object] = {"model": folder.name, "kind": "engine alone", "items": items}
    return fit(samples, source=source), policy, spec.instances


def measure(engine: Engine, manifest: Manifest, lengths: Sequence[int] = ()) -> list[Sample]:
    """Run batches of many shapes, in an order that slow spells of the machine spread over."""
    spec = engine.spec
    shapes = _shapes(spec, manifest, lengths)
    rng = np.random.default_rng(0)
    batches = {s: _batch(spec, manifest, rng, *s) for s in shapes}
    for batch in batches.values():
        engine.finish(engine.execute(engine.prepare(batch)), batch)
    out: list[Sample] = []
    rounds = 4
    order = list(shapes)
    for _ in range(rounds):
        random.Random(len(out)).shuffle(order)
        for shape in order:
            batch = batches[shape]
            until = time.perf_counter() + SHAPE_S / rounds
            for _ in range(MOST_RUNS // rounds):
                before = time.perf_counter()
                engine.finish(engine.execute(engine.prepare(batch)), batch)
                after = time.perf_counter()
                out.append(Sample(batch.rows, batch.length, after - before))
                if after > until:
                    break
    return out


def _shapes(spec: EngineSpec, manifest: Manifest, lengths: Sequence[int]) -> list[tuple[int, int]]:
    policy = spec.policy
    if spec.kind == "tensors":
        most = policy.max_batch_size if spec.batches else 1
        return [(n, 1) for n in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if n <= most] or [(1, 1)]
    most_tokens = manifest.max_tokens or 512
    chosen = sorted({padded(policy, n) for n in lengths if n <= most_tokens}) or [
        n for n in (8, 16, 32, 64, 128, 256, 512) if n <= most_tokens
    ]
    if len(chosen) > 8:
        chosen = [chosen[i * (len(chosen) - 1) // 7] for i in range(8)]
    out = []
    for length in chosen:
        rows = 1
        while rows <= policy.max_batch_size and (
            rows == 1 or rows * length <= 2 * policy.max_batch_tokens
        ):
            out.append((rows, length))
            rows *= 2
    return out


def item_of(
    spec: EngineSpec, manifest: Manifest, rng: np.random.Generator, rows: int, length: int
) -> Item:
    """An item like those of callers: a text of `length` tokens, or `rows` rows of tensors."""
    if spec.kind == "tokens":
        return Item(TokenInput(rng.integers(1000, 20_000, length, np.int64)), length)
    tensors = {
        t.name: _tensor(manifest, rng, t.name, t.datatype, t.shape, rows) for t in spec.inputs
    }
    return Item(tensors, rows=rows)


def _batch(
    spec: EngineSpec, manifest: Manifest, rng: np.random.Generator, rows: int, length: int
) -> Batch:
    if spec.kind == "tokens":
        return Batch([item_of(spec, manifest, rng, 1, length) for _ in range(rows)], length, rows)
    return Batch([item_of(spec, manifest, rng, rows, 1)], 1, rows)


def _tensor(
    manifest: Manifest,
    rng: np.random.Generator,
    name: str,
    datatype: str,
    shape: tuple[int, ...] | None,
    rows: int,
) -> Any:
    """Values like those of the signature; free dimensions other than the first are 1, and there are no
    others where nothing is known of them."""
    full = [rows, *(abs(n) if n else 1 for n in (shape or ())[1:])]
    features = manifest.tabular.features if manifest.tabular else []
    known = {f.name: f for f in features}.get(name)
    if datatype == "BYTES":
        choices = (known.categories if known else None) or ["a"]
        return rng.choice(np.array(choices, object), full)
    low = known.min if known and known.min is not None else 0.0
    high = known.max if known and known.max is not None else 1.0
    if len(features) == (full[1] if len(full) > 1 else 0):  # the matrix layout
        lows = np.array([f.min if f.min is not None else 0.0 for f in features])
        highs = np.array([f.max if f.max is not None else 1.0 for f in features])
        return rng.uniform(lows, highs, full).astype(NUMPY[datatype])
    return rng.uniform(low, high, full).astype(NUMPY[datatype])
