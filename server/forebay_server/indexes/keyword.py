"""BM25 over one text field: exact scores, any order of writes, deletions that count at once.

Documents live in immutable segments, each a matrix of term frequencies in compressed columns (as
bm25s has it) and the documents' own term ids (for phrases, deletions and merges). An append makes a
small segment; when many of one size have gathered they are merged, so that a document is copied a
logarithmic number of times. Frequencies of terms over all live documents are kept beside them and
weights are computed at search time, so that an update makes no score wrong: scores are those of
rank_bm25's BM25Plus with delta 0 over the live documents (weight of a term: ln((N + 1) / df), which
is positive in the smallest collections too). Why not bm25s or tantivy: docs/adr/0008.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forebay_server.indexes.analysis import analyzer
from forebay_server.indexes.arrays import GrowingArray

Mask = NDArray[np.bool_]
#: Segments of one size class that are merged into one.
MERGE_AT = 8
MAX_SEGMENTS = 48
_QUOTED = re.compile(r'"([^"]+)"')


@dataclass(frozen=True, slots=True)
class Segment:
    """Documents of the slots in `slots`, which rise.

    Attributes:
        starts: [documents + 1] where each document's terms begin in `terms`.
        terms: term ids of all documents, in their texts' order.
        columns: [distinct terms] term ids that stand in it, rising.
        column_starts: [distinct terms + 1] where each term's postings begin.
        docs, frequencies: [postings] document (place in `slots`) and how often the term stands in it.
    """

    slots: NDArray[np.int32]
    starts: NDArray[np.int64]
    terms: NDArray[np.int32]
    columns: NDArray[np.int32]
    column_starts: NDArray[np.int64]
    docs: NDArray[np.int32]
    frequencies: NDArray[np.int32]

    @classmethod
    def of(
        cls, slots: NDArray[np.int32], starts: NDArray[np.int64], terms: NDArray[np.int32]
    ) -> Segment:
        """The segment of these documents."""
        owner = np.repeat(np.arange(len(slots), dtype=np.int64), np.diff(starts))
        keys, counts = np.unique((terms.astype(np.int64) << 32) | owner, return_counts=True)
        columns, at = np.unique(keys >> 32, return_index=True)
        return cls(
            slots,
            starts,
            terms,
            columns.astype(np.int32),
            np.append(at, len(keys)).astype(np.int64),
            (keys & 0xFFFFFFFF).astype(np.int32),
            counts.astype(np.int32),
        )

    def postings(self, term: int) -> tuple[NDArray[np.int32], NDArray[np.int32]] | None:
        """(slots, frequencies) of a term; None when it is not here."""
        i = int(np.searchsorted(self.columns, term))
        if i >= len(self.columns) or self.columns[i] != term:
            return None
        part = slice(self.column_starts[i], self.column_starts[i + 1])
        return self.slots[self.docs[part]], self.frequencies[part]

    def document(self, slot: int) -> NDArray[np.int32] | None:
        """A document's terms; None when it is not here."""
        i = int(np.searchsorted(self.slots, slot))
        if i >= len(self.slots) or self.slots[i] != slot:
            return None
        return self.terms[self.starts[i] : self.starts[i + 1]]

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        return sum(getattr(self, name).nbytes for name in self.__slots__)


def _merge(parts: Sequence[Segment], alive: Mask) -> Segment:
    """One segment of the live documents of several that follow one another."""
    slots, lengths, terms = [], [], []
    for p in parts:
        keep = alive[p.slots]
        slots.append(p.slots[keep])
        size = np.diff(p.starts)
        lengths.append(size[keep])
        terms.append(p.terms[np.repeat(keep, size)])
    starts = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64)
    return Segment.of(np.concatenate(slots), starts, np.concatenate(terms))


@dataclass(frozen=True, slots=True, eq=False)
class KeywordView:
    """What one search sees: segments, and counts over all live documents."""

    segments: tuple[Segment, ...]
    documents: int
    tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class Frozen:
    """A keyword index of one moment, to be written down."""

    view: KeywordView
    lengths: NDArray[np.int32]
    frequency: NDArray[np.int32]
    vocabulary: list[str]


