"""What other servers of the same database do with collections, seen here.

A look every second compares all collections' names and next labels with those that are known here:
one query, however many there are. What differs is then brought up to date one by one, under its lock:
writes of this server hold that from before their commit until the index has them, so what they are
about to bring is not brought twice.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from forebay.errors import NotFound, Unavailable

from forebay_server.dataplane.directory import Directory
from forebay_server.dataplane.upkeep import RETRY_S, OpenCollection, Upkeep
from forebay_server.storage.collections import CollectionStore

log = logging.getLogger("forebay.collections")

#: Seconds between looks.
FOLLOW_S = 1.0
#: Seconds between removals of what is known of old removals.
FORGET_S = 600.0
#: Collections that are opened or brought up to date at the same time: each holds a connection.
AT_ONCE = 4


class Follower:
    """See the module. Lives on one event loop.

    Args:
        forget: takes away a collection that is not in the database any more.
    """

    def __init__(
        self,
        store: CollectionStore,
        upkeep: Upkeep,
        directory: Directory,
        forget: Callable[[OpenCollection], None],
    ) -> None:
        self._store = store
        self._upkeep = upkeep
        self._directory = directory
        self._forget = forget
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._failed: dict[int, float] = {}
        self._loop: asyncio.Task[None] | None = None
        self._true_at = time.monotonic()

    def start(self) -> None:
        """Look from now on."""
        self._true_at = time.monotonic()
        self._loop = asyncio.create_task(self._follow())

    async def close(self) -> None:
        """Look no more."""
        tasks = list(self._tasks.values())
        if self._loop is not None:
            tasks.append(self._loop)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def behind_s(self) -> float:
        """Seconds since the last moment of which everything is known here."""
        return time.monotonic() - self._true_at

    async def find(self, name: str) -> None:
        """Take up what the database has by this name, if anything."""
        for _ in range(2):  # what runs already may have begun before the name was given
            row = await self._store.find(name)
            if row is None or name in self._directory.making:
                return
            await asyncio.shield(self._bring(row.id))
            c = self._directory.by_id(row.id)
            if c is not None and self._directory.has(c, name):
                return

    async def _follow(self) -> None:
        well, forget_at = True, 0.0
        while True:
            await asyncio.sleep(FOLLOW_S)
            began = time.monotonic()
            try:
                due = await self._due()
                if began >= forget_at:
                    await self._store.forget_removals()
                    forget_at = began + FORGET_S
            except Exception as e:
                if well:
                    known = e if isinstance(e, Unavailable) else None
                    log.warning(
                        "what other servers do with collections is not seen now: %s",
                        known.message if known else repr(e),
                    )
                well = False
                continue
            if not well:
                log.info("what other servers do with collections is seen again")
            well = True
            tasks = [self._bring(i) for i in due if self._may(i)]
            if len(tasks) == len(due):
                asyncio.gather(*tasks, return_exceptions=True).add_done_callback(
                    lambda done, began=began: self._settled(done, began)
                )

    async def _due(self) -> list[int]:
        """Ids of collections of which the database has other facts than are known here."""
        d, began = self._directory, time.monotonic()
        out, there = [], set()
        for collection_id, name, next_label in await self._store.heads():
            there.add(collection_id)
            c = d.by_id(collection_id)
            if c is None:
                if name not in d.making:
                    out.append(collection_id)
            elif c.known != next_label or not d.has(c, name):
                out.append(collection_id)
            else:
                c.seen = max(c.seen, began)
        return out + [c.row.id for c in d.every() if c.row.id not in there]

    def _may(self, collection_id: int) -> bool:
        return time.monotonic() >= self._failed.get(collection_id, 0.0)

    def _settled(self, done: asyncio.Future[list[BaseException | None]], began: float) -> None:
        if not done.cancelled() and not any(done.result()):
            self._true_at = max(self._true_at, began)

    def _bring(self, collection_id: int) -> asyncio.Task[None]:
        """Bring a collection to what the database has of it; one task for all who want that."""
        task = self._tasks.get(collection_id)
        if task is None:
            task = asyncio.create_task(self._step(collection_id))
            self._tasks[collection_id] = task
            task.add_done_callback(lambda done: self._ended(collection_id, done))
        return task

    def _ended(self, collection_id: int, task: asyncio.Task[None]) -> None:
        del self._tasks[collection_id]
        self._failed.pop(collection_id, None)
        error = None if task.cancelled() else task.exception()
        if error is None:
            return
        if isinstance(error, Unavailable):  # the next look tries it again
            log.warning("collection %d is not brought up to date: %s", collection_id, error.message)
            return
        self._failed[collection_id] = time.monotonic() + RETRY_S
        log.error(
            "collection %d could not be brought up to date; it is tried again",
            collection_id,
            exc_info=error,
        )

    async def _step(self, collection_id: int) -> None:
        async with self._slots:
            c = self._directory.by_id(collection_id)
            if c is None:
                await self._take_up(collection_id)
            else:
                await self._catch_up(c)

    async def _take_up(self, collection_id: int) -> None:
        try:
            async with self._store.moment(collection_id) as moment:
                row = moment.row
            # It may be one of this server's own, which is not here yet, or is by now.
            if row.name in self._directory.making or self._directory.by_id(collection_id):
                return
            self._directory.put(await self._upkeep.open(row))
        except NotFound:  # deleted meanwhile
            return

    async def _catch_up(self, c: OpenCollection) -> None:
        async with c.lock:
            if c.deleted:
                return
            try:
                row = await self._upkeep.catch_up(c)
            except NotFound:
                self._forget(c)
                return
            if not self._directory.has(
                c, row.name
            ):  # last: a restored one appears when it is whole
                self._directory.rename(c, row.name)
        self._upkeep.look_after(c)
