"""Collections: made, written, read and kept in order. Searches are in searching.py.

The database holds the truth. A write is committed there first, then brought into the index in
memory, then answered; so an answered write survives a crash and is seen by every later search. The
index on disk is a copy from some moment: at the start it is loaded, what was removed since is taken
out, what was written since is added. Servers that share a PostgreSQL follow each other's writes: see
following.py.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import orjson
from forebay.errors import InvalidArgument, NotFound
from numpy.typing import NDArray

from forebay_server.core.call import Call
from forebay_server.dataplane.collection_config import check_filter, completed
from forebay_server.dataplane.directory import Directory
from forebay_server.dataplane.embedding import Embedded, TextEmbedder
from forebay_server.dataplane.following import Follower
from forebay_server.dataplane.models import ModelAccess
from forebay_server.dataplane.upkeep import OpenCollection, Upkeep, discard
from forebay_server.dataplane.writes import Writes
from forebay_server.indexes import filters
from forebay_server.indexes.backends import Backends
from forebay_server.indexes.collection import CollectionConfig, IndexedPoint, text_at
from forebay_server.storage.collections import CollectionRow, CollectionStore, PointRow

T = TypeVar("T")

log = logging.getLogger("forebay.collections")

#: Bytes of one point's payload as JSON.
MAX_PAYLOAD = 1 << 20
#: First letter of the names of collections that belong to knowledge bases.
HIDDEN = "."
#: And of those that are being restored: they get their name when they are whole.
UNFINISHED = ".restoring-"
#: Seconds after which, where servers share a database, nobody restores one of these any more.
RESTORED_S = 86_400.0


@dataclass(frozen=True, slots=True)
class NewPoint:
    """A point to write. `vector` [dimensions], None = embed the first text field."""

    id: str
    vector: NDArray[np.float32] | None
    payload: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Written:
    """What an upsert did. `embedded` says what embedding took, None when none was needed."""

    inserted: int
    updated: int
    embedded: Embedded | None = None


class Collections:
    """See the module. Lives on one event loop; `get` may be called from any thread."""

    def __init__(
        self,
        store: CollectionStore,
        folder: Path,
        access: ModelAccess,
        embedder: TextEmbedder,
        on_rebuild: Callable[[str, str], None] = lambda name, why: None,
        backends: Backends | None = None,
    ) -> None:
        self.store = store
        self.folder = folder
        self.upkeep = Upkeep(store, folder, on_rebuild, backends)
        self._access = access
        self._embedder = embedder
        self._directory = Directory()
        self._writes = Writes()
        #: None where no other server writes to the database.
        self.follower = (
            Follower(store, self.upkeep, self._directory, self._forget) if store.shared else None
        )

    # Life.

    async def start(self) -> None:
        """Open every collection; remove what a crash has left of others."""
        rows = await self.store.all()
        known = {str(r.id) for r in rows}
        await asyncio.to_thread(_remove_strangers, self.folder, known)
        qdrant = self.upkeep.backends.qdrant
        if qdrant is not None:
            await asyncio.to_thread(discard, lambda: qdrant.keep_only(known))
        for row in rows:
            with suppress(NotFound):  # another server has deleted it meanwhile
                c = await self.upkeep.open(row)
                self._directory.put(c)
                if self._left(row):
                    await self._delete(c)
        if self.follower is not None:
            self.follower.start()

    def _left(self, row: CollectionRow) -> bool:
        """Whether it is what a crash has left of a restoration."""
        if not row.name.startswith(UNFINISHED):
            return False
        return not self.store.shared or row.created_at < time.time() - RESTORED_S

    async def close(self) -> None:
        """Finish writes and save what has changed."""
        if self.follower is not None:
            await self.follower.close()
        await self._writes.close()
        await self.upkeep.close(self._directory.every())

    # Reading.

    def get(self, name: str) -> OpenCollection:
        """The collection, as far as it is known here. Raises NotFound, naming the nearest."""
        return self._directory.get(name)

    async def known(self, name: str) -> OpenCollection:
        """The collection, also when another server has made it just now. Raises NotFound, naming the
        nearest."""
        if self.follower is not None and not self._directory.knows(name):
            await self.follower.find(name)
        return self.get(name)

    def resolve(self, call: Call, name: str, then: Callable[[], None]) -> OpenCollection | None:
        """The collection, when it is known here. Otherwise None: `then` runs when it is, or the call
        is ended with the error. From any thread."""
        if self.follower is None or self._directory.knows(name):
            return self.get(name)
        self._access.go_on(call, self.known(name), lambda c: then())
        return None

    async def _current(self, name: str, work: Callable[[OpenCollection], Awaitable[T]]) -> T:
        """Work on a collection. When another server has deleted it, and there is one of this name
        again, on that."""
        c = await self.known(name)
        try:
            return await work(c)
        except NotFound:
            if not c.deleted:
                raise
        return await work(await self.known(name))

    def all(self) -> list[OpenCollection]:
        """Every collection, by name."""
        return self._directory.named()

    async def points(self, name: str, ids: Sequence[str]) -> list[PointRow]:
        """Points in the order of the ids; unknown ones are left out."""
        c = await self.known(name)
        found = await self.store.by_ids(c.row.id, list(dict.fromkeys(ids)))
        return [found[i] for i in ids if i in found]

    async def page(self, name: str, label: int, size: int) -> list[PointRow]:
        """At most `size` points from a label on."""
        c = await self.known(name)
        async for rows in self.store.points_from(c.row.id, label, size):
            return rows
        return []

    # Making and removing.

    async def create(self, call: Call, name: str, config: CollectionConfig) -> OpenCollection:
        """A new collection; dimensions and the model's version are filled in."""
        config = await completed(self._access, call, config)
        self.upkeep.backends.check(config.dense)
        return await self._writes.finish(self._create(name, config))

    async def _create(self, name: str, config: CollectionConfig) -> OpenCollection:
        self._directory.making.append(name)
        try:
            row = await self.store.create(name, orjson.dumps(asdict(config)).decode())
            c = OpenCollection(row, config, self.upkeep.new_index(row, config))
            self._directory.put(c)
        finally:
            self._directory.making.remove(name)
        return c

    async def rename(self, name: str, new: str) -> OpenCollection:
        """Give a collection another name. Raises AlreadyExists."""
        return await self._current(name, lambda c: self._writes.finish(self._rename(c, new)))

    async def _rename(self, c: OpenCollection, new: str) -> OpenCollection:
        async with self._writing(c):
            await self.store.rename(c.row.id, new)
            self._directory.rename(c, new)
        return c

    @asynccontextmanager
    async def _writing(self, c: OpenCollection) -> AsyncIterator[None]:
        """A collection's lock. Raises NotFound when it is gone, here or in the database."""
        async with c.lock:
            if c.deleted:
                raise NotFound("collection", c.name)
            try:
                yield
            except NotFound:
                self._forget(c)
                raise NotFound("collection", c.name) from None

    def visible(self) -> list[OpenCollection]:
        """Those that callers made; knowledge bases keep their chunks in others."""
        return [c for c in self.all() if not c.name.startswith(HIDDEN)]

    async def delete(self, name: str) -> int:
        """Remove a collection with its files; gives the number of its points."""
        return await self._current(name, lambda c: self._writes.finish(self._delete(c)))

    async def _delete(self, c: OpenCollection) -> int:
        async with self._writing(c):
            count = await self.store.delete(c.row.id)
            self._forget(c)
        return count

    def _forget(self, c: OpenCollection) -> None:
        """It is deleted. An index in training is waited for in the background; a start removes what a
        crash leaves."""
        self._directory.drop(c)
        self._writes.keep(self._clean(c))

    async def _clean(self, c: OpenCollection) -> None:
        if c.maintenance is not None:
            await asyncio.gather(c.maintenance, return_exceptions=True)
        await asyncio.to_thread(_remove_folder, self.folder / str(c.row.id))
        if c.index.dense is not None:
            await asyncio.to_thread(discard, c.index.dense.discard)

    # Writing.

    async def upsert(
        self,
        call: Call,
        name: str,
        points: Sequence[NewPoint],
        path: str | Sequence[str] = "points",
        gone: Sequence[str] = (),
    ) -> Written:
        """Write points, and remove those in `gone`, all or nothing.

        Args:
            path: the request's field that the points came from, or the place of each, for errors.
        """
        return await self._current(name, lambda c: self._upsert(call, c, points, path, gone))

    async def _upsert(
        self,
        call: Call,
        c: OpenCollection,
        points: Sequence[NewPoint],
        path: str | Sequence[str],
        gone: Sequence[str],
    ) -> Written:
        self._check(c, points, path)
        vectors = [p.vector for p in points]
        missing = [i for i, v in enumerate(vectors) if v is None] if c.config.dense else []
        embedded = None
        if missing:
            texts = [self._text_to_embed(c, points[i], _place(path, i)) for i in missing]
            embedded = await self._embedder.embed(call, c.config.embedding_model, texts)
            for i, vector in zip(missing, embedded.vectors, strict=True):
                vectors[i] = vector
        rows = [
            (p.id, orjson.dumps(p.payload), None if v is None else v.astype("<f4").tobytes())
            for p, v in zip(points, vectors, strict=True)
        ]
        for i, (_, payload, _) in enumerate(rows):
            if len(payload) > MAX_PAYLOAD:
                raise InvalidArgument.at(
                    f"{_place(path, i)}.payload",
                    f"has {len(payload)} bytes as JSON; the limit is {MAX_PAYLOAD}",
                )
        replaced = await self._writes.finish(self._write(c, points, vectors, rows, gone))
        return Written(len(points) - replaced, replaced, embedded)

    def _check(
        self, c: OpenCollection, points: Sequence[NewPoint], path: str | Sequence[str]
    ) -> None:
        seen: set[str] = set()
        for i, p in enumerate(points):
            if p.id in seen:
                raise InvalidArgument.at(f"{_place(path, i)}.id", f"{p.id!r} is there twice")
            seen.add(p.id)
            if p.vector is None:
                continue
            at = f"{_place(path, i)}.vector"
            if c.config.dense is None:
                raise InvalidArgument.at(at, "is given; the collection has no vectors")
            if len(p.vector) != c.config.dense.dimensions:
                raise InvalidArgument.at(
                    at, f"has {len(p.vector)} numbers; {c.config.dense.dimensions} are needed"
                )
            if c.config.dense.metric == "cosine" and not p.vector.any():
                raise InvalidArgument.at(at, "is all zeros, which has no direction for cosine")

    def _text_to_embed(self, c: OpenCollection, point: NewPoint, path: str) -> str:
        fields = c.config.text_fields
        text = text_at(point.payload, fields[0].path) if fields else ""
        if not c.config.embedding_model:
            raise InvalidArgument.at(
                f"{path}.vector", "is empty, and the collection has no embedding model"
            )
        if not text.strip():
            where = f"payload.{fields[0].path}" if fields else "payload"
            raise InvalidArgument.at(
                f"{path}.vector", f"is empty, and {where} has no text to embed"
            )
        return text

    async def _write(
        self,
        c: OpenCollection,
        points: Sequence[NewPoint],
        vectors: Sequence[NDArray[np.float32] | None],
        rows: Sequence[tuple[str, bytes, bytes | None]],
        gone: Sequence[str],
    ) -> int:
        async with self._writing(c):
            first, replaced = await self.store.upsert(c.row.id, rows, gone)
            indexed_points = [
                IndexedPoint(first + i, p.id, v, p.payload)
                for i, (p, v) in enumerate(zip(points, vectors, strict=True))
            ]
            await self.upkeep.apply(c, first, indexed_points, replaced)
        self.upkeep.look_after(c)
        return len(replaced)

    async def remove(
        self, name: str, ids: Sequence[str] | None, condition: filters.Filter | None
    ) -> int:
        """Remove points by id, or those that match; gives how many."""
        return await self._current(
            name, lambda c: self._writes.finish(self._remove(c, ids, condition))
        )

    async def _remove(
        self, c: OpenCollection, ids: Sequence[str] | None, condition: filters.Filter | None
    ) -> int:
        async with self._writing(c):
            if condition is None:
                first, labels = await self.store.delete_ids(c.row.id, list(ids or ()))
                count = len(labels)
            else:
                check_filter(c.config, condition)
                if self.store.shared:  # what others wrote, too
                    await self.upkeep.catch_up(c)
                labels = await asyncio.to_thread(c.index.matching_labels, condition)
                if not labels:
                    return 0
                first, count = await self.store.delete_labels(c.row.id, labels)
            await self.upkeep.apply(c, first, (), labels)
        self.upkeep.look_after(c)
        return count


def _place(path: str | Sequence[str], i: int) -> str:
    return f"{path}[{i}]" if isinstance(path, str) else path[i]


def _remove_strangers(folder: Path, known: set[str]) -> None:
    if folder.is_dir():
        for path in folder.iterdir():
            if path.name.isdecimal() and path.name not in known:
                _remove_folder(path)


def _remove_folder(folder: Path) -> None:
    import shutil

    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        return
    except OSError as e:
        log.warning("files of a removed collection stay in %s: %s", folder, e.strerror)
