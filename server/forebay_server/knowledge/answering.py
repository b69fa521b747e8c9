"""Answers from retrieved chunks: written by a language model where one is named or set, else
extracted, that is the sentences that answer best, word by word.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Literal

from forebay.errors import Unavailable

from forebay_server.core.call import Call
from forebay_server.dataplane.embedding import TextEmbedder
from forebay_server.knowledge.bases import Base, KnowledgeBases
from forebay_server.knowledge.citations import AnswerCheck, Citation, Source, Unsupported, cite
from forebay_server.knowledge.extraction import best_sentences
from forebay_server.knowledge.retrieval import (
    RetrievalSpec,
    Retrieved,
    RetrievedChunk,
    Retriever,
    Step,
)
from forebay_server.knowledge.spans import answer_span
from forebay_server.knowledge.writer import NOT_FOUND, Writer, Written

Method = Literal["extracted", "written", "not_found", "refused"]
NOTHING = "The documents do not hold an answer to this question."


@dataclass(frozen=True, slots=True)
class Question:
    """A question; `history` is (role, text) of earlier messages, oldest first; `model` writes, empty
    = the server's writer."""

    text: str
    retrieval: RetrievalSpec
    history: tuple[tuple[str, str], ...] = ()
    max_sentences: int = 2
    model: str = ""
    extract: bool = False


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
    written: Written = field(default_factory=Written)


Event = Stage | Retrieved | Token | Citation | Unsupported | Done


class Answerer:
    """See the module."""

    def __init__(
        self,
        bases: KnowledgeBases,
        retriever: Retriever,
        embedder: TextEmbedder,
        writer: Writer,
        on_event: Callable[[Event], None] = lambda event: None,
    ) -> None:
        self._bases = bases
        self._retriever = retriever
        self._embedder = embedder
        self._writer = writer
        self._on_event = on_event

    async def answer(
        self, call: Call, base: Base, question: Question
    ) -> AsyncGenerator[Event, None]:
        """Events in order: stages, what was retrieved, pieces with their citations, the end."""
        model = "" if question.extract else question.model or self._writer.default
        written = Written()
        stages: asyncio.Queue[str] = asyncio.Queue()
        search = asyncio.create_task(self._retrieved(call, base, question, model, written, stages))
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
        steps = self._written if model and found.chunks else self._extracted
        async with aclosing(steps(call, base, question, model, found, written)) as events:
            async for event in events:
                self._on_event(event)
                yield event

    async def _retrieved(
        self,
        call: Call,
        base: Base,
        question: Question,
        model: str,
        written: Written,
        stages: asyncio.Queue[str],
    ) -> Retrieved:
        loop, rewrite = asyncio.get_running_loop(), None
        query = question.text
        if question.history and model:
            await stages.put("rewrite")
            began = loop.time()
            query = await self._writer.whole_question(
                call, model, question.text, question.history, written
            )
            rewrite = Step("rewrite", loop.time() - began, [], [query])
        elif question.history:
            query = _joined(question)
        found = await self._retriever.retrieve(
            call, base, query, question.retrieval, written, stages.put
        )
        return replace(found, steps=[rewrite, *found.steps]) if rewrite is not None else found

    async def _extracted(
        self,
        call: Call,
        base: Base,
        question: Question,
        model: str,
        found: Retrieved,
        written: Written,
    ) -> AsyncGenerator[Event, None]:
        best = await best_sentences(
            self._embedder,
            call,
            base,
            question.text,
            found.query,
            found.chunks,
            question.max_sentences,
        )
        if not best:
            yield Token(NOTHING)
            yield Done("not_found", written)
            return
        for number, s in enumerate(best, 1):
            text = " ".join(s.text.split())
            yield Token(f"{text} [{number}]" if number == 1 else f" {text} [{number}]")
            documents = await self._documents(base, [s.chunk])
            answer = answer_span(question.text, s.text, base.config.language)
            yield cite(
                number, s.chunk, s.start, s.end, documents.get(s.chunk.document, Source()), answer
            )
        yield Done("extracted", written)

    async def _written(
        self,
        call: Call,
        base: Base,
        question: Question,
        model: str,
        found: Retrieved,
        written: Written,
    ) -> AsyncGenerator[Event, None]:
        texts = [c.text for c in found.chunks]
        reply = await self._writer.answer(
            call, model, question.text, found.query, texts, question.history
        )
        given = found.chunks[: reply.given]
        check = AnswerCheck(given, await self._documents(base, given), base.config.language)
        begun: str | None = ""  # held back while it may become "not in the documents"
        refused = False
        async with aclosing(self._writer.pieces(call, reply, written)) as pieces:
            async for piece in pieces:
                if piece.refusal and not refused:
                    refused = True  # its own words rest on no source: none is checked
                    for event in [*check.feed(begun or ""), *check.end()]:
                        yield Token(event) if isinstance(event, str) else event
                if refused:
                    yield Token(piece.text)
                    continue
                text = piece.text
                if begun is not None:
                    begun += text
                    if NOT_FOUND.startswith(begun.strip().rstrip(".")):
                        continue
                    text, begun = begun, None
                for event in check.feed(text):
                    yield Token(event) if isinstance(event, str) else event
        if refused:
            yield Done("refused", written)
            return
        if begun is not None and not begun.strip():  # it said nothing: better the documents' words
            async for event in self._extracted(call, base, question, model, found, written):
                yield event
            return
        if begun is not None and begun.strip().rstrip(".") == NOT_FOUND:
            yield Token(NOTHING)
            yield Done("not_found", written)
            return
        for event in [*check.feed(begun or ""), *check.end()]:
            yield Token(event) if isinstance(event, str) else event
        yield Done("written", written)

    async def _documents(self, base: Base, chunks: Sequence[RetrievedChunk]) -> dict[str, Source]:
        out: dict[str, Source] = {}
        for document in {c.document: None for c in chunks}:
            row = await self._bases.store.get(base.row.id, document)
            if row is None:
                continue
            try:
                text = await self._bases.texts.read(base.row.id, document)
            except Unavailable:  # another server has it: what is cited counts as not verified
                text = ""
            out[document] = Source(text, row.pages)
        return out


def _joined(question: Question) -> str:
    """The question with the last one of the conversation before it, so that a follow-up ("and in
    winter?") finds what it is about where no language model makes it whole."""
    earlier = [text for role, text in question.history if role == "user"]
    return f"{earlier[-1]} {question.text}" if earlier else question.text
