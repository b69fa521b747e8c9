"""Collections: made, written, read and kept in order. Searches are in searching.py.

The database holds the truth. A write is committed there first, then brought into the index in
memory, then answered; so an answered write survives a crash and is seen by every later search. The
index on disk is a copy from some moment: at the start it is loaded, what was removed since is taken
out, what was written since is added.
"""

from __future__ import annotations

import asyncio
import difflib
import logging
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import orjson
from forebay.errors import FailedPrecondition, Internal, InvalidArgument, NotFound
from numpy.typing import NDArray

from forebay_server.core.call import Call
from forebay_server.dataplane.embedding import Embedded, TextEmbedder
from forebay_server.dataplane.models import ModelAccess
from forebay_server.indexes import files, filters
from forebay_server.indexes.analysis import LANGUAGES
from forebay_server.indexes.collection import (
    CollectionConfig,
    CollectionIndex,
    IndexedPoint,
    TextFieldConfig,
    text_at,
)
from forebay_server.indexes.dense import DenseConfig
from forebay_server.storage.collections import CollectionRow, CollectionStore, PointRow

log = logging.getLogger("forebay.collections")
T = TypeVar("T")

#: The index is saved after this many changes, or this share of the points, whichever is more.
SAVE_CHANGES, SAVE_SHARE = 20_000, 0.2
#: A collection is rebuilt when this share of its slots is dead, and there are this many.
REBUILD_SHARE, REBUILD_SLOTS = 0.3, 10_000
#: Bytes of one point's payload as JSON.
MAX_PAYLOAD = 1 << 20
EMBEDDING = ("embedding",)
#: First letter of the names of collections that belong to knowledge bases.
HIDDEN = "."


