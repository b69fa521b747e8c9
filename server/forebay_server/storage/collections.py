"""Collections and their points in the database: the truth that indexes are built from."""

from __future__ import annotations

import struct
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

import sqlalchemy as sa
from forebay.errors import AlreadyExists, NotFound
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from forebay_server.storage.database import Database
from forebay_server.storage.tables import (
    collection_points,
    collection_removals,
    collection_snapshots,
    collections,
)

T = TypeVar("T")
#: Values of one IN list; SQLite bounds parameters.
PART = 500
#: Points of one page when an index is built.
PAGE = 4000
#: Points that one statement deletes with their collection: it has STATEMENT_S at most.
DELETED = 100_000
#: Seconds for which it is known what writes removed, where servers share the database.
KEPT_S = 3600.0


@dataclass(frozen=True, slots=True)
class CollectionRow:
    """A collection. `config` is JSON."""

    id: int
    name: str
    config: str
    created_at: float


@dataclass(slots=True)
class PointRow:
    """A point. `payload` is JSON, `vector` little-endian float32 or None, `struct` the payload as a
    serialised google.protobuf.Struct once an answer has needed it."""

    label: int
    point_id: str
    payload: bytes
    vector: bytes | None
    struct: bytes | None = None


@dataclass(frozen=True, slots=True)
class SnapshotRow:
    """A snapshot's facts."""

    name: str
    points: int
    size_bytes: int
    sha256: str
    created_at: float


def parts(values: Sequence[T], size: int = PART) -> Iterator[Sequence[T]]:
    """The values in pieces."""
    for start in range(0, len(values), size):
        yield values[start : start + size]


#: PostgreSQL's clock, one for all servers.
_NOW = sa.extract("epoch", sa.func.clock_timestamp())


class Moment:
    """A collection as one transaction sees it. `next_label` is what the next write will take."""

    def __init__(self, db: AsyncConnection, row: CollectionRow, next_label: int) -> None:
        self._db = db
        self.row = row
        self.next_label = next_label

    async def removals(self, label: int) -> list[int]:
        """Labels that were removed by the writes that were given this label or later ones: all of
        them, when this was the next label less than KEPT_S ago. Where the store is shared."""
        r = collection_removals
        query = sa.select(r.c.removed).where(r.c.collection_id == self.row.id, r.c.label >= label)
        found = b"".join((await self._db.execute(query)).scalars())
        return list(struct.unpack(f"<{len(found) // 8}q", found))

    async def labels(self, start: int, end: int) -> list[int]:
        """The labels from one on and below another, rising."""
        p = collection_points
        query = sa.select(p.c.label).where(
            p.c.collection_id == self.row.id, p.c.label >= start, p.c.label < end
        )
        return list((await self._db.execute(query.order_by(p.c.label))).scalars())

    async def points_from(self, label: int) -> AsyncIterator[list[PointRow]]:
        """Pages of the points whose label is at least this one, in the order of labels."""
        full = True
        while full:
            rows = await _page(self._db, self.row.id, label, PAGE)
            full = len(rows) == PAGE
            if rows:
                label = rows[-1].label + 1
                yield rows


