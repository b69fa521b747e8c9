"""Keeping collections' indexes in order: opened, brought up to date, built, rebuilt, saved.

One piece of work in the background per collection at a time. Searches go on through all of it;
writers wait only for the last step of a rebuild.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from forebay.errors import NotFound, Unavailable
from numpy.typing import NDArray

from forebay_server.dataplane.collection_config import config_from_json
from forebay_server.indexes import files
from forebay_server.indexes.backends import Backends
from forebay_server.indexes.collection import CollectionConfig, CollectionIndex, IndexedPoint
from forebay_server.indexes.dense import training
from forebay_server.storage.collections import (
    KEPT_S,
    CollectionRow,
    CollectionStore,
    Moment,
    PointRow,
)

log = logging.getLogger("forebay.collections")

#: The index is saved after this many changes, or this share of the points, whichever is more.
SAVE_CHANGES, SAVE_SHARE = 20_000, 0.2
#: A collection is rebuilt when this share of its slots is dead, and there are this many.
REBUILD_SHARE, REBUILD_SLOTS = 0.3, 10_000
#: A collection is idle when nothing was written to it for so long.
IDLE_S = 3.0
#: Seconds after which what failed is tried again.
RETRY_S = 30.0
#: Vectors that are gathered before a new index takes them in.
REBUILD_PAGE = 200_000
#: Labels that are looked up together.
LABELS = 10_000
#: Seconds for which the database surely knows all that was removed from an index's moment on.
TRUSTED_S = KEPT_S / 2


@dataclass(slots=True, eq=False)
class OpenCollection:
    """A collection with its index. Writes hold `lock`; searches take `index` as it is.

    `known` is the next label of the database's moment that the index stands for: a write that is
    given another one has others before it which the index lacks. `seen` is when that was the next
    label, by the monotonic clock.
    """

    row: CollectionRow
    config: CollectionConfig
    index: CollectionIndex
    known: int = 0
    seen: float = field(default_factory=time.monotonic)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    maintenance: asyncio.Task[None] | None = None
    deleted: bool = False
    written: float = 0.0
    failed: float = -1e9
    waiting_for_idle: bool = False

    @property
    def name(self) -> str:
        """Its name."""
        return self.row.name


class Upkeep:
    """See the module. Lives on one event loop."""

    def __init__(
        self,
        store: CollectionStore,
        folder: Path,
        on_rebuild: Callable[[str, str], None] = lambda name, why: None,
        backends: Backends | None = None,
    ) -> None:
        self.store = store
        self.folder = folder
        self.backends = backends or Backends()
        self._on_rebuild = on_rebuild
        self._closing = False

    def index_folder(self, c: OpenCollection) -> Path:
        """Where its index is saved."""
        return self.folder / str(c.row.id) / "index"

    def new_index(self, row: CollectionRow, config: CollectionConfig) -> CollectionIndex:
        """An empty index."""
        return CollectionIndex(config, partial(self.backends.make, str(row.id)))

    async def open(self, row: CollectionRow) -> OpenCollection:
        """A collection with its index: the saved one brought up to date, or one built anew. Raises
        NotFound when it is gone."""
        config = config_from_json(row.config)
        c = OpenCollection(row, config, self.new_index(row, config))
        began = time.monotonic()
        folder = self.index_folder(c)
        try:
            make = partial(self.new_index, row, config)
            c.index = await asyncio.to_thread(files.load, config, folder, make)
        except files.DamagedIndex as e:
            if folder.exists():
                log.error("the index of collection %s is built anew: %s", row.name, e)
                self._on_rebuild(row.name, "damaged")
                await asyncio.to_thread(files.remove, folder)
        await self._gather(row.id, c.index)
        c.row = await self._bring_up(c, c.index)
        if c.index.dense is not None:
            await asyncio.to_thread(discard, c.index.dense.discard_others)
        took = time.monotonic() - began
        log.info("collection %s is open: %d points in %.1f s", row.name, len(c.index), took)
        self.look_after(c)
        return c

    async def close(self, collections: Sequence[OpenCollection]) -> None:
        """End what runs and save what has changed. Nothing may be written any more."""
        self._closing = True
        for c in collections:
            if c.maintenance is not None:
                await asyncio.gather(c.maintenance, return_exceptions=True)
            async with c.lock:
                if c.index.changes:
                    await asyncio.to_thread(files.save, c.index, self.index_folder(c))

    async def apply(
        self,
        c: OpenCollection,
        first: int,
        points: Sequence[IndexedPoint],
        gone: Sequence[int],
    ) -> None:
        """Bring a committed write into the index. When that fails, the index is built anew.

        Args:
            first: the label that the write was given. Where it is not the next one, another server
                has written meanwhile, and all comes from the database.
        """
        c.written = time.monotonic()
        if first != c.known:
            await self.catch_up(c)
            return
        try:
            if len(points) + len(gone) <= 8:
                c.index.write(points, gone)  # a few microseconds: no thread hop
            else:
                await asyncio.to_thread(c.index.write, points, gone)
        except Exception:
            log.exception("the index of collection %s took no write; it is built anew", c.name)
            self._on_rebuild(c.name, "failed_write")
            fresh = self.new_index(c.row, c.config)
            await self._gather(c.row.id, fresh)
            await self._bring_up(c, fresh)
            c.index = fresh
        else:
            c.known, c.seen = first + max(1, len(points)), c.written

    async def catch_up(self, c: OpenCollection) -> CollectionRow:
        """Bring the index up to what other servers have written; gives the collection as the database
        has it. To be called under the lock. Raises NotFound when it is gone."""
        known = c.known
        row = await self._bring_up(c, c.index, known)
        if c.known != known:
            c.written = time.monotonic()
        return row

    async def _gather(self, collection_id: int, index: CollectionIndex, expected: int = 0) -> None:
        """Give an index that nobody searches the points that it lacks. What went, and what came in
        meanwhile, is left to `_bring_up`: this holds no moment for as long as it may take.

        Args:
            expected: the points that it will have. Vectors are built in on the way, so that they
                are not gathered all at once.
        """
        gathered = 0
        async for rows in self.store.points_from(collection_id, index.next_label):
            await asyncio.to_thread(_take_in, index, rows, ())
            gathered += len(rows)
            if expected and gathered >= max(REBUILD_PAGE, training(expected)):
                await asyncio.to_thread(index.absorb, expected, fresh=True)
                gathered = 0

    async def _bring_up(
        self, c: OpenCollection, index: CollectionIndex, known: int | None = None
    ) -> CollectionRow:
        """Bring an index of a collection to a moment of the database, and note that; gives what that
        has of the collection. Labels are committed in their order, so what is new is what has labels
        beyond the index's.

        Searches go on: a point that was written anew goes in the step that brings its successor, and
        up to a page of changes is one step.

        Args:
            known: the moment that the index stands for, if any: see OpenCollection.
        """
        began = time.monotonic()
        async with self.store.moment(c.row.id) as moment:
            if moment.next_label != known:
                if known is not None and self.store.shared and began - c.seen < TRUSTED_S:
                    gone = await moment.removals(known)
                else:
                    gone = await _gone(moment, index)
                await self._change(index, gone, moment)
        c.known, c.seen = moment.next_label, began
        return moment.row

    async def _change(self, index: CollectionIndex, gone: Sequence[int], moment: Moment) -> None:
        slots = await asyncio.to_thread(index.slots_of, gone)
        left: dict[str, list[int]] = defaultdict(list)
        for slot, label in zip(slots.tolist(), index.labels.view()[slots].tolist(), strict=True):
            left[index.ids[slot]].append(label)
        page: list[PointRow] = []
        async for rows in moment.points_from(index.next_label):
            if page:
                old = [x for r in page for x in left.pop(r.point_id, ())]
                await asyncio.to_thread(_take_in, index, page, old)
            page = rows
        old = [x for labels in left.values() for x in labels]
        if page or old:
            await asyncio.to_thread(_take_in, index, page, old)

    # In the background.

    def look_after(self, c: OpenCollection, idle: bool = False) -> None:
        """Start what is due."""
        if self._closing or c.deleted or time.monotonic() < c.failed + 0.9 * RETRY_S:
            return
        running = c.maintenance is not None and not c.maintenance.done()
        if not running and self._due(c.index, idle):
            c.maintenance = asyncio.create_task(self._run(c, idle))
        elif not idle and not c.waiting_for_idle:
            c.waiting_for_idle = True
            asyncio.get_running_loop().call_later(IDLE_S, self._look_again, c)

    def _look_again(self, c: OpenCollection) -> None:
        c.waiting_for_idle = False
        running = c.maintenance is not None and not c.maintenance.done()
        self.look_after(c, idle=not running and time.monotonic() - c.written >= 0.9 * IDLE_S)

    @staticmethod
    def _due(index: CollectionIndex, idle: bool) -> str:
        if index.dense is not None and index.dense.outgrown:
            return "rebuild"
        if index.dense is not None and index.dense.should_absorb(idle):
            return "absorb"
        if index.dead_share > REBUILD_SHARE and len(index.ids) > REBUILD_SLOTS:
            return "rebuild"
        if index.changes > max(SAVE_CHANGES, SAVE_SHARE * len(index)):
            return "save"
        return ""

    async def _run(self, c: OpenCollection, idle: bool) -> None:
        try:
            while not self._closing and not c.deleted and (due := self._due(c.index, idle)):
                began = time.monotonic()
                if due == "absorb":
                    await asyncio.to_thread(c.index.absorb)
                elif due == "rebuild":
                    await self._rebuild(c)
                else:
                    await asyncio.to_thread(files.save, c.index, self.index_folder(c))
                took = time.monotonic() - began
                log.info("collection %s: %s took %.1f s", c.name, due, took)
        except NotFound:  # another server has deleted it: nothing to keep
            return
        except Exception:
            log.exception("upkeep of collection %s failed; it is tried again", c.name)
            c.failed = time.monotonic()
            asyncio.get_running_loop().call_later(RETRY_S, self.look_after, c)
        else:
            if not idle:  # the next look, once this task has ended
                asyncio.get_running_loop().call_soon(self.look_after, c)

    async def _rebuild(self, c: OpenCollection) -> None:
        """A new index without the dead, made beside the old one."""
        fresh = self.new_index(c.row, c.config)
        await self._gather(c.row.id, fresh, max(1, len(c.index)))
        await asyncio.to_thread(fresh.absorb, fresh=True)
        async with c.lock:
            await self._bring_up(c, fresh)
            c.index = fresh
        if fresh.dense is not None:
            await asyncio.to_thread(discard, fresh.dense.discard_others)


def discard(remove: Callable[[], None]) -> None:
    """Remove what an index has elsewhere, if that can be reached."""
    try:
        remove()
    except Unavailable as e:  # left for the next start
        log.warning("what is left of an index was not removed: %s", e.message)


async def _gone(moment: Moment, index: CollectionIndex) -> list[int]:
    """Labels of live points that are not in the database any more, rising."""
    mine = await asyncio.to_thread(index.live_labels)
    out: list[int] = []
    for start in range(0, len(mine), LABELS):
        some = mine[start : start + LABELS]
        there = await moment.labels(int(some[0]), int(some[-1]) + 1)
        out.extend(np.setdiff1d(some, np.array(there, np.int64), assume_unique=True).tolist())
    return out


def _take_in(index: CollectionIndex, rows: Sequence[PointRow], gone: Sequence[int]) -> None:
    index.write([indexed(r) for r in rows], gone)


def indexed(row: PointRow) -> IndexedPoint:
    """A stored point as the index takes it."""
    vector: NDArray[np.float32] | None = None
    if row.vector is not None:
        vector = np.frombuffer(row.vector, "<f4")
    payload: Mapping[str, Any] = orjson.loads(row.payload)
    return IndexedPoint(row.label, row.point_id, vector, payload)
