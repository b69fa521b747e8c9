"""Figures over questions with known answers, with confidence intervals; never NaN. None needs a
judge model."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
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


def retrieval_values(j: Judged) -> dict[str, float]:
    """recall@1, recall@5, recall@10, mrr@10 and ndcg@10 of one question."""
    return {
        **{f"recall@{k}": recall(j, k) for k in (1, 5, 10)},
        "mrr@10": reciprocal_rank(j, 10),
        "ndcg@10": ndcg(j, 10),
    }


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


def context_precision(relevant: Sequence[bool]) -> float:
    """Mean precision at the ranks of the relevant chunks; 0 where none is relevant."""
    hits, total = 0, 0.0
    for rank, hit in enumerate(relevant, 1):
        if hit:
            hits += 1
            total += hits / rank
    return total / hits if hits else 0.0


def context_recall(answers: Sequence[str], contexts: Sequence[str]) -> float:
    """Share of a right answer's words that the chunks hold together; the best answer counts."""
    there = set(words(" ".join(contexts)))
    shares = [len(w & there) / len(w) for a in answers if (w := set(words(a)))]
    return max(shares, default=0.0)


def exact_match(given: str, answers: Sequence[str]) -> float:
    """1 when the answer is one of the right ones, articles, case and punctuation aside."""
    return max((float(words(given) == words(a)) for a in answers), default=0.0)


def f1(given: str, answers: Sequence[str]) -> float:
    """Overlap of words with the best of the right answers."""

    def one(a: list[str], b: list[str]) -> float:
        same = sum((Counter(a) & Counter(b)).values())
        if not same:
            return float(a == b)
        precision, recalled = same / len(a), same / len(b)
        return 2 * precision * recalled / (precision + recalled)

    return max((one(words(given), words(a)) for a in answers), default=0.0)


def words(text: str) -> list[str]:
    """Words as SQuAD's evaluation counts them; letters for Chinese and Japanese."""
    text = "".join(c for c in text.lower() if c not in _PUNCTUATION)
    text = re.sub(r"\b(a|an|the)\b", " ", text)
    return re.findall(r"[\u3040-\u30ff\u4e00-\u9fff]|[^\s\u3040-\u30ff\u4e00-\u9fff]+", text)


_PUNCTUATION = frozenset(string.punctuation + "。、，．！？；：“”‘’«»„「」『』（）《》…—–")
