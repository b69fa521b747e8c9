"""One collection in memory: dense vectors, keyword fields, payload columns, and who is alive.

Every write of a point takes a new slot (0, 1, 2, ...); what it replaces stays, dead, until the
collection is rebuilt. A search works on a `View`: counts and a mask of live slots that are swapped
in one step after a write has reached every part, so it sees all of a write or nothing.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forebay_server.indexes.arrays import GrowingArray
from forebay_server.indexes.dense import DenseConfig, DenseIndex, DenseView
from forebay_server.indexes.filters import Filter, Ids, Words
from forebay_server.indexes.keyword import KeywordIndex, KeywordView
from forebay_server.indexes.payloads import Mask, PayloadIndex

#: Masks of filters that are kept for a view.
KEPT_MASKS = 64


@dataclass(frozen=True, slots=True)
class TextFieldConfig:
    """A string of the payload that keyword search looks into."""

    path: str
    language: str = ""
    boost: float = 1.0


@dataclass(frozen=True, slots=True)
class CollectionConfig:
    """What a collection is. `dense` is None for collections without vectors."""

    dense: DenseConfig | None
    text_fields: tuple[TextFieldConfig, ...] = ()
    k1: float = 1.2
    b: float = 0.75
    embedding_model: str = ""


@dataclass(frozen=True, slots=True)
class IndexedPoint:
    """A point as the index takes it. `label` is the truth's number of this write; they rise."""

    label: int
    id: str
    vector: NDArray[np.float32] | None
    payload: Mapping[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """What one search sees. `alive` is by slot; slots beyond its end are not there."""

    alive: Mask
    live: int
    dense: DenseView | None
    keyword: Mapping[str, KeywordView]
    masks: OrderedDict[Filter, Mask] = field(default_factory=OrderedDict)

    @property
    def whole(self) -> bool:
        """Whether no slot is dead."""
        return self.live == len(self.alive)


def text_at(payload: Mapping[str, Any], path: str) -> str:
    """The string at a dotted path; lists of strings are joined; empty when there is none."""
    value: Any = payload
    for part in path.split("."):
        if not isinstance(value, Mapping):
            return ""
        value = value.get(part)
    if isinstance(value, list):
        return "\n".join(v for v in value if isinstance(v, str))
    return value if isinstance(value, str) else ""


#: Makes a dense index.
DenseMaker = Callable[[DenseConfig, Callable[[], NDArray[np.int64]]], DenseIndex]


def _by_faiss(config: DenseConfig, labels: Callable[[], NDArray[np.int64]]) -> DenseIndex:
    return DenseIndex(config)


class CollectionIndex:
    """See the module. Writers take turns by the lock inside; readers need none."""

    def __init__(self, config: CollectionConfig, make: DenseMaker = _by_faiss) -> None:
        """Args: make: the dense index of a configuration, given a look at the labels by slot."""
        self.config = config
        self.dense = make(config.dense, lambda: self.labels.view()) if config.dense else None
        self.keyword = {
            f.path: KeywordIndex(f.language, config.k1, config.b) for f in config.text_fields
        }
        self.payloads = PayloadIndex(f.path for f in config.text_fields)
        self.labels = GrowingArray(np.int64)
        self.ids: list[str] = []
        self.changes = 0  # points written and removed since the last save
        #: The dense index that the files hold, and their facts of it: it is not written again.
        self.saved: tuple[object, dict[str, Any]] | None = None
        self._lock = threading.RLock()
        self._view = self._make_view(np.zeros(0, bool))

    def view(self) -> View:
        """The collection of this moment."""
        return self._view

    def __len__(self) -> int:
        return self._view.live

    @property
    def next_label(self) -> int:
        """One more than the newest label; 0 when empty."""
        labels = self.labels.view()
        return int(labels[-1]) + 1 if len(labels) else 0

    @property
    def nbytes(self) -> int:
        """Bytes in memory, roughly."""
        out = self.payloads.nbytes + self.labels.nbytes + 80 * len(self.ids)
        out += sum(k.nbytes for k in self.keyword.values())
        return out + (self.dense.nbytes if self.dense is not None else 0)

    @property
    def dead_share(self) -> float:
        """Share of slots that are dead."""
        view = self._view
        return 1 - view.live / len(view.alive) if len(view.alive) else 0.0

    def sizes(self) -> dict[str, float]:
        """What metrics report."""
        view = self._view
        return {
            "points": view.live,
            "memory_bytes": self.nbytes,
            "tail_points": len(view.dense.tail) if view.dense is not None else 0,
            "dead_ratio": self.dead_share,
        }

    # The writer's side.

    def write(self, points: Sequence[IndexedPoint], gone: Sequence[int] = ()) -> None:
        """Add points, and take out the labels in `gone`; searches see both at once."""
        with self._lock:
            alive = self._view.alive.copy()
            dead = self.slots_of(gone)
            dead = dead[alive[dead]] if len(dead) else dead
            alive[dead] = False
            for keyword in self.keyword.values():
                keyword.delete(dead.tolist())
            if points:
                self._append(points, alive)
                alive = np.concatenate([alive, np.ones(len(points), bool)])
            self.changes += len(points) + len(dead)
            self._view = self._make_view(alive)

    def _append(self, points: Sequence[IndexedPoint], alive: Mask) -> None:
        first = len(self.ids)
        slots = range(first, first + len(points))
        if self.dense is not None:
            self.dense.append(np.stack([p.vector for p in points if p.vector is not None]))
        for path, keyword in self.keyword.items():
            keyword.append(slots, [text_at(p.payload, path) for p in points], alive)
        self.payloads.append(slots, [p.payload for p in points])
        self.ids.extend(p.id for p in points)
        self.labels.append(np.fromiter((p.label for p in points), np.int64, len(points)))

    def _make_view(self, alive: Mask) -> View:
        return View(
            alive,
            int(np.count_nonzero(alive)),
            self.dense.view() if self.dense is not None else None,
            {path: k.view() for path, k in self.keyword.items()},
        )

    def slots_of(self, labels: Iterable[int]) -> NDArray[np.int64]:
        """Slots of those labels that are here."""
        mine = self.labels.view()
        wanted = np.fromiter(labels, np.int64)
        if not len(mine) or not len(wanted):
            return np.zeros(0, np.int64)
        at = np.minimum(np.searchsorted(mine, wanted), len(mine) - 1)
        return at[mine[at] == wanted]

    def live_labels(self) -> NDArray[np.int64]:
        """Labels of the live points, rising."""
        with self._lock:
            return self.labels.view()[self._view.alive]

    def absorb(self, expected: int = 0, fresh: bool = False) -> None:
        """Bring the dense index up to date; writes and searches go on meanwhile. See DenseIndex."""
        if self.dense is None:
            return
        self.dense.absorb(expected, fresh)
        with self._lock:
            self._view = self._make_view(self._view.alive)
        view = self._view
        if view.dense is not None and not view.whole:
            dead = np.flatnonzero(~view.alive[: view.dense.start])
            self.dense.forget(self.labels.view()[dead])

    # The readers' side.

    def allowed(self, view: View, condition: Filter | None) -> tuple[Mask, bool]:
        """Mask of live slots that match, and whether that is every slot."""
        if condition is None:
            return view.alive, view.whole
        mask = view.masks.get(condition)
        if mask is None:
            mask = view.alive & self.payloads.mask(
                condition,
                len(view.alive),
                lambda c, n: self._words(view, c, n),
                self._with_ids,
            )
            view.masks[condition] = mask
            while len(view.masks) > KEPT_MASKS:
                view.masks.popitem(last=False)
        return mask, False

    def _words(self, view: View, condition: Words, n: int) -> Mask:
        keyword = self.keyword[condition.key]
        return keyword.holding(condition.text, n, condition.phrase, view.keyword[condition.key])

    def _with_ids(self, condition: Ids, n: int) -> Mask:
        ids = condition.ids
        return np.fromiter((i in ids for i in self.ids[:n]), bool, n)

    def matching_labels(self, condition: Filter) -> list[int]:
        """Labels of the live points that match."""
        view = self._view
        mask, _ = self.allowed(view, condition)
        return self.labels.view()[: len(mask)][mask].tolist()

    def keyword_search(
        self, view: View, text: str, allowed: Mask, limit: int, boosts: Mapping[str, float]
    ) -> list[tuple[int, float]]:
        """(slot, BM25 score), best first; ties go to the older point."""
        n = len(view.alive)
        total = np.zeros(n)
        hit = np.zeros(n, bool)
        for field_ in self.config.text_fields:
            boost = boosts.get(field_.path, field_.boost)
            if boost:
                keyword = self.keyword[field_.path]
                scores, found = keyword.score(text, n, view.keyword[field_.path])
                total += boost * scores
                hit |= found
        slots = np.flatnonzero(hit & allowed)
        if len(slots) > limit:
            # argpartition breaks ties by chance: take all that tie with the last one, then sort.
            bar = np.partition(total[slots], len(slots) - limit)[len(slots) - limit]
            slots = slots[total[slots] >= bar]
        order = np.lexsort((slots, -total[slots]))[:limit]
        return [(int(s), float(total[s])) for s in slots[order]]