@dataclass(slots=True, eq=False)
class OpenCollection:
    """A collection with its index. Writes hold `lock`; searches take `index` as it is."""

    row: CollectionRow
    config: CollectionConfig
    index: CollectionIndex
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    maintenance: asyncio.Task[None] | None = None
    deleted: bool = False

    @property
    def name(self) -> str:
        """Its name."""
        return self.row.name


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
    ) -> None:
        self.store = store
        self.folder = folder
        self._access = access
        self._embedder = embedder
        self._on_rebuild = on_rebuild
        self._open: dict[str, OpenCollection] = {}
        self._making: set[str] = set()
        self._tasks: set[asyncio.Future[Any]] = set()
        self._closing = False

    # Life.

    async def start(self) -> None:
        """Open every collection."""
        for row in await self.store.all():
            await self._open_row(row)

    async def close(self) -> None:
        """Finish writes and save what has changed."""
        self._closing = True
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for c in self._open.values():
            if c.maintenance is not None:
                await asyncio.gather(c.maintenance, return_exceptions=True)
            async with c.lock:
                if c.index.changes:
                    await asyncio.to_thread(files.save, c.index, self.index_folder(c))

    def index_folder(self, c: OpenCollection) -> Path:
        """Where its index is saved."""
        return self.folder / str(c.row.id) / "index"

    async def _open_row(self, row: CollectionRow) -> OpenCollection:
        config = config_from_json(row.config)
        c = OpenCollection(row, config, CollectionIndex(config))
        began = time.monotonic()
        try:
            c.index = await asyncio.to_thread(files.load, config, self.index_folder(c))
        except files.DamagedIndex as e:
            if self.index_folder(c).exists():
                log.error("the index of collection %s is built anew: %s", row.name, e)
                self._on_rebuild(row.name, "damaged")
                await asyncio.to_thread(files.remove, self.index_folder(c))
        await self._catch_up(c.row.id, c.index)
        self._open[row.name] = c
        took = time.monotonic() - began
        log.info("collection %s is open: %d points in %.1f s", row.name, len(c.index), took)
        self._maintain(c)
        return c

    async def _catch_up(self, collection_id: int, index: CollectionIndex) -> None:
        """Bring an index to the state of the database."""
        if index.next_label:
            labels = np.array(await self.store.labels(collection_id), np.int64)
            await asyncio.to_thread(index.keep_only, labels)
        async for rows in self.store.points_from(collection_id, index.next_label):
            await asyncio.to_thread(index.write, [indexed(r) for r in rows])

    # Reading.

    def get(self, name: str) -> OpenCollection:
        """The collection. Raises NotFound, naming the nearest."""
        c = self._open.get(name)
        if c is None:
            raise NotFound(
                "collection", name, nearest=difflib.get_close_matches(name, self._open, n=3)
            )
        return c

    def all(self) -> list[OpenCollection]:
        """Every collection, by name."""
        return [self._open[name] for name in sorted(self._open)]

    async def points(self, name: str, ids: Sequence[str]) -> list[PointRow]:
        """Points in the order of the ids; unknown ones are left out."""
        c = self.get(name)
        found = await self.store.by_ids(c.row.id, list(dict.fromkeys(ids)))
        return [found[i] for i in ids if i in found]

    async def page(self, name: str, label: int, size: int) -> list[PointRow]:
        """At most `size` points from a label on."""
        async for rows in self.store.points_from(self.get(name).row.id, label, size):
            return rows
        return []

    # Making and removing.

    async def create(self, call: Call, name: str, config: CollectionConfig) -> OpenCollection:
        """A new collection; dimensions and the model's version are filled in."""
        config = await self._complete(call, config)
        row = await self.store.create(name, orjson.dumps(asdict(config)).decode())
        c = self._open[name] = OpenCollection(row, config, CollectionIndex(config))
        return c

    async def _complete(self, call: Call, config: CollectionConfig) -> CollectionConfig:
        dense, model = config.dense, config.embedding_model
        for i, text in enumerate(config.text_fields):
            if text.language not in LANGUAGES:
                known = ", ".join(LANGUAGES[1:])
                path = f"config.text_fields[{i}].language"
                raise InvalidArgument.at(path, f"is {text.language!r}; known are {known}")
            if text.path in [t.path for t in config.text_fields[:i]]:
                raise InvalidArgument.at(f"config.text_fields[{i}].path", "is there twice")
        if model:
            served = await self._access.resolve_async(call, model, EMBEDDING)
            own = served.manifest.embedding_head.dimensions
            model = f"{served.name}@{served.version}"
            if dense is not None and dense.dimensions not in (0, own):
                raise InvalidArgument.at(
                    "config.dimensions", f"is {dense.dimensions}; {model} makes vectors of {own}"
                )
            dense = DenseConfig(**{**asdict(dense or DenseConfig(own)), "dimensions": own})
        elif dense is not None and not dense.dimensions:
            dense = None
        if dense is None and not config.text_fields:
            raise InvalidArgument.at(
                "config", "needs dimensions or embedding_model for dense search, or text_fields"
            )
        if dense is not None and dense.code_bytes and dense.dimensions % dense.code_bytes:
            raise InvalidArgument.at(
                "config.index.code_bytes",
                f"is {dense.code_bytes}, which does not divide the {dense.dimensions} dimensions",
            )
        return CollectionConfig(dense, config.text_fields, config.k1, config.b, model)

    def visible(self) -> list[OpenCollection]:
        """Those that callers made; knowledge bases keep their chunks in others."""
        return [c for c in self.all() if not c.name.startswith(HIDDEN)]

    async def delete(self, name: str) -> int:
        """Remove a collection with its files; gives the number of its points."""
        c = self.get(name)
        return await self._finish(self._delete(c))

    async def _delete(self, c: OpenCollection) -> int:
        async with c.lock:
            if c.deleted:
                raise NotFound("collection", c.name)
            count = await self.store.delete(c.row.id)
            c.deleted = True
            self._open.pop(c.name, None)
        if c.maintenance is not None:
            await asyncio.gather(c.maintenance, return_exceptions=True)
        await asyncio.to_thread(_remove_folder, self.folder / str(c.row.id))
        return count

    # Writing.

    async def upsert(
        self,
        call: Call,
        name: str,
        points: Sequence[NewPoint],
        path: str = "points",
        gone: Sequence[str] = (),
    ) -> Written:
        """Write points, and remove those in `gone`, all or nothing.

        Args:
            path: the request's field that the points came from, for errors.
        """
        c = self.get(name)
        self._check(c, points, path)
        vectors = [p.vector for p in points]
        missing = [i for i, v in enumerate(vectors) if v is None] if c.config.dense else []
        embedded = None
        if missing:
            texts = [self._text_to_embed(c, points[i], f"{path}[{i}]") for i in missing]
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
                    f"{path}[{i}].payload",
                    f"has {len(payload)} bytes as JSON; the limit is {MAX_PAYLOAD}",
                )
        replaced = await self._finish(self._write(c, points, vectors, rows, gone))
        return Written(len(points) - replaced, replaced, embedded)

    def _check(self, c: OpenCollection, points: Sequence[NewPoint], path: str) -> None:
        seen: set[str] = set()
        for i, p in enumerate(points):
            if p.id in seen:
                raise InvalidArgument.at(f"{path}[{i}].id", f"{p.id!r} is there twice")
            seen.add(p.id)
            if p.vector is None:
                continue
            at = f"{path}[{i}].vector"
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
        async with c.lock:
            if c.deleted:
                raise NotFound("collection", c.name)
            first, replaced = await self.store.upsert(c.row.id, rows, gone)
            indexed_points = [
                IndexedPoint(first + i, p.id, v, p.payload)
                for i, (p, v) in enumerate(zip(points, vectors, strict=True))
            ]
            await self._apply(c, indexed_points, replaced)
        self._maintain(c)
        return len(replaced)

    async def _apply(
        self, c: OpenCollection, points: Sequence[IndexedPoint], gone: Sequence[int]
    ) -> None:
        """Bring committed changes into the index. When that fails, the index is built anew."""
        try:
            if len(points) + len(gone) <= 8:
                c.index.write(points, gone)  # a few microseconds: no thread hop
            else:
                await asyncio.to_thread(c.index.write, points, gone)
        except Exception:
            log.exception("the index of collection %s took no write; it is built anew", c.name)
            self._on_rebuild(c.name, "failed_write")
            fresh = CollectionIndex(c.config)
            await self._catch_up(c.row.id, fresh)
            c.index = fresh

    async def remove(
        self, name: str, ids: Sequence[str] | None, condition: filters.Filter | None
    ) -> int:
        """Remove points by id, or those that match; gives how many."""
        c = self.get(name)
        return await self._finish(self._remove(c, ids, condition))

    async def _remove(
        self, c: OpenCollection, ids: Sequence[str] | None, condition: filters.Filter | None
    ) -> int:
        async with c.lock:
            if c.deleted:
                raise NotFound("collection", c.name)
            if condition is not None:
                check_filter(c.config, condition)
                labels = await asyncio.to_thread(c.index.matching_labels, condition)
                await self.store.delete_labels(c.row.id, labels)
            else:
                labels = await self.store.delete_ids(c.row.id, list(ids or ()))
            await self._apply(c, (), labels)
        self._maintain(c)
        return len(labels)

    async def _finish(self, work: Coroutine[Any, Any, T]) -> T:
        """Run to the end, also when the caller goes away: truth and index must not part."""
        if self._closing:
            work.close()
            raise FailedPrecondition("the server is shutting down", reason="DRAINING")
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    # Keeping in order.

    def _maintain(self, c: OpenCollection) -> None:
        """Start what is due in the background; one piece of work per collection at a time."""
        running = c.maintenance is not None and not c.maintenance.done()
        if not running and not self._closing and not c.deleted and self._due(c.index):
            c.maintenance = asyncio.create_task(self._run_maintenance(c))

    @staticmethod
    def _due(index: CollectionIndex) -> str:
        if index.dense is not None and index.dense.should_absorb():
            return "absorb"
        if index.dead_share > REBUILD_SHARE and len(index.ids) > REBUILD_SLOTS:
            return "rebuild"
        if index.changes > max(SAVE_CHANGES, SAVE_SHARE * len(index)):
            return "save"
        return ""

    async def _run_maintenance(self, c: OpenCollection) -> None:
        try:
            while not self._closing and not c.deleted and (due := self._due(c.index)):
                began = time.monotonic()
                if due == "absorb":
                    await asyncio.to_thread(c.index.absorb)
                elif due == "rebuild":
                    await self._rebuild(c)
                else:
                    # Writers wait for the copy, by the index's own lock; searches do not.
                    await asyncio.to_thread(files.save, c.index, self.index_folder(c))
                took = time.monotonic() - began
                log.info("collection %s: %s took %.1f s", c.name, due, took)
        except Exception:
            log.exception("upkeep of collection %s failed", c.name)

    async def _rebuild(self, c: OpenCollection) -> None:
        """A new index without the dead, made beside the old one."""
        fresh = CollectionIndex(c.config)
        await self._catch_up(c.row.id, fresh)
        await asyncio.to_thread(fresh.absorb)
        async with c.lock:
            await self._catch_up(c.row.id, fresh)
            c.index = fresh


