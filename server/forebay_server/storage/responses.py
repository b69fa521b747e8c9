"""Stored responses, and the chains that they make."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from forebay_server.storage.database import Database
from forebay_server.storage.tables import responses

#: Statuses of responses in the background whose work is not done.
UNFINISHED = ("queued", "in_progress")


@dataclass(frozen=True, slots=True)
class ResponseRow:
    """A response. `request` and `response` are the contract's messages; times since the epoch."""

    id: str
    key_id: str
    previous_id: str | None
    status: str
    request: bytes
    response: bytes
    created_at: float
    expires_at: float
    owner: str | None = None
    owned_until: float | None = None


class ResponseStore:
    """One per database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, row: ResponseRow) -> None:
        """Store a response."""
        async with self._database.begin() as db:
            await db.execute(responses.insert().values(asdict(row)))

    async def get(self, key_id: str, response: str, now: float) -> ResponseRow | None:
        """The key's response; None when there is none, or no longer."""
        r = responses
        query = sa.select(r).where(r.c.id == response, r.c.key_id == key_id, r.c.expires_at > now)
        async with self._database.read() as db:
            row = (await db.execute(query)).first()
        return ResponseRow(*row) if row is not None else None

    async def chain(self, key_id: str, response: str, now: float, most: int) -> list[ResponseRow]:
        """A response and those before it, oldest first; `most` and one more at most. The first one
        has a `previous_id` when the chain is broken or longer."""
        r = responses
        mine = (r.c.key_id == key_id) & (r.c.expires_at > now)
        walk = (
            sa.select(r.c.id, r.c.previous_id, sa.literal(0).label("depth"))
            .where(r.c.id == response, mine)
            .cte("walk", recursive=True)
        )
        step = sa.select(r.c.id, r.c.previous_id, walk.c.depth + 1).where(
            r.c.id == walk.c.previous_id, mine, walk.c.depth < most
        )
        walk = walk.union_all(step)
        query = sa.select(r).join(walk, walk.c.id == r.c.id).order_by(walk.c.depth.desc())
        async with self._database.read() as db:
            return [ResponseRow(*row) for row in (await db.execute(query)).all()]

    async def keep(self, ids: Sequence[str], until: float) -> None:
        """Let responses live on: they are still built upon."""
        r = responses
        async with self._database.begin() as db:
            for start in range(0, len(ids), 500):
                part = list(ids[start : start + 500])
                change = sa.update(r).where(r.c.id.in_(part), r.c.expires_at < until)
                await db.execute(change.values(expires_at=until))

    async def update(
        self,
        response: str,
        status: str,
        message: bytes,
        within: Callable[[AsyncConnection], Awaitable[None]] | None = None,
    ) -> bool:
        """Store how far a response is; False when it had ended, or is gone: then nothing is done.
        `within` shares the transaction."""
        r = responses
        change = sa.update(r).where(r.c.id == response, r.c.status.in_(UNFINISHED))
        async with self._database.begin() as db:
            found = (await db.execute(change.values(status=status, response=message))).rowcount
            if found and within is not None:
                await within(db)
        return found > 0

    async def delete(self, key_id: str, response: str) -> bool:
        """Remove a response; False when there is none."""
        r = responses
        gone = sa.delete(r).where(r.c.id == response, r.c.key_id == key_id)
        async with self._database.begin() as db:
            return (await db.execute(gone)).rowcount > 0

    async def claim(self, owner: str, now: float, until: float) -> list[ResponseRow]:
        """Take responses in the background that nobody makes, keep those of the owner; gives all
        that it now makes, oldest first."""
        r = responses
        open_ = r.c.status.in_(UNFINISHED)
        free = r.c.owner.is_(None) | (r.c.owner == owner) | (r.c.owned_until < now)
        async with self._database.read() as db:
            if (await db.execute(sa.select(r.c.id).where(open_).limit(1))).first() is None:
                return []  # the usual case: nothing is written for it
        async with self._database.begin() as db:
            await db.execute(sa.update(r).where(open_, free).values(owner=owner, owned_until=until))
            query = sa.select(r).where(open_, r.c.owner == owner).order_by(r.c.created_at)
            return [ResponseRow(*row) for row in (await db.execute(query)).all()]

    async def release(self, owner: str) -> None:
        """Give back all responses of an owner."""
        change = sa.update(responses).where(responses.c.owner == owner)
        async with self._database.begin() as db:
            await db.execute(change.values(owner=None, owned_until=None))

    async def sweep(self, now: float) -> int:
        """Remove responses whose time is over."""
        gone = sa.delete(responses).where(
            responses.c.expires_at <= now, responses.c.status.not_in(UNFINISHED)
        )
        async with self._database.begin() as db:
            return (await db.execute(gone)).rowcount
