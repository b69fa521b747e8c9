"""Retrieval as an explicit pipeline: search, then rerank, then MMR, each where it is asked for."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from forebay_server.core.call import Call
from forebay_server.dataplane.embedding import TextEmbedder
from forebay_server.dataplane.searching import Hit, SearchPipeline, SearchSpec
from forebay_server.indexes.engine import Mode
from forebay_server.indexes.filters import Filter
from forebay_server.indexes.fusion import Fusion
from forebay_server.knowledge.bases import Base, KnowledgeBases

#: Chunks given, and candidates for later steps, where a request names none.
TOP_K, CANDIDATES = 4, 20


@dataclass(frozen=True, slots=True)
class RetrievalSpec:
    """How chunks are chosen. `rerank` is a model's name, empty = the default one, None = no step;
    `mmr` the weight of relevance, None = no step."""

    top_k: int = TOP_K
    mode: Mode | None = None
    condition: Filter | None = None
    fusion: Fusion = field(default_factory=Fusion)
    candidates: int = 0
    rerank: str | None = None
    mmr: float | None = None

    @property
    def depth(self) -> int:
        """Chunks that search gives."""
        steps = self.rerank is not None or self.mmr is not None
        return max(self.top_k, self.candidates or (CANDIDATES if steps else self.top_k))


@dataclass(frozen=True, slots=True)
class RetrievedChunk:
    """A chunk. `start` and `end` are characters of the document's text; `text` lies between them."""

    id: str
    document: str
    name: str
    page: int
    start: int
    end: int
    text: str
    headings: tuple[str, ...]
    metadata: Mapping[str, Any]
    score: float
    dense_score: float | None = None
    keyword_score: float | None = None
    vector: NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """What a step did; `seconds` is its time."""

    name: str
    seconds: float
    chunks: list[RetrievedChunk]


@dataclass(frozen=True, slots=True)
class Retrieved:
    """The chunks, best first, and the steps that led to them."""

    chunks: list[RetrievedChunk]
    steps: list[Step]


OnStep = Callable[[str], Awaitable[None]]


async def _silent(_: str) -> None:
    return None


class Retriever:
    """See the module."""

    def __init__(
        self, bases: KnowledgeBases, searches: SearchPipeline, embedder: TextEmbedder
    ) -> None:
        self._bases = bases
        self._searches = searches
        self._embedder = embedder

    async def retrieve(
        self, call: Call, base: Base, query: str, spec: RetrievalSpec, on_step: OnStep = _silent
    ) -> Retrieved:
        """The best chunks. `on_step` hears each step's name before it begins."""
        steps: list[Step] = []

        async def step(name: str, work: Awaitable[list[RetrievedChunk]]) -> list[RetrievedChunk]:
            await on_step(name)
            began = time.monotonic()
            found = await work
            steps.append(Step(name, time.monotonic() - began, found))
            return found

        chunks = await step("search", self._search(call, base, query, spec))
        if spec.rerank is not None and chunks:
            chunks = await step("rerank", self._rerank(call, query, chunks, spec.rerank))
        if spec.mmr is not None and chunks:
            chunks = await step("mmr", _mmr(chunks, spec.top_k, spec.mmr))
        chunks = await self._with_parents(base, chunks[: spec.top_k])
        return Retrieved(chunks, steps)

    async def _search(
        self, call: Call, base: Base, query: str, spec: RetrievalSpec
    ) -> list[RetrievedChunk]:
        outcome = await self._searches.search(
            call,
            SearchSpec(
                base.collection,
                text=query,
                mode=spec.mode,
                limit=spec.depth,
                condition=spec.condition,
                fusion=spec.fusion,
                with_vectors=spec.mmr is not None,
            ),
        )
        return [_chunk(hit) for hit in outcome.hits]

    async def _rerank(
        self, call: Call, query: str, chunks: list[RetrievedChunk], model: str
    ) -> list[RetrievedChunk]:
        scores = await self._embedder.relevance(call, model, query, [c.text for c in chunks])
        order = np.argsort(-scores, kind="stable").tolist()
        return [replace(chunks[i], score=float(scores[i])) for i in order]

    async def _with_parents(self, base: Base, chunks: list[RetrievedChunk]) -> list[RetrievedChunk]:
        """For parent_child: the larger span around each chunk, none twice."""
        if base.config.chunks.method != "parent_child":
            return chunks
        out: dict[tuple[str, int], RetrievedChunk] = {}
        for c in chunks:
            start, end = c.metadata["\0parent"]
            row = await self._bases.document(base, c.document)
            text = (await self._bases.text(row))[start:end]
            out.setdefault((c.document, start), replace(c, start=start, end=end, text=text))
        return list(out.values())


async def _mmr(chunks: list[RetrievedChunk], count: int, relevance: float) -> list[RetrievedChunk]:
    """Greedy maximal marginal relevance over the chunks' vectors; relevance is the chunks' scores
    scaled to 0 to 1, so that it works after any step."""
    vectors = np.stack([c.vector for c in chunks if c.vector is not None])
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    scores = np.array([c.score for c in chunks])
    spread = scores.max() - scores.min()
    near = (scores - scores.min()) / spread if spread > 0 else np.ones(len(scores))
    alike = vectors @ vectors.T
    chosen: list[int] = []
    left = list(range(len(chunks)))
    while left and len(chosen) < count:
        most = alike[:, chosen].max(axis=1) if chosen else np.zeros(len(chunks))
        value = relevance * near - (1 - relevance) * most
        best = max(left, key=lambda i: value[i])
        chosen.append(best)
        left.remove(best)
    return [chunks[i] for i in chosen]


def _chunk(hit: Hit) -> RetrievedChunk:
    assert hit.row is not None
    d = orjson.loads(hit.row.payload)
    vector = None if hit.row.vector is None else np.frombuffer(hit.row.vector, "<f4")
    return RetrievedChunk(
        hit.found.id,
        d["document"],
        d["name"],
        d["page"],
        d["start"],
        d["end"],
        d["text"],
        tuple(d["headings"]),
        {**d["metadata"], "\0parent": d["parent"]},
        hit.found.score,
        hit.found.dense_score,
        hit.found.keyword_score,
        vector,
    )
