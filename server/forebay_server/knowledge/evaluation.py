"""Figures of retrieval over questions with known answers, with confidence intervals; never NaN."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: Draws of the bootstrap.
DRAWS = 1000


@dataclass(frozen=True, slots=True)
class Figure:
    """A mean with its 95% interval. `n` questions count, `failures` could not be asked."""

    name: str
    value: float
    low: float
    high: float
    n: int
    failures: int


@dataclass(frozen=True, slots=True)
class Judged:
    """One question's answer: which of the results, best first, are relevant (each relevant thing
    counts once), and how many relevant things there are."""

    relevant: tuple[bool, ...]
    total: int


def figures(judged: Sequence[Judged], failures: int) -> list[Figure]:
    """recall@1, recall@5, recall@10, mrr@10 and ndcg@10."""
    values = {
        **{f"recall@{k}": [recall(j, k) for j in judged] for k in (1, 5, 10)},
        "mrr@10": [reciprocal_rank(j, 10) for j in judged],
        "ndcg@10": [ndcg(j, 10) for j in judged],
    }
    return [figure(name, v, failures) for name, v in values.items()]


def recall(j: Judged, k: int) -> float:
    """Share of the relevant things among the first k."""
    return sum(j.relevant[:k]) / j.total if j.total else 0.0


def reciprocal_rank(j: Judged, k: int) -> float:
    """1 / rank of the first relevant result among the first k; 0 without one."""
    return next((1 / i for i, hit in enumerate(j.relevant[:k], 1) if hit), 0.0)


def ndcg(j: Judged, k: int) -> float:
    """Normalised discounted cumulative gain of binary relevance."""
    gain = sum(1 / math.log2(i + 1) for i, hit in enumerate(j.relevant[:k], 1) if hit)
    best = sum(1 / math.log2(i + 1) for i in range(1, min(k, j.total) + 1))
    return gain / best if best else 0.0


def figure(name: str, values: Sequence[float], failures: int) -> Figure:
    """Mean and interval, by bootstrap with a fixed seed: the same input gives the same figures."""
    if not values:
        return Figure(name, 0.0, 0.0, 0.0, 0, failures)
    v = np.asarray(values, float)
    random = np.random.default_rng(0)
    means = [v[random.integers(0, len(v), len(v))].mean() for _ in range(DRAWS)]
    low, high = np.quantile(means, [0.025, 0.975])
    return Figure(name, float(v.mean()), float(low), float(high), len(v), failures)
