"""Answers from retrieved chunks: written by a language model where one is configured, else
extracted, that is the sentences that answer best, word by word.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from forebay_server.core.call import Call
from forebay_server.dataplane.embedding import TextEmbedder
from forebay_server.indexes.analysis import analyzer
from forebay_server.knowledge.bases import Base, KnowledgeBases
from forebay_server.knowledge.citations import Citation, check_written, cite
from forebay_server.knowledge.retrieval import (
    RetrievalSpec,
    Retrieved,
    RetrievedChunk,
    Retriever,
)
from forebay_server.knowledge.sentences import sentence_spans
from forebay_server.knowledge.writer import NOT_FOUND, PROMPT, Message, Writer

Method = Literal["extracted", "written", "not_found"]
#: Sentences that are compared by meaning; the others have no word and no place in their favour.
COMPARED = 16
#: Weight of meaning against shared words in a sentence's score.
MEANING = 0.7
#: Least score of an answer's best sentence; below it the documents do not hold the answer.
SUPPORT = 0.3
#: Least score of further sentences, as a share of the best one's.
FURTHER = 0.8
#: Characters of a sentence that is cited.
LONGEST = 1000
NOTHING = "The documents do not hold an answer to this question."


@dataclass(frozen=True, slots=True)
class Question:
    """A question; `history` is (role, text) of earlier messages, oldest first."""

    text: str
    retrieval: RetrievalSpec
    history: tuple[tuple[str, str], ...] = ()
    max_sentences: int = 2


@dataclass(frozen=True, slots=True)
class Stage:
    """A step has begun."""

    name: str


@dataclass(frozen=True, slots=True)
class Token:
    """The next piece of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Done:
    """The end."""

    method: Method


Event = Stage | Retrieved | Token | Citation | Done


@dataclass(frozen=True, slots=True)
class _Sentence:
    chunk: RetrievedChunk
    start: int
    end: int
    text: str
    words: float
    rank: int


class Answerer:
    """See the module."""

    def __init__(
        self,
        bases: KnowledgeBases,
        retriever: Retriever,
        embedder: TextEmbedder,
        writer: Writer | None = None,
    ) -> None:
        self._bases = bases
        self._retriever = retriever
        self._embedder = embedder
        self.writer = writer

    async def answer(self, call: Call, base: Base, question: Question) -> AsyncIterator[Event]:
        """Events in order: stages, what was retrieved, pieces with their citations, the end."""
        import asyncio

        stages: asyncio.Queue[str] = asyncio.Queue()
        query = _standalone(question)
        search = asyncio.create_task(
            self._retriever.retrieve(call, base, query, question.retrieval, stages.put)
        )
        try:
            while not search.done() or not stages.empty():
                waiting = asyncio.create_task(stages.get())
                await asyncio.wait({search, waiting}, return_when=asyncio.FIRST_COMPLETED)
                if waiting.done():
                    yield Stage(waiting.result())
                else:
                    waiting.cancel()
            found = await search
        finally:
            search.cancel()
        yield found
        yield Stage("answer")
        steps = self._written if self.writer is not None and found.chunks else self._extracted
        async for event in steps(call, base, question, query, found.chunks):
            yield event

    # By extraction.

    async def _extracted(
        self, call: Call, base: Base, question: Question, query: str, chunks: list[RetrievedChunk]
    ) -> AsyncIterator[Event]:
        best = await self._best(call, base, question, query, chunks)
        if not best:
            yield Token(NOTHING)
            yield Done("not_found")
            return
        documents = await self._documents(base, [s.chunk for s in best])
        for number, s in enumerate(best, 1):
            text = " ".join(s.text.split())
            yield Token(f"{text} [{number}]" if number == 1 else f" {text} [{number}]")
            yield cite(number, s.chunk, s.start, s.end, documents[s.chunk.document])
        yield Done("extracted")

    async def _best(
        self, call: Call, base: Base, question: Question, query: str, chunks: list[RetrievedChunk]
    ) -> list[_Sentence]:
        """The sentences that answer best, in the order of their scores; empty when none does."""
        candidates = _candidates(question.text, chunks, base.config.language)
        if not candidates:
            return []
        model, texts = base.config.embedding_model, [s.text for s in candidates]
        scores = await self._embedder.relevance(call, model, question.text, texts)
        if query != question.text:  # a follow-up: what went before counts for a third
            scores = (2 * scores + await self._embedder.relevance(call, model, query, texts)) / 3
        total = MEANING * scores + (1 - MEANING) * np.array([s.words for s in candidates])
        order = np.argsort(-total, kind="stable").tolist()
        top = float(total[order[0]])
        if top < SUPPORT:
            return []
        return [candidates[i] for i in order[: question.max_sentences] if total[i] >= FURTHER * top]

    async def _documents(self, base: Base, chunks: Sequence[RetrievedChunk]) -> dict[str, str]:
        out: dict[str, str] = {}
        for c in chunks:
            if c.document not in out:
                row = await self._bases.store.get(base.row.id, c.document)
                out[c.document] = await self._bases.text(row) if row is not None else ""
        return out

    # By a language model.

    async def _written(
        self, call: Call, base: Base, question: Question, query: str, chunks: list[RetrievedChunk]
    ) -> AsyncIterator[Event]:
        assert self.writer is not None
        context = "\n\n".join(f"[{i}] {c.text}" for i, c in enumerate(chunks, 1))
        messages = [
            *(Message("user" if r == "user" else "assistant", t) for r, t in question.history),
            Message("user", PROMPT.format(context=context, question=question.text)),
        ]
        whole = ""
        async for piece in self.writer.write(call, messages):
            whole += piece
            yield Token(piece)
        if whole.strip().strip(".") == NOT_FOUND:
            yield Done("not_found")
            return
        for citation in check_written(whole, chunks, await self._documents(base, chunks)):
            yield citation
        yield Done("written")


def _standalone(question: Question) -> str:
    """The question with the last one of the conversation before it, so that a follow-up ("and in
    winter?") finds what it is about. A language model would rewrite it."""
    earlier = [text for role, text in question.history if role == "user"]
    return f"{earlier[-1]} {question.text}" if earlier else question.text


def _candidates(query: str, chunks: Sequence[RetrievedChunk], language: str) -> list[_Sentence]:
    """Sentences that are worth comparing by meaning: those that share the rarest words with the
    question, and each chunk's first ones until there are enough."""
    terms = analyzer(language).terms
    wanted = set(terms(query))
    found: list[tuple[RetrievedChunk, int, int, str, set[str]]] = []
    seen: set[tuple[str, int, int]] = set()
    for c in chunks:
        for start, end in sentence_spans(c.text):
            end = min(end, start + LONGEST)
            key = (c.document, c.start + start, c.start + end)
            text = c.text[start:end]
            if key not in seen and len(text) > 10 and not text.rstrip().endswith("?"):
                seen.add(key)
                found.append((c, key[1], key[2], text, set(terms(text)) & wanted))
    frequency = Counter(t for *_, shared in found for t in shared)
    weight = {t: math.log(1 + len(found) / frequency[t]) if t in frequency else 3.0 for t in wanted}
    whole = sum(weight.values()) or 1.0
    sentences = [
        _Sentence(c, start, end, text, sum(weight[t] for t in shared) / whole, rank)
        for rank, (c, start, end, text, shared) in enumerate(found)
    ]
    return sorted(sentences, key=lambda s: (-s.words, s.rank))[:COMPARED]
