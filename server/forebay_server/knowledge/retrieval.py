"""Retrieval as an explicit pipeline: expansion and HyDE, search, rerank, MMR, each where it is asked
for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
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
from forebay_server.knowledge.writer import Writer, Written

#: Chunks given, and candidates for later steps, where a request names none.
TOP_K, CANDIDATES = 4, 20
#: Constant of reciprocal-rank fusion of several queries' results.
RRF_K = 60


@dataclass(frozen=True, slots=True)
class Expansion:
    """Other wordings of a query: by which model (empty = the default one), how many."""

    model: str = ""
    queries: int = 3


@dataclass(frozen=True, slots=True)
class RetrievalSpec:
    """How chunks are chosen. `rerank` is a model's name, empty = the default one, None = no step;
    `mmr` the weight of relevance, None = no step; `expand` and `hyde` (a model's name) likewise.
    `path` is the request's field that says all this, for errors."""

    top_k: int = TOP_K
    mode: Mode | None = None
    condition: Filter | None = None
    fusion: Fusion = field(default_factory=Fusion)
    candidates: int = 0
    rerank: str | None = None
    mmr: float | None = None
    expand: Expansion | None = None
    hyde: str | None = None
    path: str = "retrieval"

    @property
    def depth(self) -> int:
        """Chunks that search gives."""
        steps = self.rerank is not None or self.mmr is not None or self.several
        return max(self.top_k, self.candidates or (CANDIDATES if steps else self.top_k))

    @property
    def several(self) -> bool:
        """Whether the results of several queries are fused."""
        return self.expand is not None or self.hyde is not None


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
    """What a step did; `seconds` is its time, `written` what a language model wrote in it."""

    name: str
    seconds: float
    chunks: list[RetrievedChunk]
    written: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Retrieved:
    """The chunks, best first, the steps that led to them, and what was searched for."""

    chunks: list[RetrievedChunk]
    steps: list[Step]
    query: str = ""


OnStep = Callable[[str], Awaitable[None]]


async def _silent(_: str) -> None:
    return None


class Retriever:
    """See the module."""

    def __init__(
        self,
        bases: KnowledgeBases,
        searches: SearchPipeline,
        embedder: TextEmbedder,
        writer: Writer,
    ) -> None:
        self._bases = bases
        self._searches = searches
        self._embedder = embedder
        self._writer = writer

    async def retrieve(
        self,
        call: Call,
        base: Base,
        query: str,
        spec: RetrievalSpec,
        written: Written,
        on_step: OnStep = _silent,
    ) -> Retrieved:
        """The best chunks. `on_step` hears each step's name before it begins.

        Raises:
            FailedPrecondition: a step needs a language model and none is named or set.
            Unavailable: a text that chunks are to be given from is on another server's disk.
        """
        steps: list[Step] = []

        async def step(name: str, work: Awaitable[list[RetrievedChunk]]) -> list[RetrievedChunk]:
            await on_step(name)
            began = time.monotonic()
            found = await work
            steps.append(Step(name, time.monotonic() - began, found))
            return found

        async def writing(name: str, work: Awaitable[list[str]]) -> list[str]:
            await on_step(name)
            began = time.monotonic()
            texts = await work
            steps.append(Step(name, time.monotonic() - began, [], texts))
            return texts

        searches = [_search_of(base, query, spec)]
        if spec.expand is not None:
            model = self._writer.model(spec.expand.model, f"{spec.path}.expand.model")
            count = spec.expand.queries
            work = self._writer.wordings(call, model, query, count, written)
            searches += [_search_of(base, w, spec) for w in await writing("expand", work)]
        if spec.hyde is not None:
            model = self._writer.model(spec.hyde, f"{spec.path}.hyde.model")

            async def passage() -> list[str]:
                return [await self._writer.passage(call, model, query, written)]

            for text in await writing("hyde", passage()):
                if text:
                    searches.append(replace(_search_of(base, text, spec), mode="dense"))
        chunks = await step("search", self._search(call, searches))
        if spec.rerank is not None and chunks:
            chunks = await step("rerank", self._rerank(call, query, chunks, spec.rerank))
        if spec.mmr is not None and chunks:
            chunks = await step("mmr", _mmr(chunks, spec.top_k, spec.mmr))
        chunks = await self._with_parents(base, chunks[: spec.top_k])
        return Retrieved(chunks, steps, query)

    async def _search(self, call: Call, searches: Sequence[SearchSpec]) -> list[RetrievedChunk]:
        """One search, or several at once with their results fused by reciprocal ranks."""
        if len(searches) == 1:
            return [_chunk(hit) for hit in (await self._searches.search(call, searches[0])).hits]
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._searches.search(call, s)) for s in searches]
        found: dict[str, RetrievedChunk] = {}
        score: dict[str, float] = {}
        for task in tasks:
            for rank, hit in enumerate(task.result().hits, 1):
                found.setdefault(hit.found.id, _chunk(hit))
                score[hit.found.id] = score.get(hit.found.id, 0.0) + 1 / (RRF_K + rank)
        best = sorted(found, key=lambda i: -score[i])[: searches[0].limit]
        return [replace(found[i], score=score[i]) for i in best]

    async def _rerank(
        self, call: Call, query: str, chunks: list[RetrievedChunk], model: str
    ) -> list[RetrievedChunk]:
        scores = await self._embedder.relevance(call, model, query, [c.text for c in chunks])
        order = np.argsort(-scores, kind="stable").tolist()
        return [replace(chunks[i], score=float(scores[i])) for i in order]

    async def _with_parents(self, base: Base, chunks: list[RetrievedChunk]) -> list[RetrievedChunk]:
        """For parent_child: the larger span around each chunk, none twice. Raises Unavailable."""
        if base.config.chunks.method != "parent_child":
            return chunks
        out: dict[tuple[str, int], RetrievedChunk] = {}
        for c in chunks:
            start, end = c.metadata["\0parent"]
            text = (await self._bases.texts.read(base.row.id, c.document))[start:end]
            if not text:  # it was removed since it was found
                continue
            out.setdefault((c.document, start), replace(c, start=start, end=end, text=text))
        return list(out.values())


def _search_of(base: Base, query: str, spec: RetrievalSpec) -> SearchSpec:
    return SearchSpec(
        base.collection,
        text=query,
        mode=spec.mode,
        limit=spec.depth,
        condition=spec.condition,
        fusion=spec.fusion,
        with_vectors=spec.mmr is not None,
        condition_path=f"{spec.path}.filter",
    )


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
