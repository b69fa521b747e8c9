"""Which documents this server works on, where several share a database.

A server's word that it works on a document holds for OWNED_S, and is given again every
CLAIM_EVERY_S. Documents that nobody works on are taken up by a server that has what they need: their
file and the embedding model; others leave them alone. See docs/adr/0034.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

from forebay.errors import ForebayError

from forebay_server.storage.knowledge import DocumentRow, KnowledgeStore

log = logging.getLogger("forebay.knowledge")

#: How often a server says what it works on, and looks for what nobody works on.
CLAIM_EVERY_S = 2.0
#: Documents that are looked at each time, and that a server takes up before it has worked on some.
LOOK, MOST = 256, 256
_FIRST = (0.0, "")


class Claims:
    """See the module. Lives on one event loop.

    Args:
        able: whether this server has what a document needs.
        take: told of a document that this server works on from now on.
    """

    def __init__(
        self,
        store: KnowledgeStore,
        able: Callable[[DocumentRow], Awaitable[bool]],
        take: Callable[[DocumentRow], None],
    ) -> None:
        self._store = store
        self._able = able
        self._take = take
        self._held: set[str] = set()
        self._behind = _FIRST
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin."""
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Give back what is not done. After the work has stopped."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
            with contextlib.suppress(ForebayError):  # else others take them after OWNED_S
                await self._store.release()

    def hold(self, document: str) -> None:
        """This server has claimed it, and works on it until `drop`."""
        self._held.add(document)

    def drop(self, document: str) -> None:
        """It works on it no longer: where it is not done, its claim runs out."""
        self._held.discard(document)

    async def _run(self) -> None:
        while True:
            try:
                if self._held:
                    await self._store.renew(self._held)
                await self._look()
            except ForebayError as e:
                log.warning("documents cannot be claimed yet: %s", e.message)
            except Exception:
                log.exception("claiming documents failed; it is tried again")
            await asyncio.sleep(CLAIM_EVERY_S)

    async def _look(self) -> None:
        """Take up documents that nobody works on. Where there are many that this server lacks
        something for, the next look goes on behind them."""
        found = await self._store.free(self._behind, LOOK)
        self._behind = (found[-1].created_at, found[-1].id) if len(found) == LOOK else _FIRST
        for row in found:
            if len(self._held) >= MOST:
                self._behind = _FIRST
                return
            if row.id in self._held or not await self._able(row):
                continue
            mine = await self._store.claim(row.id)
            if mine is not None:
                self._take(mine)
