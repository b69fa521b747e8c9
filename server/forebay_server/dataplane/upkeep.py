"""Keeping collections' indexes in order, in the background: opened, built, rebuilt, saved.

One piece of work per collection at a time. Searches go on through all of it; writers wait only for
the last step of a rebuild.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from forebay.errors import Unavailable
from numpy.typing import NDArray

from forebay_server.dataplane.collection_config import config_from_json
from forebay_server.indexes import files
from forebay_server.indexes.backends import Backends
from forebay_server.indexes.collection import CollectionConfig, CollectionIndex, IndexedPoint
from forebay_server.indexes.dense import training
from forebay_server.storage.collections import CollectionRow, CollectionStore, PointRow

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


@dataclass(slots=True, eq=False)
class OpenCollection:
    """A collection with its index. Writes hold `lock`; searches take `index` as it is."""

    row: CollectionRow
    config: CollectionConfig
    index: CollectionIndex
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
        """A collection with its index: the saved one brought up to date, or one built anew."""
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
        await self._catch_up(c.row.id, c.index)
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
        self, c: OpenCollection, points: Sequence[IndexedPoint], gone: Sequence[int]
    ) -> None:
        """Bring committed changes into the index. When that fails, the index is built anew."""
        c.written = time.monotonic()
        try:
            if len(points) + len(gone) <= 8:
                c.index.write(points, gone)  # a few microseconds: no thread hop
            else:
                await asyncio.to_thread(c.index.write, points, gone)
        except Exception:
            log.exception("the index of collection %s took no write; it is built anew", c.name)
            self._on_rebuild(c.name, "failed_write")
            fresh = self.new_index(c.row, c.config)
            await self._catch_up(c.row.id, fresh)
            c.index = fresh

    async def _catch_up(
        self, collection_id: int, index: CollectionIndex, expected: int = 0
    ) -> None:
        """Bring an index to the state of the database.

        Args:
            expected: for an index that nobody searches yet: the points that it will have. Its
                vectors are built in on the way, so that they are not gathered all at once.
        """
        if index.next_label:
            labels = np.array(await self.store.labels(collection_id), np.int64)
            await asyncio.to_thread(index.keep_only, labels)
        gathered = 0
        async for rows in self.store.points_from(collection_id, index.next_label):
            await asyncio.to_thread(_take_in, index, rows)
            gathered += len(rows)
            if expected and gathered >= max(REBUILD_PAGE, training(expected)):
                await asyncio.to_thread(index.absorb, expected, fresh=True)
                gathered = 0

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
        await self._catch_up(c.row.id, fresh, max(1, len(c.index)))
        await asyncio.to_thread(fresh.absorb, fresh=True)
        async with c.lock:
            await self._catch_up(c.row.id, fresh)
            c.index = fresh
        if fresh.dense is not None:
            await asyncio.to_thread(discard, fresh.dense.discard_others)


def discard(remove: Callable[[], None]) -> None:
    """Remove what an index has elsewhere, if that can be reached."""
    try:
        remove()
    except Unavailable as e:  # left for the next start
        log.warning("what is left of an index was not removed: %s", e.message)


def _take_in(index: CollectionIndex, rows: Sequence[PointRow]) -> None:
    index.write([indexed(r) for r in rows])


def indexed(row: PointRow) -> IndexedPoint:
    """A stored point as the index takes it."""
    vector: NDArray[np.float32] | None = None
    if row.vector is not None:
        vector = np.frombuffer(row.vector, "<f4")
    payload: Mapping[str, Any] = orjson.loads(row.payload)
    return IndexedPoint(row.label, row.point_id, vector, payload)
