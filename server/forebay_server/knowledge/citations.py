"""Citations, checked: the quote stands in the document's text at its offsets, letter by letter; and
written answers, checked while they come."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from forebay_server.indexes.analysis import analyzer
from forebay_server.knowledge.retrieval import RetrievedChunk
from forebay_server.knowledge.sentences import ends_sentence, sentence_spans

Reason = Literal["no_such_source", "quote_not_found", "no_citation", "not_in_source"]

#: Characters of a quote that is waited for; what is longer is no quote.
LONGEST_QUOTE = 600
#: Characters from which on quoted words are held to stand in a source; less are just a word.
SHORTEST_QUOTE = 8
#: Share of a sentence's words that the sources that it cites must have.
SHARED = 0.4
#: A marker of sources in an answer.
MARKER = re.compile(r"\[(\d{1,3}(?:\s?[,;]\s?\d{1,3}){0,9})\]")
_MARKER_BEGUN = re.compile(r"\[(?:\d{1,3}\s?[,;]\s?){0,9}\d{0,3}\s?$")
_QUOTES = {'"': '"', "“": "”", "„": "“”", "«": "»"}
_SPECIAL = re.compile(r'[\["“„«]')
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_STOP = ".!?…。！？।؟"


@dataclass(frozen=True, slots=True)
class Citation:
    """A place that an answer rests on. All offsets are characters of the document's text; between
    `answer_start` and `answer_end` stand the words that answer by themselves, as far as is known.
    `page` is where the quote begins, which need not be where its chunk begins."""

    number: int
    chunk: RetrievedChunk
    page: int
    start: int
    end: int
    quote: str
    verified: bool
    answer_start: int = 0
    answer_end: int = 0

    @property
    def answer(self) -> str:
        """The words that answer by themselves; empty when they are not known."""
        return self.quote[
            max(0, self.answer_start - self.start) : max(0, self.answer_end - self.start)
        ]


@dataclass(frozen=True, slots=True)
class Source:
    """A document that is cited: its text, and where its pages begin (none = it has no pages)."""

    text: str = ""
    pages: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Unsupported:
    """A piece of an answer, in its characters, that no source supports."""

    start: int
    end: int
    reason: Reason


def cite(
    number: int,
    chunk: RetrievedChunk,
    start: int,
    end: int,
    document: Source,
    answer: tuple[int, int] | None = None,
) -> Citation:
    """A citation of a span, checked against the document's text. `answer` is where, from `start` on,
    the words stand that answer by themselves."""
    quote = chunk.text[start - chunk.start : end - chunk.start]
    verified = bool(quote) and document.text[start:end] == quote
    page = bisect_right(document.pages, start) or chunk.page
    a, b = answer or (-start, -start)
    return Citation(number, chunk, page, start, end, quote, verified, start + a, start + b)


@dataclass(slots=True)
class _Sentence:
    """The sentence that is being written."""

    start: int
    numbers: set[int] = field(default_factory=set)
    #: Quotes that were found, by the numbers of the sources that have them: number -> place.
    quotes: list[dict[int, tuple[int, int]]] = field(default_factory=list)


class AnswerCheck:
    """Checks a written answer piece by piece.

    Markers and quotes are held back until they are whole and checked; all else passes at once.
    `feed` and `end` give, in order, pieces of text and what is known of them: an Unsupported for a
    marker or a quote comes before its text, one for a sentence, and Citations, come after.

    Args:
        sources: the chunks that the model was given, as numbered from 1.
        documents: their documents.
    """

    def __init__(
        self, sources: Sequence[RetrievedChunk], documents: Mapping[str, Source], language: str
    ) -> None:
        self._sources = sources
        self._documents = documents
        self._terms = analyzer(language).terms
        self._source_terms: dict[int, set[str]] = {}
        self._held = ""
        self.text = ""
        self._sentence = _Sentence(0)
        self._cited: set[tuple[int, int, int]] = set()

    def feed(self, piece: str) -> list[str | Citation | Unsupported]:
        """The answer goes on."""
        self._held += piece
        return self._advance(last=False)

    def end(self) -> list[str | Citation | Unsupported]:
        """The answer has ended."""
        return [*self._advance(last=True), *self._close(len(self.text))]

    def _advance(self, last: bool) -> list[str | Citation | Unsupported]:
        out: list[str | Citation | Unsupported] = []
        while self._held:
            found = _SPECIAL.search(self._held)
            if found is None:
                out += self._plain(len(self._held))
            elif found.start():
                out += self._plain(found.start())
            elif found[0] == "[":
                marker = MARKER.match(self._held)
                if marker:
                    out += self._marker(marker)
                elif not last and _MARKER_BEGUN.match(self._held):
                    break
                else:
                    out += self._plain(1)
            else:
                end = _quote_end(self._held)
                if end > SHORTEST_QUOTE:
                    out += self._quote(end)
                elif end or last:
                    out += self._plain(max(1, end))
                else:
                    break
        return out

    def _release(self, count: int) -> str:
        piece, self._held = self._held[:count], self._held[count:]
        self.text += piece
        return piece

    def _plain(self, count: int) -> list[str | Citation | Unsupported]:
        """Text passes; a sentence that has ended before it is judged."""
        out: list[str | Citation | Unsupported] = []
        while count:
            cut = self._sentence_end(count)
            if cut is None:
                out.append(self._release(count))
                break
            if cut:
                out.append(self._release(cut))
                count -= cut
            out += self._close(len(self.text))
        return out

    def _sentence_end(self, count: int) -> int | None:
        """Where, in what is held, the next sentence begins; None while this one goes on."""
        so_far = self.text[self._sentence.start :]
        for i, letter in enumerate(self._held[:count]):
            if letter.isspace():
                continue
            raw = so_far + self._held[:i]
            body = raw.rstrip()
            said = MARKER.sub("", body).rstrip()
            if not said:
                continue
            apart = len(body) < len(raw) or said[-1] in "。！？" or said != body
            if apart and ("\n" in raw[len(body) :] or _ended(said, letter)):
                return i
        return None

    def _marker(self, match: re.Match[str]) -> list[str | Citation | Unsupported]:
        numbers = [int(n) for n in re.findall(r"\d+", match[1])]
        start = len(self.text)
        known = [n for n in numbers if 1 <= n <= len(self._sources)]
        out: list[str | Citation | Unsupported] = []
        if len(known) < len(numbers):
            out.append(Unsupported(start, start + match.end(), "no_such_source"))
        said = self.text[self._sentence.start :]
        out.append(self._release(match.end()))
        for number in known:
            self._sentence.numbers.add(number)
            places = [q.pop(number) for q in self._sentence.quotes if number in q]
            self._sentence.quotes = [q for q in self._sentence.quotes if q and not places]
            for a, b in places or [self._best_place(number, said)]:
                out += self._cite(number, a, b)
        return out

    def _quote(self, end: int) -> list[str | Citation | Unsupported]:
        words = self._held[1 : end - 1].strip()
        pattern = re.compile(r"\s+".join(re.escape(w) for w in words.rstrip(".,;:!?").split()))
        places = {
            number: (chunk.start + found.start(), chunk.start + found.end())
            for number, chunk in enumerate(self._sources, 1)
            if (found := pattern.search(chunk.text))
        }
        out: list[str | Citation | Unsupported] = []
        if self._sentence_end(1) == 0:
            out += self._close(len(self.text))
        start = len(self.text)
        if places:
            self._sentence.quotes.append(places)
        else:
            out.append(Unsupported(start, start + end, "quote_not_found"))
        out.append(self._release(end))
        return out

    def _close(self, end: int) -> list[str | Citation | Unsupported]:
        """Judge the sentence that ends at `end` of the answer."""
        sentence, start = self._sentence, self._sentence.start
        self._sentence = _Sentence(end)
        out: list[str | Citation | Unsupported] = []
        for places in sentence.quotes:  # quoted without a marker: where it was found is cited
            number = min(places)
            sentence.numbers.add(number)
            out += self._cite(number, *places[number])
        whole = self.text[start:end]
        start += len(whole) - len(whole.lstrip())
        end -= len(whole) - len(whole.rstrip())
        said = MARKER.sub(" ", whole).strip()
        if len(said.split()) < 2 and len(said) < SHORTEST_QUOTE:
            return out
        if sentence.numbers:
            if not self._supported(said, sentence.numbers):
                out.append(Unsupported(start, end, "not_in_source"))
        elif not said.endswith(":"):
            out.append(Unsupported(start, end, "no_citation"))
        return out

    def _supported(self, said: str, numbers: set[int]) -> bool:
        """Whether cited sources have a sentence's numbers, and enough of its words."""
        text = " ".join(self._sources[n - 1].text for n in numbers)
        there = set(_NUMBER.findall(text))
        if any(n not in there for n in _NUMBER.findall(said)):
            return False
        terms = set(self._terms(said))
        known: set[str] = set()
        for n in numbers:
            if n not in self._source_terms:
                self._source_terms[n] = set(self._terms(self._sources[n - 1].text))
            known |= self._source_terms[n]
        return not terms or len(terms & known) >= SHARED * len(terms)

    def _best_place(self, number: int, said: str) -> tuple[int, int]:
        """The sentence of a source that shares most words with what is said."""
        chunk = self._sources[number - 1]
        wanted = set(self._terms(said))
        best, place = 0, (chunk.start, chunk.end)
        for a, b in sentence_spans(chunk.text):
            shared = len(wanted & set(self._terms(chunk.text[a:b])))
            if shared > best:
                best, place = shared, (chunk.start + a, chunk.start + b)
        return place

    def _cite(self, number: int, start: int, end: int) -> list[str | Citation | Unsupported]:
        if (number, start, end) in self._cited:
            return []
        self._cited.add((number, start, end))
        chunk = self._sources[number - 1]
        return [cite(number, chunk, start, end, self._documents.get(chunk.document, Source()))]


def _quote_end(text: str) -> int:
    """Where the quote that a text begins with ends; 0 while that is open, -1 when it is none."""
    closing = _QUOTES[text[0]]
    for i, letter in enumerate(text[1 : LONGEST_QUOTE + 1], 1):
        if letter in closing:
            return i + 1
        if letter == "\n" and text[i - 1] == "\n":
            return -1
    return -1 if len(text) > LONGEST_QUOTE else 0


def _ended(said: str, following: str) -> bool:
    """Whether a sentence is whole, given the letter that follows it after blanks and markers."""
    bare = said.rstrip('"”’»)')
    if not bare or bare[-1] not in _STOP:
        return False
    if bare[-1] != "." or len(bare) < len(said):
        return True
    return ends_sentence(f"{bare} {following}", len(bare) - 1)
