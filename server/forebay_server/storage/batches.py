"""Batches, their items and results in the database."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from forebay_server.storage.database import Database
from forebay_server.storage.tables import batch_items, batches

#: Statuses of batches whose work is not done.
OPEN = ("validating", "in_progress", "finalizing", "cancelling")
TOKENS = ("prompt_tokens", "completion_tokens", "cached_tokens", "reasoning_tokens")
#: Seconds after which a batch whose items never came completely is removed.
STALE_S = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class BatchRow:
    """A batch. `header` is the contract's message; times in seconds since the epoch."""

    id: str
    key_id: str
    status: str
    header: bytes
    created_at: float
    expires_at: float
    total: int = 0
    completed: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    in_progress_at: float | None = None
    finalizing_at: float | None = None
    cancelling_at: float | None = None
    ended_at: float | None = None
    results_expire_at: float | None = None
    owner: str | None = None
    owned_until: float | None = None


@dataclass(frozen=True, slots=True)
class ItemRow:
    """An item: a BatchItem while it waits, a BatchResult when it has ended."""

    batch_id: str
    number: int
    custom_id: str
    item: bytes
    status: str
    result: bytes | None = None


@dataclass(slots=True)
class Ending:
    """An item that has ended: its result, its tokens, and what else its transaction does.

    `result` None: it was stopped and gets none, but what it used is counted.
    """

    batch_id: str
    number: int
    status: str
    result: bytes | None
    tokens: tuple[int, int, int, int]
    within: Callable[[AsyncConnection], Awaitable[None]] | None = None


