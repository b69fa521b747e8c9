"""Answers without a language model: the sentences of the chunks that answer best, word by word."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from forebay_server.core.call import Call
from forebay_server.dataplane.embedding import TextEmbedder
from forebay_server.indexes.analysis import analyzer
from forebay_server.knowledge.bases import Base
from forebay_server.knowledge.retrieval import RetrievedChunk
from forebay_server.knowledge.sentences import sentence_spans

#: Sentences that are compared by meaning; the others have no word and no place in their favour.
COMPARED = 8
#: Characters of a sentence that are compared; what a sentence is about stands in its beginning.
READ = 320
#: Weight of meaning against shared words in a sentence's score.
MEANING = 0.7
#: Least score of an answer's best sentence; below it the documents do not hold the answer.
SUPPORT = 0.3
#: Least score of further sentences, as a share of the best one's.
FURTHER = 0.8
#: Characters of a sentence that is cited.
LONGEST = 1000


@dataclass(frozen=True, slots=True)
class Sentence:
    """A sentence of a chunk. `start` and `end` are characters of the document's text, `words` its
    share of the question's words by weight, `rank` its place among all sentences."""

    chunk: RetrievedChunk
    start: int
    end: int
    text: str
    words: float
    rank: int


async def best_sentences(
    embedder: TextEmbedder,
    call: Call,
    base: Base,
    question: str,
    query: str,
    chunks: Sequence[RetrievedChunk],
    most: int,
) -> list[Sentence]:
    """At most `most` sentences that answer best, by their scores; empty when none does. `query` is
    the question with what it refers to."""
    candidates = _candidates(question, chunks, base.config.language)
    if not candidates:
        return []
    texts = [s.text[:READ] for s in candidates]
    model = base.config.embedding_model
    scores = await embedder.relevance(call, model, question, texts)
    if query != question:  # a follow-up: what went before counts for a third
        scores = (2 * scores + await embedder.relevance(call, model, query, texts)) / 3
    total = MEANING * scores + (1 - MEANING) * np.array([s.words for s in candidates])
    order = np.argsort(-total, kind="stable").tolist()
    top = float(total[order[0]])
    if top < SUPPORT:
        return []
    return [candidates[i] for i in order[:most] if total[i] >= FURTHER * top]


def _candidates(query: str, chunks: Sequence[RetrievedChunk], language: str) -> list[Sentence]:
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
        Sentence(c, start, end, text, sum(weight[t] for t in shared) / whole, rank)
        for rank, (c, start, end, text, shared) in enumerate(found)
    ]
    return sorted(sentences, key=lambda s: (-s.words, s.rank))[:COMPARED]
