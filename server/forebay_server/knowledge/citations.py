"""Citations, checked: the quote stands in the document's text at its offsets, letter by letter."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from forebay_server.knowledge.retrieval import RetrievedChunk

#: A marker of a source in a written answer.
MARKER = re.compile(r"\[(\d{1,3})\]")
#: A quote in a written answer.
_QUOTE = re.compile(r"[\"“„«]([^\"“”„«»]{8,})[\"”“»]")


@dataclass(frozen=True, slots=True)
class Citation:
    """A place that an answer rests on. `start` and `end` are characters of the document's text."""

    number: int
    chunk: RetrievedChunk
    start: int
    end: int
    quote: str
    verified: bool


def cite(number: int, chunk: RetrievedChunk, start: int, end: int, document: str) -> Citation:
    """A citation of a span, checked against the document's text."""
    quote = chunk.text[start - chunk.start : end - chunk.start]
    verified = bool(quote) and document[start:end] == quote
    return Citation(number, chunk, start, end, quote, verified)


def check_written(
    answer: str, sources: Sequence[RetrievedChunk], documents: dict[str, str]
) -> list[Citation]:
    """The citations of a written answer, in order of their markers.

    Every marker must name a source that was given. Quotes before a marker, in its sentence, must
    stand in that source; a quote that does not makes an unverified citation.
    """
    out: list[Citation] = []
    begin = 0
    for match in MARKER.finditer(answer):
        number = int(match[1])
        quotes = _QUOTE.findall(answer[begin : match.start()])
        begin = match.end()
        if not 1 <= number <= len(sources):
            continue
        chunk = sources[number - 1]
        text = documents.get(chunk.document, "")
        if not quotes:
            out.append(cite(number, chunk, chunk.start, chunk.end, text))
        for quote in quotes:
            at = chunk.text.find(quote)
            if at < 0:
                out.append(Citation(number, chunk, chunk.start, chunk.start, quote, False))
            else:
                start = chunk.start + at
                out.append(cite(number, chunk, start, start + len(quote), text))
    return out
