"""Texts to vectors for other use cases: ingest, searches by text. Awaitable, on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from forebay.errors import QueueFull
from numpy.typing import NDArray

from forebay_server.core.call import Call
from forebay_server.dataplane import heads
from forebay_server.dataplane.models import ServedModel
from forebay_server.dataplane.parts import as_part
from forebay_server.dataplane.texts import TextJob, TextOutcome, TextPipeline
from forebay_server.dataplane.tokenization import TextInput

#: Texts of one submission: a long job gives way to short calls in between.
PIECE = 64
#: Submissions of one job that are in flight at once, so that the next batch is ready.
IN_FLIGHT = 2

#: What gets the outcome of a job.
Done = Callable[[TextOutcome], None]


@dataclass(frozen=True, slots=True)
class Embedded:
    """Vectors [texts, dimensions] of unit or the model's own length, and what they took."""

    vectors: NDArray[np.float32]
    model: str
    version: int
    tokens: int
    truncated: int


def embedding_job(
    call: Call, ref: str, texts: Sequence[str], prompt: str, path: str, done: Done
) -> TextJob:
    """The TextJob that gives vectors of texts. `done` gets a TextOutcome.

    Args:
        prompt: name of the model's prompt, `query` or `document`; models without it need none.
    """

    def inputs(model: ServedModel) -> Sequence[TextInput]:
        before = model.manifest.embedding_head.prompts.get(prompt, "")
        return [before + t for t in texts] if before else list(texts)

    return TextJob(call, ref, ("embedding",), inputs, done, path=path)


def matrix(outcome: TextOutcome) -> NDArray[np.float32]:
    """The outcome's vectors, as the model's card says."""
    head = outcome.model.manifest.embedding_head
    return heads.vectors(
        outcome.rows, normalize=head.normalize, normalized_by_model=head.normalize, dimensions=None
    )


class TextEmbedder:
    """See the module."""

    def __init__(self, texts: TextPipeline) -> None:
        self._texts = texts

    async def embed(
        self, call: Call, ref: str, texts: Sequence[str], prompt: str = "document"
    ) -> Embedded:
        """Vectors of all texts. Waits when the model's queue is full.

        Args:
            call: the call that this is part of: its key, deadline and cancellation hold.

        Raises:
            ForebayError: as EmbeddingService would.
        """
        pieces = [texts[i : i + PIECE] for i in range(0, len(texts), PIECE)]
        room = asyncio.Semaphore(IN_FLIGHT)

        async def one(piece: Sequence[str]) -> tuple[TextOutcome, Call]:
            async with room:
                return await self._piece(call, ref, piece, prompt)

        tasks = [asyncio.create_task(one(p)) for p in pieces]
        try:
            found = await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            raise
        facts = [child.facts for _, child in found]
        return Embedded(
            np.concatenate([matrix(outcome) for outcome, _ in found]),
            facts[0].model,
            facts[0].version,
            sum(f.tokens for f in facts),
            sum(f.truncated for f in facts),
        )

    async def relevance(
        self, call: Call, ref: str, query: str, documents: Sequence[str]
    ) -> NDArray[np.float32]:
        """Scores [documents] of a reranker: a cross-encoder, or an embedding model by cosine."""
        kinds: list[str] = []

        def inputs(model: ServedModel) -> Sequence[TextInput]:
            kinds.append(model.manifest.task)
            if model.manifest.task == "rerank":
                return [(query, d) for d in documents]
            prompts = model.manifest.embedding_head.prompts
            return [
                prompts.get("query", "") + query,
                *(prompts.get("document", "") + d for d in documents),
            ]

        def job(child: Call, done: Done) -> TextJob:
            return TextJob(child, ref, ("rerank", "embedding"), inputs, done, path="documents")

        outcome, child = await self._once(call, job)
        call.facts.tokens += child.facts.tokens
        if kinds[-1] == "rerank":
            logits = np.stack(outcome.rows)
            return heads.activate(logits[:, 0], outcome.model.manifest.rerank_head.activation)
        unit = heads.vectors(
            outcome.rows, normalize=True, normalized_by_model=False, dimensions=None
        )
        return unit[1:] @ unit[0]

    async def _piece(
        self, call: Call, ref: str, texts: Sequence[str], prompt: str
    ) -> tuple[TextOutcome, Call]:
        while True:
            try:
                return await self._once(
                    call,
                    lambda child, done: embedding_job(child, ref, texts, prompt, "texts", done),
                )
            except QueueFull as e:
                await asyncio.sleep(e.retry_after_s or 0.1)

    async def _once(
        self, call: Call, make: Callable[[Call, Done], TextJob]
    ) -> tuple[TextOutcome, Call]:
        # Tokenising takes a while: not on the event loop.
        return await as_part(call, lambda child, done: self._texts.run([make(child, done)]))
