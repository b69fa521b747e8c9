"""What is asked: inputs, the answers that are right, and how many callers ask at once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks import common
from benchmarks.peers import models
from benchmarks.peers.spec import Kind

Group = Literal["tabular", "embed", "text"]
GROUPS: tuple[Group, ...] = ("tabular", "embed", "text")


@dataclass(frozen=True)
class Workload:
    """Calls of one sort.

    Attributes:
        inputs: sent in turn, one a call.
        expected: the reference for each input.
        callers: closed loops measured, each with so many callers.
        stretch: runs are so many times longer than the shortest workload's.
    """

    name: str
    group: Group
    inputs: list[Any]
    expected: list[NDArray[np.float64]]
    callers: tuple[int, ...]
    stretch: float = 1.0

    def wrong(self, i: int, got: NDArray[np.float64], cosine: float) -> str:
        """What is wrong with the answer to input i; empty where it is right."""
        want = self.expected[i]
        if got.shape != want.shape:
            return f"{got.shape} numbers where {want.shape} are right"
        if len(want) == 1:
            near = bool(np.allclose(got, want, rtol=1e-5, atol=1e-6))
            return "" if near else f"{got[0]} is not {want[0]}"
        if self.group == "text":  # scores: int8 models differ a little with what is beside a text
            far = float(np.abs(got - want).max())
            return "" if far < 0.05 else f"scores differ by {far:.3f}"
        alike = float(models.unit(got) @ models.unit(want))
        return "" if alike >= cosine else f"cosine {alike:.5f} to the reference"


@cache
def tabular() -> list[Workload]:
    """One row of the random forest a call."""
    rows = np.random.default_rng(1).normal(size=(64, 8)).astype(np.float32)
    expected = models.Bare(models.forest(), 1).rows(rows)
    return [Workload("tabular", "tabular", list(rows), [e[None] for e in expected], (1, 16, 64))]


@cache
def embed() -> list[Workload]:
    """One text a call: 20 tokens, 128 tokens, 5 to 256 tokens."""
    bare = models.Bare(models.minilm(), 2)
    sorts = {
        "embed-20": ([20] * 64, (1, 16, 64), 1.25),
        "embed-128": ([128] * 64, (16, 64), 2.0),
        "embed-mixed": (common.mixed_lengths(256), (16, 64), 2.5),
    }
    out = []
    for name, (lengths, callers, stretch) in sorts.items():
        texts = [common.text_of(n, i) for i, n in enumerate(lengths)]
        expected = list(bare.texts(texts))
        out.append(Workload(name, "embed", texts, expected, callers, stretch))
    return out


@cache
def text() -> list[Workload]:
    """Classification of one text, and ten documents to rank for one query."""
    texts = [common.text_of(20, i) for i in range(64)]
    folder = common.starters() / "sentiment" / "1"
    logits = models.Bare(folder, 2).texts(texts)
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    scores = [np.sort(s)[::-1] for s in shares]
    bare = models.Bare(models.minilm(), 2)
    ranked, expected = [], []
    for i in range(16):
        query, documents = common.text_of(12, 900 + i), texts[4 * i : 4 * i + 4] + texts[:6]
        vectors = models.unit(bare.texts([query, *documents]))
        ranked.append((query, documents))
        expected.append(vectors[1:] @ vectors[0])
    return [
        Workload("classify", "text", texts, scores, (1, 64), 1.25),
        Workload("rerank", "text", ranked, expected, (1, 64), 1.25),
    ]


#: By group: its workloads, and the model that peers serve for it.
MAKERS = {"tabular": tabular, "embed": embed, "text": text}
KINDS: dict[Group, Kind] = {"tabular": "forest", "embed": "minilm"}