class KeywordIndex:
    """See the module. One writer, any readers; slots are given by the caller and rise."""

    def __init__(self, language: str = "", k1: float = 1.2, b: float = 0.75) -> None:
        self.analyzer = analyzer(language)
        self.k1, self.b = k1, b
        self._vocabulary: dict[str, int] = {}
        self._frequency = GrowingArray(np.int32)  # documents that hold each term
        self._lengths = GrowingArray(np.int32)  # by slot
        self._published = KeywordView((), 0, 0)

    # The writer's side.

    def append(self, slots: Sequence[int], texts: Sequence[str], alive: Mask) -> None:
        """Add documents. A slot below the newest is not allowed; slots without text are left out.

        Args:
            alive: by slot, for the merges that an append may start; the new slots need not be there.
        """
        vocabulary = self._vocabulary
        ids = [
            np.fromiter(
                (vocabulary.setdefault(t, len(vocabulary)) for t in self.analyzer.terms(text)),
                np.int32,
            )
            for text in texts
        ]
        if len(vocabulary) > len(self._frequency):
            self._frequency.append(np.zeros(len(vocabulary) - len(self._frequency), np.int32))
        if not ids:
            return
        sizes = np.array([len(i) for i in ids], np.int64)
        gap = slots[0] - len(self._lengths)
        lengths = np.zeros(slots[-1] - slots[0] + 1 + gap, np.int32)
        lengths[np.asarray(slots) - slots[0] + gap] = sizes
        self._lengths.append(lengths)
        starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        new = Segment.of(np.asarray(slots, np.int32), starts, np.concatenate(ids))
        frequency = self._frequency.view()
        frequency[new.columns] += np.diff(new.column_starts).astype(np.int32)
        now = self._published
        known = np.concatenate([alive, np.ones(max(0, slots[-1] + 1 - len(alive)), bool)])
        self._published = KeywordView(
            _tiered((*now.segments, new), known),
            now.documents + len(ids),
            now.tokens + int(sizes.sum()),
        )

    def delete(self, slots: Sequence[int]) -> None:
        """Take documents out of the counts. Their postings go at the next merge; until then the
        caller's mask hides them. Comes before the append that replaces them."""
        documents = tokens = 0
        frequency = self._frequency.view()
        now = self._published
        for slot in slots:
            found = self._document(now, slot)
            if found is not None:
                frequency[np.unique(found)] -= 1
                documents += 1
                tokens += len(found)
        self._published = KeywordView(now.segments, now.documents - documents, now.tokens - tokens)

    @staticmethod
    def _document(published: KeywordView, slot: int) -> NDArray[np.int32] | None:
        for segment in published.segments:
            found = segment.document(slot)
            if found is not None:
                return found
        return None

    # The readers' side.

    @property
    def nbytes(self) -> int:
        """Bytes in memory, roughly."""
        own = self._frequency.nbytes + self._lengths.nbytes + 110 * len(self._vocabulary)
        return own + sum(s.nbytes for s in self._published.segments)

    def view(self) -> KeywordView:
        """The documents of this moment; searches may take it instead of the newest."""
        return self._published

    def score(
        self, query: str, n: int, view: KeywordView | None = None
    ) -> tuple[NDArray[np.float64], Mask]:
        """BM25 scores [n] of the slots below n, and which of them hold a word of the query.

        Words that stand twice in the query count twice. Phrases in double quotes must be there.
        """
        published = view or self._published
        scores = np.zeros(n)
        hit = np.zeros(n, bool)
        wanted = Counter(
            self._vocabulary[t] for t in self.analyzer.terms(query) if t in self._vocabulary
        )
        if not wanted or not published.documents:
            return scores, hit
        frequency = self._frequency.view()
        lengths = self._lengths.view()
        mean = published.tokens / published.documents
        weights = {
            term: times * math.log((published.documents + 1) / frequency[term])
            for term, times in wanted.items()
            if term < len(frequency) and frequency[term] > 0
        }
        for segment in published.segments:
            for term, weight in weights.items():
                found = segment.postings(term)
                if found is None:
                    continue
                slots, frequencies = _below(*found, n)
                norm = self.k1 * (1 - self.b + self.b * lengths[slots] / mean)
                scores[slots] += weight * (frequencies * (self.k1 + 1) / (frequencies + norm))
                hit[slots] = True
        for phrase in _QUOTED.findall(query):
            hit &= self.holding(phrase, n, True, published)
        return scores, hit

    def holding(
        self, text: str, n: int, phrase: bool = False, view: KeywordView | None = None
    ) -> Mask:
        """Which slots below n hold all words of a text; one after another for a phrase."""
        out = np.zeros(n, bool)
        terms = self.analyzer.terms(text)
        ids = [self._vocabulary.get(t, -1) for t in terms]
        if not ids or -1 in ids:
            return out
        for segment in (view or self._published).segments:
            slots: NDArray[np.int32] | None = None
            for term in set(ids):
                found = segment.postings(term)
                mine = _below(*found, n)[0] if found is not None else np.zeros(0, np.int32)
                slots = mine if slots is None else np.intersect1d(slots, mine, assume_unique=True)
                if not len(slots):
                    break
            if slots is None or not len(slots):
                continue
            if phrase and len(ids) > 1:
                pattern = np.array(ids, np.int32)
                keep = [_stands_in(segment.document(int(s)), pattern) for s in slots]
                slots = slots[np.array(keep, bool)]
            out[slots] = True
        return out

    # Saving.

    def freeze(self) -> Frozen:
        """What `state_of` writes down. The writer waits for it; it is quick."""
        return Frozen(
            self._published,
            self._lengths.view(),
            self._frequency.view()[: len(self._vocabulary)].copy(),  # counted on in place
            list(self._vocabulary),
        )

    @staticmethod
    def state_of(frozen: Frozen, alive: Mask) -> tuple[dict[str, NDArray[Any]], list[str]]:
        """Arrays and vocabulary that `restore` takes; one segment of the live documents."""
        arrays: dict[str, NDArray[Any]] = {
            "lengths": frozen.lengths,
            "frequency": frozen.frequency,
        }
        if frozen.view.segments:
            whole = _merge(frozen.view.segments, alive)
            arrays |= {f"segment.{name}": getattr(whole, name) for name in Segment.__slots__}
        return arrays, frozen.vocabulary

    def restore(self, arrays: Mapping[str, NDArray[Any]], vocabulary: Sequence[str]) -> None:
        """Take over a saved state."""
        self._vocabulary = {term: i for i, term in enumerate(vocabulary)}
        self._lengths = GrowingArray(np.int32, first=arrays["lengths"])
        self._frequency = GrowingArray(np.int32, first=arrays["frequency"])
        if "segment.slots" in arrays:
            s = Segment(*(arrays[f"segment.{name}"] for name in Segment.__slots__))
            self._published = KeywordView((s,), len(s.slots), len(s.terms))


def _tiered(segments: tuple[Segment, ...], alive: Mask) -> tuple[Segment, ...]:
    """Merge the newest segments while MERGE_AT stand at the end of which none is of a greater size
    class than the last; or when there are too many, whatever their sizes."""
    out = list(segments)
    while len(out) >= MERGE_AT:
        tail = out[-MERGE_AT:]
        size = [max(1, len(s.terms)).bit_length() // 3 for s in tail]
        if max(size) > size[-1] and len(out) < MAX_SEGMENTS:
            break
        out[-MERGE_AT:] = [_merge(tail, alive)]
    return tuple(out)


def _below(
    slots: NDArray[np.int32], values: NDArray[np.int32], n: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Without what is newer than the reader's view."""
    if len(slots) and slots[-1] >= n:
        end = int(np.searchsorted(slots, n))
        return slots[:end], values[:end]
    return slots, values


def _stands_in(document: NDArray[np.int32] | None, pattern: NDArray[np.int32]) -> bool:
    if document is None or len(document) < len(pattern):
        return False
    windows = np.lib.stride_tricks.sliding_window_view(document, len(pattern))
    return bool((windows == pattern).all(axis=1).any())