class CollectionStore:
    """One per database. What changes a collection's points takes labels first: the lock on its row
    holds writers of all servers apart, and whoever knows the last label knows whether it has missed
    anything."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @property
    def shared(self) -> bool:
        """Whether other servers may write here, too."""
        return self._database.dialect == "postgresql"

    async def create(self, name: str, config: str) -> CollectionRow:
        """A new collection. Raises AlreadyExists."""
        now = time.time()
        new = collections.insert().values(name=name, config=config, next_label=0, created_at=now)
        try:
            async with self._database.begin() as db:
                key = (await db.execute(new)).inserted_primary_key
        except IntegrityError:
            raise AlreadyExists(f"there is a collection {name!r} already") from None
        assert key is not None
        return CollectionRow(key[0], name, config, now)

    async def rename(self, collection_id: int, name: str) -> None:
        """Another name. Raises AlreadyExists, NotFound."""
        c = collections
        try:
            async with self._database.begin() as db:
                new = sa.update(c).where(c.c.id == collection_id).values(name=name)
                if not (await db.execute(new)).rowcount:
                    raise NotFound("collection", str(collection_id))
        except IntegrityError:
            raise AlreadyExists(f"there is a collection {name!r} already") from None

    async def all(self) -> list[CollectionRow]:
        """Every collection, by name."""
        async with self._database.read() as db:
            found = await db.execute(sa.select(collections).order_by(collections.c.name))
            return [_collection(r) for r in found]

    async def heads(self) -> list[tuple[int, str, int]]:
        """Id, name and next label of every collection."""
        c = collections
        async with self._database.read() as db:
            found = await db.execute(sa.select(c.c.id, c.c.name, c.c.next_label))
            return [(r.id, r.name, r.next_label) for r in found]

    async def find(self, name: str) -> CollectionRow | None:
        """A collection by its name."""
        async with self._database.read() as db:
            found = await db.execute(sa.select(collections).where(collections.c.name == name))
            row = found.one_or_none()
            return None if row is None else _collection(row)

    @asynccontextmanager
    async def moment(self, collection_id: int) -> AsyncIterator[Moment]:
        """The collection of this moment, for as long as it is looked at. Raises NotFound."""
        async with self._database.read() as db:
            found = await db.execute(
                sa.select(collections).where(collections.c.id == collection_id)
            )
            row = found.one_or_none()
            if row is None:
                raise NotFound("collection", str(collection_id))
            yield Moment(db, _collection(row), row.next_label)

    async def delete(self, collection_id: int) -> int:
        """Remove a collection; gives the number of its points. Raises NotFound."""
        async with self._database.begin() as db:
            await self._take_labels(db, collection_id, 1)  # a write must not come in between
            p = collection_points
            count, rest = 0, [p.c.collection_id == collection_id]
            while rest:
                labels = sa.select(p.c.label).where(*rest).order_by(p.c.label)
                end = await db.scalar(labels.offset(DELETED).limit(1))
                some = rest if end is None else [*rest, p.c.label < end]
                count += (await db.execute(sa.delete(p).where(*some))).rowcount
                rest = [] if end is None else [rest[0], p.c.label >= end]
            r, s = collection_removals, collection_snapshots
            await db.execute(sa.delete(r).where(r.c.collection_id == collection_id))
            await db.execute(sa.delete(s).where(s.c.collection_id == collection_id))
            await db.execute(sa.delete(collections).where(collections.c.id == collection_id))
            return count

    async def upsert(
        self,
        collection_id: int,
        rows: Sequence[tuple[str, bytes, bytes | None]],
        gone: Sequence[str] = (),
    ) -> tuple[int, list[int]]:
        """Write (id, payload, vector) rows, and remove the points in `gone`, in one transaction.

        Returns:
            the label of the first row (the others follow; without rows it is no point's), and the
            labels that were replaced or removed.

        Raises:
            NotFound: the collection is gone.
        """
        async with self._database.begin() as db:
            first = await self._take_labels(db, collection_id, max(1, len(rows)))
            replaced = await self._labels_of(db, collection_id, [*(r[0] for r in rows), *gone])
            await self._delete_labels(db, collection_id, first, replaced)
            values = [
                {
                    "collection_id": collection_id,
                    "label": first + i,
                    "point_id": point_id,
                    "payload": payload,
                    "vector": vector,
                }
                for i, (point_id, payload, vector) in enumerate(rows)
            ]
            if values:
                await db.execute(collection_points.insert(), values)
        return first, replaced

    async def _take_labels(self, db: AsyncConnection, collection_id: int, count: int) -> int:
        c = collections
        taken = await db.execute(
            sa.update(c)
            .where(c.c.id == collection_id)
            .values(next_label=c.c.next_label + count)
            .returning(c.c.next_label)
        )
        end = taken.scalar_one_or_none()
        if end is None:
            raise NotFound("collection", str(collection_id))
        return end - count

    async def _labels_of(
        self, db: AsyncConnection, collection_id: int, ids: Sequence[str]
    ) -> list[int]:
        p = collection_points
        out: list[int] = []
        for some in parts(ids):
            query = sa.select(p.c.label).where(
                p.c.collection_id == collection_id, p.c.point_id.in_(some)
            )
            out.extend((await db.execute(query)).scalars())
        return out

    async def _delete_labels(
        self, db: AsyncConnection, collection_id: int, first: int, labels: Sequence[int]
    ) -> int:
        """Remove points, and say to other servers that the write that begins at `first` did."""
        p = collection_points
        count = 0
        for some in parts(labels):
            gone = await db.execute(
                sa.delete(p).where(p.c.collection_id == collection_id, p.c.label.in_(some))
            )
            count += gone.rowcount
        if labels and self.shared:
            await db.execute(
                collection_removals.insert().values(
                    collection_id=collection_id,
                    label=first,
                    removed=struct.pack(f"<{len(labels)}q", *labels),
                    created_at=_NOW,
                )
            )
        return count

    async def forget_removals(self) -> None:
        """Drop what has been kept for KEPT_S."""
        r = collection_removals
        async with self._database.begin() as db:
            await db.execute(sa.delete(r).where(r.c.created_at < _NOW - KEPT_S))

    async def delete_ids(self, collection_id: int, ids: Sequence[str]) -> tuple[int, list[int]]:
        """Remove points by id; gives the label that this took, and theirs. Raises NotFound."""
        async with self._database.begin() as db:
            first = await self._take_labels(db, collection_id, 1)
            labels = await self._labels_of(db, collection_id, ids)
            await self._delete_labels(db, collection_id, first, labels)
        return first, labels

    async def delete_labels(self, collection_id: int, labels: Sequence[int]) -> tuple[int, int]:
        """Remove points by label; gives the label that this took, and how many were there. Raises
        NotFound."""
        async with self._database.begin() as db:
            first = await self._take_labels(db, collection_id, 1)
            return first, await self._delete_labels(db, collection_id, first, labels)

    async def points_from(
        self, collection_id: int, label: int, size: int = PAGE
    ) -> AsyncIterator[list[PointRow]]:
        """Pages of the points whose label is at least this one, in the order of labels."""
        while True:
            async with self._database.read() as db:
                rows = await _page(db, collection_id, label, size)
            if rows:
                label = rows[-1].label + 1
                yield rows
            if len(rows) < size:
                return

    async def by_labels(
        self, collection_id: int, labels: Sequence[int], vectors: bool
    ) -> dict[int, PointRow]:
        """Points by label; those that are gone are left out."""
        p = collection_points
        columns: list[sa.ColumnElement] = [p.c.label, p.c.point_id, p.c.payload]
        columns.append(p.c.vector if vectors else sa.null().label("vector"))
        out: dict[int, PointRow] = {}
        async with self._database.read() as db:
            for some in parts(labels):
                query = sa.select(*columns).where(
                    p.c.collection_id == collection_id, p.c.label.in_(some)
                )
                out.update({r[0]: PointRow(*r) for r in await db.execute(query)})
        return out

    async def by_ids(self, collection_id: int, ids: Sequence[str]) -> dict[str, PointRow]:
        """Points by id; unknown ones are left out."""
        p = collection_points
        out: dict[str, PointRow] = {}
        async with self._database.read() as db:
            for some in parts(ids):
                query = sa.select(p.c.label, p.c.point_id, p.c.payload, p.c.vector).where(
                    p.c.collection_id == collection_id, p.c.point_id.in_(some)
                )
                out.update({r.point_id: PointRow(*r) for r in await db.execute(query)})
        return out

    async def add_snapshot(self, collection_id: int, row: SnapshotRow) -> None:
        """Keep a snapshot's facts. Raises NotFound."""
        async with self._database.begin() as db:
            c = collections
            mine = sa.select(c.c.id).where(c.c.id == collection_id).with_for_update()
            if await db.scalar(mine) is None:
                raise NotFound("collection", str(collection_id))
            await db.execute(
                collection_snapshots.insert().values(
                    collection_id=collection_id,
                    name=row.name,
                    points=row.points,
                    size_bytes=row.size_bytes,
                    sha256=row.sha256,
                    created_at=row.created_at,
                )
            )

    async def snapshots(self, collection_id: int) -> list[SnapshotRow]:
        """Newest first."""
        s = collection_snapshots
        query = (
            sa.select(s.c.name, s.c.points, s.c.size_bytes, s.c.sha256, s.c.created_at)
            .where(s.c.collection_id == collection_id)
            .order_by(s.c.created_at.desc(), s.c.name.desc())
        )
        async with self._database.read() as db:
            return [SnapshotRow(*r) for r in await db.execute(query)]


def _collection(row: sa.Row) -> CollectionRow:
    return CollectionRow(row.id, row.name, row.config, row.created_at)


async def _page(db: AsyncConnection, collection_id: int, label: int, size: int) -> list[PointRow]:
    p = collection_points
    query = (
        sa.select(p.c.label, p.c.point_id, p.c.payload, p.c.vector)
        .where(p.c.collection_id == collection_id, p.c.label >= label)
        .order_by(p.c.label)
        .limit(size)
    )
    return [PointRow(*r) for r in await db.execute(query)]