class BatchStore:
    """One per database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create(self, row: BatchRow, most_open: int) -> bool:
        """A batch whose items come now; False when its key has too many that have not ended."""
        b = batches
        count = sa.select(sa.func.count()).where(b.c.key_id == row.key_id, b.c.status.in_(OPEN))
        async with self._database.begin() as db:
            if (await db.scalar(count) or 0) >= most_open:
                return False
            await db.execute(b.insert().values(asdict(row)))
        return True

    async def add_items(self, rows: Sequence[ItemRow]) -> None:
        """Store items."""
        async with self._database.begin() as db:
            await db.execute(batch_items.insert(), [asdict(r) for r in rows])

    async def seal(self, batch: str, total: int, failed: int) -> None:
        """All items are there: the batch may run."""
        values = {"status": "validating", "total": total, "failed": failed}
        await self._update(batch, ("receiving",), values)

    async def discard(self, batch: str) -> None:
        """Remove a batch with all that belongs to it."""
        async with self._database.begin() as db:
            await db.execute(sa.delete(batch_items).where(batch_items.c.batch_id == batch))
            await db.execute(sa.delete(batches).where(batches.c.id == batch))

    async def get(self, key_id: str, batch: str) -> BatchRow | None:
        """The key's batch; None when there is none."""
        b = batches
        found = await self._select(_mine(key_id), b.c.id == batch)
        return found[0] if found else None

    async def page(
        self, key_id: str, behind: tuple[float, str] | None, limit: int
    ) -> list[BatchRow]:
        """The key's batches, newest first, behind a time and id, or from the first."""
        conditions = [_mine(key_id)]
        if behind is not None:
            here = sa.tuple_(batches.c.created_at, batches.c.id)
            conditions.append(here < sa.tuple_(*map(sa.literal, behind)))
        return await self._select(*conditions, limit=limit)

    # For the runner.

    async def claim(self, owner: str, now: float, until: float) -> list[BatchRow]:
        """Take batches that nobody runs, keep those of the owner; gives all that it now runs."""
        b = batches
        if not await self._select(b.c.status.in_(OPEN), limit=1):
            return []  # the usual case: nothing is written for it
        free = b.c.owner.is_(None) | (b.c.owner == owner) | (b.c.owned_until < now)
        take = sa.update(b).where(b.c.status.in_(OPEN), free)
        async with self._database.begin() as db:
            await db.execute(take.values(owner=owner, owned_until=until))
        rows = await self._select(b.c.status.in_(OPEN), b.c.owner == owner)
        return rows[::-1]

    async def release(self, owner: str) -> None:
        """Give back all batches of an owner."""
        change = sa.update(batches).where(batches.c.owner == owner)
        async with self._database.begin() as db:
            await db.execute(change.values(owner=None, owned_until=None))

    async def waiting(self, batch: str, after: int, limit: int) -> list[ItemRow]:
        """Items without a result behind a number, in their order."""
        i = batch_items
        query = (
            sa.select(i)
            .where(i.c.batch_id == batch, i.c.status == "waiting", i.c.number > after)
            .order_by(i.c.number)
            .limit(limit)
        )
        async with self._database.read() as db:
            return [ItemRow(*r) for r in (await db.execute(query)).all()]

    async def end(self, endings: Sequence[Ending]) -> int:
        """Store results in one transaction, with the batches' counts; gives how many. An item that
        has its result already keeps it, and nothing of the second one is counted."""
        i, b = batch_items, batches
        stored = 0
        async with self._database.begin() as db:
            for e in endings:
                if e.result is not None:
                    where = (i.c.batch_id == e.batch_id) & (i.c.number == e.number)
                    change = sa.update(i).where(where, i.c.status == "waiting")
                    done = await db.execute(
                        change.values(status=e.status, result=e.result, item=b"")
                    )
                    if not done.rowcount:
                        continue
                    stored += 1
                values: dict[str, Any] = {
                    name: b.c[name] + n for name, n in zip(TOKENS, e.tokens, strict=True) if n
                }
                if e.result is not None:
                    values[e.status] = b.c[e.status] + 1
                if values:
                    await db.execute(sa.update(b).where(b.c.id == e.batch_id).values(values))
                if e.within is not None:
                    await e.within(db)
        return stored

    async def move(self, batch: str, old: Sequence[str], **values: Any) -> bool:
        """Change a batch that has one of the statuses; False when it has not."""
        return await self._update(batch, old, values)

    # Results.

    async def results(
        self, batch: str, status: str, after: int, limit: int
    ) -> list[tuple[int, bytes]]:
        """Number and BatchResult of items behind a number, in their order; status empty = all."""
        i = batch_items
        query = (
            sa.select(i.c.number, i.c.result)
            .where(i.c.batch_id == batch, i.c.number > after, i.c.result.is_not(None))
            .order_by(i.c.number)
            .limit(limit)
        )
        if status:
            query = query.where(i.c.status == status)
        async with self._database.read() as db:
            return [(r.number, r.result) for r in (await db.execute(query)).all()]

    async def stale(self, now: float) -> list[str]:
        """Ids of batches whose time is over, or whose items never came completely."""
        b = batches
        over = b.c.ended_at.is_not(None) & (b.c.results_expire_at <= now)
        broken = (b.c.status == "receiving") & (b.c.created_at < now - STALE_S)
        async with self._database.read() as db:
            return list((await db.scalars(sa.select(b.c.id).where(over | broken))).all())

    async def _update(self, batch: str, old: Sequence[str], values: dict[str, Any]) -> bool:
        change = sa.update(batches).where(batches.c.id == batch, batches.c.status.in_(old))
        async with self._database.begin() as db:
            return (await db.execute(change.values(values))).rowcount > 0

    async def _select(
        self, *conditions: sa.ColumnElement[bool], limit: int | None = None
    ) -> list[BatchRow]:
        b = batches
        order = (b.c.created_at.desc(), b.c.id.desc())
        query = sa.select(b).where(*conditions).order_by(*order).limit(limit)
        async with self._database.read() as db:
            return [BatchRow(**r._mapping) for r in (await db.execute(query)).all()]


def _mine(key_id: str) -> sa.ColumnElement[bool]:
    return (batches.c.key_id == key_id) & (batches.c.status != "receiving")
