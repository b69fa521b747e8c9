"""Snapshots: all points of a moment in one SQLite file with a checksum, and collections made of it."""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import sqlite3
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import orjson
from forebay.errors import AlreadyExists, FailedPrecondition, NotFound

from forebay_server.core.call import Call
from forebay_server.dataplane.collection_config import config_from_json
from forebay_server.dataplane.collections import UNFINISHED, Collections, NewPoint
from forebay_server.dataplane.upkeep import OpenCollection
from forebay_server.storage.collections import PointRow, SnapshotRow

#: Points that are written together when a collection is restored.
GROUP = 2000


class Snapshots:
    """See the module."""

    def __init__(self, collections: Collections) -> None:
        self._collections = collections

    def _path(self, c: OpenCollection, name: str) -> Path:
        return self._collections.folder / str(c.row.id) / "snapshots" / f"{name}.db"

    async def start(self) -> None:
        """Remove files that a crash has left: unfinished ones, and those that nobody was told of."""
        for c in self._collections.all():
            known = {r.name for r in await self._collections.store.snapshots(c.row.id)}
            await asyncio.to_thread(_remove_unknown, self._path(c, "x").parent, known)

    async def make(self, collection: str) -> SnapshotRow:
        """A snapshot of this moment. This server's writes to the collection wait, searches do not."""
        c = await self._collections.known(collection)
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        name = f"{stamp}-{secrets.token_hex(4)}"
        path = self._path(c, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".new")
        writer = await asyncio.to_thread(_open_new, temporary, c.row.config)
        count = 0
        try:
            async with c.lock:
                _check_there(c)
                async with self._collections.store.moment(c.row.id) as moment:
                    async for rows in moment.points_from(0):
                        await asyncio.to_thread(_add, writer, rows)
                        count += len(rows)
            digest = await asyncio.to_thread(_seal, writer, temporary, path)
            async with c.lock:
                _check_there(c)
                row = SnapshotRow(name, count, path.stat().st_size, digest, time.time())
                await self._collections.store.add_snapshot(c.row.id, row)
        except BaseException as e:
            writer.close()
            temporary.unlink(missing_ok=True)
            if isinstance(e, Exception):
                _check_there(c)  # the files go with it
            raise
        return row

    async def all(self, collection: str) -> list[SnapshotRow]:
        """Newest first."""
        c = await self._collections.known(collection)
        return await self._collections.store.snapshots(c.row.id)

    async def restore(self, call: Call, collection: str, name: str, target: str) -> OpenCollection:
        """A new collection from a snapshot.

        Raises:
            NotFound: no such snapshot.
            AlreadyExists: there is a collection with that name.
            FailedPrecondition: SNAPSHOT_DAMAGED, the file is not what was written;
                SNAPSHOT_ELSEWHERE, another server may have it.
        """
        c = await self._collections.known(collection)
        rows = {r.name: r for r in await self._collections.store.snapshots(c.row.id)}
        if name not in rows:
            raise NotFound("snapshot", name, nearest=list(rows)[:3])
        path = self._path(c, name)
        digest = await asyncio.to_thread(_digest, path)
        if not digest and self._collections.store.shared:
            place = f"collections/{c.row.id}/snapshots/{path.name}"
            raise FailedPrecondition(
                f"the file of snapshot {name!r} is not on this server: call the server that made it, "
                f"or copy {place} from its home to this one's",
                reason="SNAPSHOT_ELSEWHERE",
            )
        if digest != rows[name].sha256:
            raise FailedPrecondition(
                f"the file of snapshot {name!r} is missing or has changed since it was written",
                reason="SNAPSHOT_DAMAGED",
            )
        with suppress(NotFound):
            await self._collections.known(target)
            raise AlreadyExists(f"there is a collection {target!r} already")
        # Nobody sees half a collection, nor does a crash leave one: it gets its name at the end.
        hidden = f"{UNFINISHED}{secrets.token_hex(8)}"
        await self._collections.create(call, hidden, config_from_json(c.row.config))
        try:
            groups = _groups(path)
            while (points := await asyncio.to_thread(next, groups, None)) is not None:
                await self._collections.upsert(call, hidden, points)
            return await self._collections.rename(hidden, target)
        except BaseException:
            await self._collections.delete(hidden)
            raise


def _check_there(c: OpenCollection) -> None:
    if c.deleted:  # since it was looked up
        raise NotFound("collection", c.name)


def _remove_unknown(folder: Path, known: set[str]) -> None:
    for path in folder.glob("*") if folder.is_dir() else ():
        if path.suffix != ".db" or path.stem not in known:
            path.unlink(missing_ok=True)


def _open_new(path: Path, config: str) -> sqlite3.Connection:
    path.unlink(missing_ok=True)
    db = sqlite3.connect(path, check_same_thread=False)
    db.execute("CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT)")
    db.execute(
        "CREATE TABLE points (label INTEGER PRIMARY KEY, id TEXT, payload BLOB, vector BLOB)"
    )
    db.execute("INSERT INTO meta VALUES ('config', ?)", (config,))
    return db


def _add(db: sqlite3.Connection, rows: list[PointRow]) -> None:
    db.executemany(
        "INSERT INTO points VALUES (?, ?, ?, ?)",
        ((r.label, r.point_id, r.payload, r.vector) for r in rows),
    )


def _seal(db: sqlite3.Connection, temporary: Path, path: Path) -> str:
    db.commit()
    db.close()
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    digest = _digest(temporary)
    temporary.rename(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    return digest


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return ""


def _groups(path: Path) -> Iterator[list[NewPoint]]:
    db = sqlite3.connect(f"file:{path}?mode=ro", uri=True, check_same_thread=False)
    try:
        cursor = db.execute("SELECT id, payload, vector FROM points ORDER BY label")
        while rows := cursor.fetchmany(GROUP):
            yield [
                NewPoint(i, None if v is None else np.frombuffer(v, "<f4"), orjson.loads(p))
                for i, p, v in rows
            ]
    finally:
        db.close()
