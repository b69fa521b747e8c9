"""Callers' files in the database: facts, not bytes."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import sqlalchemy as sa
from forebay.errors import TooLarge

from forebay_server.storage.database import Database
from forebay_server.storage.tables import files


@dataclass(frozen=True, slots=True)
class FileRow:
    """A file. Times in seconds since the epoch; `expires_at` None = it stays."""

    id: str
    key_id: str
    name: str
    purpose: str
    size_bytes: int
    sha256: str
    created_at: float
    expires_at: float | None


class FileStore:
    """One per database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, row: FileRow, most: int) -> None:
        """Store a file's facts. Raises TooLarge when its key would have more than `most` bytes."""
        async with self._database.begin() as db:
            total = await db.scalar(_size(row.key_id)) or 0
            if total + row.size_bytes > most:
                raise TooLarge("files", size=total + row.size_bytes, limit=most, unit="bytes")
            await db.execute(files.insert().values(asdict(row)))

    async def size(self, key_id: str) -> int:
        """Bytes that a key has stored."""
        async with self._database.read() as db:
            return await db.scalar(_size(key_id)) or 0

    async def get(self, key_id: str, file: str, now: float) -> FileRow | None:
        """The key's file; None when there is none, or no longer."""
        query = sa.select(files).where(files.c.id == file, files.c.key_id == key_id, _alive(now))
        async with self._database.read() as db:
            row = (await db.execute(query)).first()
        return FileRow(*row) if row is not None else None

    async def page(
        self,
        key_id: str,
        purpose: str,
        now: float,
        oldest_first: bool,
        behind: tuple[float, str] | None,
        limit: int,
    ) -> list[FileRow]:
        """The key's files by their time, behind a time and id, or from the first."""
        query = _listed(key_id, purpose, now, oldest_first)
        if behind is not None:
            here, there = (
                sa.tuple_(files.c.created_at, files.c.id),
                sa.tuple_(*map(sa.literal, behind)),
            )
            query = query.where(here > there if oldest_first else here < there)
        async with self._database.read() as db:
            return [FileRow(*r) for r in (await db.execute(query.limit(limit))).all()]

    async def delete(self, key_id: str, file: str) -> bool:
        """Remove a file's facts; False when there are none."""
        gone = sa.delete(files).where(files.c.id == file, files.c.key_id == key_id)
        async with self._database.begin() as db:
            return (await db.execute(gone)).rowcount > 0

    async def expired(self, now: float) -> list[FileRow]:
        """Files whose time is over, some at once."""
        query = sa.select(files).where(files.c.expires_at <= now).limit(1000)
        async with self._database.read() as db:
            return [FileRow(*r) for r in (await db.execute(query)).all()]

    async def ids(self) -> set[str]:
        """Ids of all files."""
        async with self._database.read() as db:
            return set((await db.scalars(sa.select(files.c.id))).all())


def _size(key_id: str) -> sa.Select[int]:
    total = sa.func.coalesce(sa.func.sum(files.c.size_bytes), 0)
    return sa.select(sa.cast(total, sa.BigInteger)).where(files.c.key_id == key_id)


def _alive(now: float) -> sa.ColumnElement[bool]:
    return files.c.expires_at.is_(None) | (files.c.expires_at > now)


def _listed(key_id: str, purpose: str, now: float, oldest_first: bool) -> sa.Select[tuple[object]]:
    query = sa.select(files).where(files.c.key_id == key_id, _alive(now))
    if purpose:
        query = query.where(files.c.purpose == purpose)
    order = (files.c.created_at, files.c.id)
    return query.order_by(*(order if oldest_first else (c.desc() for c in order)))
