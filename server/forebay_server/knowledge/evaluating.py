"""Evaluations: every question of a list asked by each of several configurations."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

import numpy as np
from forebay.errors import ForebayError

from forebay_server.core.call import Call
from forebay_server.dataplane.embedding import TextEmbedder
from forebay_server.knowledge import evaluation as measures
from forebay_server.knowledge.answering import Answerer, Done, Question, Token
from forebay_server.knowledge.bases import Base
from forebay_server.knowledge.citations import MARKER, Citation, Unsupported
from forebay_server.knowledge.evaluation import Figure, Judged, figure, retrieval_values
from forebay_server.knowledge.retrieval import RetrievalSpec, RetrievedChunk, Retriever
from forebay_server.knowledge.sentences import sentence_spans
from forebay_server.knowledge.writer import Written

#: Questions of an evaluation that are asked at once.
AT_ONCE = 16
#: Chunks that figures of retrieval look at.
LEAST = 10


@dataclass(frozen=True, slots=True)
class Item:
    """A question and what is known of it."""

    query: str
    documents: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Run:
    """A configuration; `answer` says whether questions are answered too."""

    name: str
    retrieval: RetrievalSpec = field(default_factory=RetrievalSpec)
    answer: bool = False
    model: str = ""
    extract: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """What a configuration was measured to be."""

    name: str
    seconds: float
    figures: list[Figure]


class Evaluator:
    """See the module."""

    def __init__(self, retriever: Retriever, answerer: Answerer, embedder: TextEmbedder) -> None:
        self._retriever = retriever
        self._answerer = answerer
        self._embedder = embedder

    async def run(
        self,
        call: Call,
        base: Base,
        items: Sequence[Item],
        run: Run,
        on_item: Callable[[], None] = lambda: None,
    ) -> Result:
        """The figures of one configuration. A question that fails counts as a failure of each."""
        room = asyncio.Semaphore(AT_ONCE)
        began = time.monotonic()

        async def one(item: Item) -> dict[str, float] | None:
            async with room:
                try:
                    return await self._measure(call, base, item, run)
                except ForebayError:
                    return None
                finally:
                    on_item()

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(i)) for i in items]
        values: dict[str, list[float]] = {name: [] for name in _names(items, run)}
        failures = 0
        for task in tasks:
            found = task.result()
            if found is None:
                failures += 1
                continue
            for name, value in found.items():
                values[name].append(value)
        found_figures = [figure(name, v, failures) for name, v in values.items()]
        return Result(run.name, time.monotonic() - began, found_figures)

    async def _measure(self, call: Call, base: Base, item: Item, run: Run) -> dict[str, float]:
        out: dict[str, float] = {}
        spec = run.retrieval
        if item.documents or item.texts or item.answers:
            deep = replace(spec, top_k=max(LEAST, spec.top_k))
            found = await self._retriever.retrieve(call, base, item.query, deep, Written())
            chunks = found.chunks[: spec.top_k]
            if item.documents or item.texts:
                out |= retrieval_values(judged(item, found.chunks))
                relevant = [is_relevant(item, c) for c in chunks]
                out["context_precision"] = measures.context_precision(relevant)
            if item.answers:
                texts = [c.text for c in chunks]
                out["context_recall"] = measures.context_recall(item.answers, texts)
        if run.answer:
            out |= await self._measure_answer(call, base, item, run)
        return out

    async def _measure_answer(
        self, call: Call, base: Base, item: Item, run: Run
    ) -> dict[str, float]:
        text, method = "", "not_found"
        citations: list[Citation] = []
        unsupported: list[Unsupported] = []
        question = Question(item.query, run.retrieval, model=run.model, extract=run.extract)
        async with aclosing(self._answerer.answer(call, base, question)) as events:
            async for event in events:
                if isinstance(event, Token):
                    text += event.text
                elif isinstance(event, Citation):
                    citations.append(event)
                elif isinstance(event, Unsupported):
                    unsupported.append(event)
                elif isinstance(event, Done):
                    method = event.method
        answered = method not in ("not_found", "refused")
        out = {"answered": float(answered)}
        said = " ".join(MARKER.sub("", text).split())
        if answered:
            out["faithfulness"] = faithfulness(text, citations, unsupported)
            texts = [item.query, said]
            model = base.config.embedding_model
            vectors = (await self._embedder.embed(call, model, texts)).vectors
            unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
            out["answer_relevance"] = max(0.0, float(unit[0] @ unit[1]))
        if item.answers:
            given = short_answer(said, citations) if answered else ""
            out["exact_match"] = measures.exact_match(given, item.answers)
            out["f1"] = measures.f1(given, item.answers)
        return out


def _names(items: Sequence[Item], run: Run) -> list[str]:
    """The figures that these questions can give, in order."""
    out: list[str] = []
    if any(i.documents or i.texts for i in items):
        out += [*retrieval_values(Judged((), 0)), "context_precision"]
    if any(i.answers for i in items):
        out.append("context_recall")
    if run.answer:
        out += ["answered", "faithfulness", "answer_relevance"]
        if any(i.answers for i in items):
            out += ["exact_match", "f1"]
    return out


def short_answer(said: str, citations: Sequence[Citation]) -> str:
    """What is compared with right answers: the words that were marked as the answer, else all."""
    return next((c.answer for c in citations if c.answer), said)


def faithfulness(
    text: str, citations: Sequence[Citation], unsupported: Sequence[Unsupported]
) -> float:
    """Share of an answer's sentences that are supported: none of their words is marked as
    unsupported, and every citation is verified."""
    if any(not c.verified for c in citations):
        return 0.0
    spans = [s for s in sentence_spans(text) if len(MARKER.sub("", text[s[0] : s[1]]).split()) > 1]
    if not spans:
        return float(not unsupported)
    bad = sum(any(u.start < end and start < u.end for u in unsupported) for start, end in spans)
    return 1 - bad / len(spans)


def is_relevant(item: Item, chunk: RetrievedChunk) -> bool:
    """Whether a chunk is one of those that were to be found."""
    if item.documents:
        return chunk.document in item.documents or chunk.name in item.documents
    return any(t in chunk.text for t in item.texts)


def judged(item: Item, chunks: Sequence[RetrievedChunk]) -> Judged:
    """Each relevant document counts at its first chunk; of relevant texts one is enough."""
    if not item.documents:
        hits = [is_relevant(item, c) for c in chunks]
        first = hits.index(True) if True in hits else -1
        return Judged(tuple(i == first for i in range(len(hits))), 1)
    seen: set[str] = set()
    relevant: list[bool] = []
    for c in chunks:
        if c.document in seen:
            continue  # ranks are those of documents
        seen.add(c.document)
        relevant.append(is_relevant(item, c))
    return Judged(tuple(relevant), len(set(item.documents)))