def indexed(row: PointRow) -> IndexedPoint:
    """A stored point as the index takes it."""
    vector = None if row.vector is None else np.frombuffer(row.vector, "<f4")
    return IndexedPoint(row.label, row.point_id, vector, orjson.loads(row.payload))


def config_from_json(text: str) -> CollectionConfig:
    """The configuration of a stored collection."""
    d = orjson.loads(text)
    dense = DenseConfig(**d["dense"]) if d["dense"] else None
    fields = tuple(TextFieldConfig(**f) for f in d["text_fields"])
    return CollectionConfig(dense, fields, d["k1"], d["b"], d["embedding_model"])


def check_filter(config: CollectionConfig, condition: filters.Filter, path: str = "filter") -> None:
    """Raise InvalidArgument for a condition on words of a field that is no text field."""
    if isinstance(condition, filters.AllOf | filters.AnyOf | filters.NoneOf):
        for c in condition.filters:
            check_filter(config, c, path)
    elif isinstance(condition, filters.Words):
        known = [f.path for f in config.text_fields]
        if condition.key not in known:
            raise InvalidArgument.at(
                f"{path}.text.key",
                f"is {condition.key!r}; the text fields are {', '.join(known) or 'none'}",
            )


def _remove_folder(folder: Path) -> None:
    import shutil

    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        return
    except OSError as e:
        raise Internal(f"files of the collection could not be removed: {e.strerror}") from e
