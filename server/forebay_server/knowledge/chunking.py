"""Documents into chunks: by tokens of the embedding model, sentences, headings, or parent and child.

Every chunk is a span of the document's text, so that a citation can be looked up where it stands.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from forebay_server.knowledge.parsers import Parsed
from forebay_server.knowledge.sentences import sentence_spans

Method = Literal["tokens", "sentence", "heading", "parent_child"]
#: (start, end) of every token of a text, in characters.
TokenSpans = Callable[[str], list[tuple[int, int]]]
#: Tokens of a child chunk, as a share of what the model takes; and of parents without a setting.
CHILD_TOKENS = 128


@dataclass(frozen=True, slots=True)
class ChunkConfig:
    """How to cut. `overlap` None = a fifth of `tokens`."""

    method: Method = "tokens"
    tokens: int = 1000
    overlap: int | None = None

    def capped(self, most: int) -> tuple[int, int]:
        """(tokens, overlap) that a model with room for `most` tokens allows; the overlap shrinks
        with the chunk."""
        tokens = min(self.tokens, most)
        overlap = tokens // 5 if self.overlap is None else self.overlap * tokens // self.tokens
        return tokens, min(overlap, tokens - 1)


@dataclass(frozen=True, slots=True)
class ChunkSpan:
    """A chunk: where it stands; the larger span around it (itself, but for parent_child)."""

    start: int
    end: int
    page: int
    headings: tuple[str, ...]
    parent_start: int
    parent_end: int


def chunk(
    document: Parsed, config: ChunkConfig, spans_of: TokenSpans, most: int
) -> list[ChunkSpan]:
    """The chunks of a document, in order.

    Args:
        spans_of: the embedding model's tokenizer.
        most: tokens that the model takes, special ones not counted.
    """
    text = document.text
    tokens, overlap = config.capped(most)
    if config.method == "sentence":
        places = [(s, e, s, e) for s, e in _pack(text, spans_of, tokens)]
    elif config.method == "heading":
        places = [
            (s, e, s, e)
            for a, b in _sections(document)
            for s, e in _windows(text, a, b, spans_of, tokens, overlap)
        ]
    elif config.method == "parent_child":
        parents = _windows(text, 0, len(text), spans_of, config.tokens, 0)
        small = min(CHILD_TOKENS, most, max(1, config.tokens // 2))
        places = [
            (s, e, a, b)
            for a, b in parents
            for s, e in _windows(text, a, b, spans_of, small, small // 5)
        ]
    else:
        places = [(s, e, s, e) for s, e in _windows(text, 0, len(text), spans_of, tokens, overlap)]
    above = _Headings(document.headings)
    return [
        ChunkSpan(s, e, bisect_right(document.pages, s), above.at(s), a, b) for s, e, a, b in places
    ]


def _windows(
    text: str, start: int, end: int, spans_of: TokenSpans, tokens: int, overlap: int
) -> list[tuple[int, int]]:
    """Windows over [start, end) of at most `tokens` tokens."""
    part = text[start:end]
    spans = [s for s in spans_of(part) if s[1] > s[0]]
    if not spans:
        return []
    sentence_ends = [e for _, e in sentence_spans(part)]
    out: list[tuple[int, int]] = []
    first = 0
    while True:
        last = min(first + tokens, len(spans))
        if last < len(spans):
            last = _good_end(spans, first, last, sentence_ends, part)
        out.append((start + spans[first][0], start + spans[last - 1][1]))
        if last >= len(spans):
            return out
        following = max(first + 1, last - overlap)
        while following < last and not _begins_word(part, spans[following][0]):
            following += 1
        first = following


def _good_end(
    spans: list[tuple[int, int]], first: int, last: int, ends: list[int], part: str
) -> int:
    """A sentence's end in the last quarter of the window, else a word's end, else its own end."""
    low = first + max(1, (last - first) * 3 // 4)
    at = bisect_right(ends, spans[last - 1][1]) - 1
    if at >= 0 and ends[at] > spans[low - 1][1]:
        found = bisect_left([s[1] for s in spans[low:last]], ends[at])
        return min(last, low + found + 1)
    while last > low and not _begins_word(part, spans[last][0]):
        last -= 1
    return last


def _begins_word(text: str, at: int) -> bool:
    return at == 0 or not (text[at - 1].isalnum() and text[at].isalnum() and text[at] < "\u2e80")


def _pack(text: str, spans_of: TokenSpans, tokens: int) -> list[tuple[int, int]]:
    """Runs of whole sentences that fit; a sentence that does not fit is cut."""
    starts = [s for s, _ in spans_of(text)]
    out: list[tuple[int, int]] = []
    size = 0
    for s, e in sentence_spans(text):
        count = bisect_left(starts, e) - bisect_left(starts, s)
        if count > tokens:
            out.extend(_windows(text, s, e, spans_of, tokens, 0))
            size = tokens
        elif out and size + count <= tokens:
            out[-1] = (out[-1][0], e)
            size += count
        else:
            out.append((s, e))
            size = count
    return out


def _sections(document: Parsed) -> list[tuple[int, int]]:
    starts = sorted({0, *(h[0] for h in document.headings)})
    return list(zip(starts, [*starts[1:], len(document.text)], strict=True))


class _Headings:
    """The headings above places that are asked for in order: a text of many headings and chunks is
    gone through once, not once for each chunk."""

    def __init__(self, headings: Sequence[tuple[int, int, str]]) -> None:
        self._headings = headings
        self._next = 0
        self._above: list[tuple[int, str]] = []

    def at(self, place: int) -> tuple[str, ...]:
        """Those above a place, outermost first."""
        while self._next < len(self._headings) and self._headings[self._next][0] <= place:
            _, level, title = self._headings[self._next]
            while self._above and self._above[-1][0] >= level:
                self._above.pop()
            self._above.append((level, title))
            self._next += 1
        return tuple(title for _, title in self._above)
