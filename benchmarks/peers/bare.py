"""The bare models in a loop: the limit that servers are held against."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import common
from benchmarks.peers import models
from benchmarks.peers.workloads import Group


def measure(group: Group, seconds: float) -> dict[str, float]:
    """Items a second, and milliseconds of one alone, by what was run."""
    if group == "tabular":
        session = models.Bare(models.forest(), 1).session
        return {
            "batch 1": _rate(session, _rows(1), 1, seconds),
            "batch 32": _rate(session, _rows(32), 32, seconds),
            "one_ms": _one(session, _rows(1), seconds),
        }
    if group == "text":
        return {}
    bare = models.Bare(models.minilm(), 2)
    out = {}
    for length in (20, 128):
        texts = [common.text_of(length, i) for i in range(32)]
        out[f"32 x {length}"] = _rate(bare.session, bare.tokens(texts), 32, seconds)
    out["one_ms"] = _one(bare.session, bare.tokens([common.text_of(20, 0)]), seconds)
    out["mixed, one by one"] = _mixed(bare, seconds)
    return out


def _rows(n: int) -> dict[str, Any]:
    return {"input": np.random.default_rng(n).normal(size=(n, 8)).astype(np.float32)}


def _until(seconds: float, work: Callable[[], Any]) -> list[float]:
    """Run it again and again; the seconds of each run."""
    took, start = [], time.perf_counter()
    while (before := time.perf_counter()) - start < seconds:
        work()
        took.append(time.perf_counter() - before)
    return took


def _rate(session: Any, inputs: dict[str, Any], items: int, seconds: float) -> float:
    took = _until(seconds, lambda: session.run(None, inputs))
    return items * len(took) / sum(took)


def _one(session: Any, inputs: dict[str, Any], seconds: float) -> float:
    return common.median(_until(seconds, lambda: session.run(None, inputs))) * 1e3


def _mixed(bare: models.Bare, seconds: float) -> float:
    """Texts of mixed lengths without any padding, one a run."""
    texts = [common.text_of(n, i) for i, n in enumerate(common.mixed_lengths(256))]
    inputs = [bare.tokens([t]) for t in texts]
    at = iter(range(10**9))
    took = _until(seconds, lambda: bare.session.run(None, inputs[next(at) % len(inputs)]))
    return len(took) / sum(took)
