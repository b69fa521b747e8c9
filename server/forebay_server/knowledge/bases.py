"""Knowledge bases and their documents: stored, listed, removed. Ingest is in ingest.py.

A knowledge base keeps its chunks in a collection of its own, its files in a folder of its own. A
document that was acknowledged is on disk: its file first, then its row.

Where servers share a database, what another one has made is looked up when it is asked for, and what
another one has removed is forgotten within FOLLOW_S.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import orjson
from forebay.errors import (
    AlreadyExists,
    FailedPrecondition,
    ForebayError,
    InvalidArgument,
    NotFound,
)

from forebay_server.core.call import Call
from forebay_server.dataplane.collection_config import check_language
from forebay_server.dataplane.collections import Collections
from forebay_server.dataplane.writes import Writes
from forebay_server.indexes.collection import CollectionConfig, TextFieldConfig
from forebay_server.indexes.filters import OneOf, tagged
from forebay_server.knowledge.chunking import ChunkConfig
from forebay_server.knowledge.leftovers import LEFT_OVER_S, collection_of, remove_leftovers
from forebay_server.knowledge.texts import DocumentTexts
from forebay_server.knowledge.uploads import Upload
from forebay_server.storage.knowledge import BaseRow, DocumentRow, KnowledgeStore

log = logging.getLogger("forebay.knowledge")

#: Seconds within which bases that another server has removed are forgotten.
FOLLOW_S = 1.0


@dataclass(frozen=True, slots=True)
class BaseConfig:
    """What a knowledge base is. `embedding_model` is `name@version` once it is made."""

    embedding_model: str = ""
    language: str = ""
    chunks: ChunkConfig = field(default_factory=ChunkConfig)


@dataclass(frozen=True, slots=True)
class Base:
    """A knowledge base."""

    row: BaseRow
    config: BaseConfig

    @property
    def name(self) -> str:
        """Its name."""
        return self.row.name

    @property
    def collection(self) -> str:
        """Name of the collection with its chunks."""
        return collection_of(self.row.id)


class KnowledgeBases:
    """See the module. Lives on one event loop."""

    def __init__(self, store: KnowledgeStore, collections: Collections, folder: Path) -> None:
        self.store = store
        self.collections = collections
        self._folder = folder
        self._writes = Writes()
        self._bases: dict[str, Base] = {}
        self.texts = DocumentTexts(store, folder)
        self._following: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Read what is stored; take away what a crash left of what was never acknowledged, or was
        being removed."""
        for row in await self.store.bases():
            if await self._take(row) is None and self._left_over(row):
                with contextlib.suppress(NotFound):  # another server was quicker
                    await self.store.delete_base(row.id)
        await remove_leftovers(self.store, self.collections, self._folder)
        if self._shared:
            self._following = asyncio.create_task(self._follow())

    async def close(self) -> None:
        """Finish writes. Before the collections are closed."""
        if self._following is not None:
            self._following.cancel()
            await asyncio.wait({self._following})
        await self._writes.close()

    @property
    def _shared(self) -> bool:
        """Whether other servers may use the same database."""
        return self.store.owner is not None

    def _left_over(self, row: BaseRow) -> bool:
        """Whether nobody can be making the base's collection any more."""
        return not self._shared or row.created_at < time.time() - LEFT_OVER_S

    async def _take(self, row: BaseRow) -> Base | None:
        """Know a stored base from now on; None when it has no collection."""
        base = Base(row, _config(row.config))
        try:
            await self.collections.known(base.collection)
        except NotFound:
            return None
        known = self._bases.get(row.name)
        if known is None or known.row.id < row.id:  # ids rise: that one is newer
            self._bases[row.name] = base
        return self._bases[row.name]

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(FOLLOW_S)
            try:
                await self._rows()
            except ForebayError as e:
                log.warning("knowledge bases of other servers are not followed: %s", e.message)
            except Exception:
                log.exception("following knowledge bases failed; it is tried again")

    async def _rows(self) -> list[BaseRow]:
        """What is stored; what is not any more is forgotten."""
        before = self.all()
        rows = await self.store.bases()
        ids = {row.id for row in rows}
        for base in before:
            if base.row.id not in ids and self._bases.get(base.name) is base:
                del self._bases[base.name]
        return rows

    async def _look(self, wanted: Callable[[BaseRow], bool] = lambda row: True) -> list[str]:
        """Know those of the wanted bases that other servers have made; gives the names of all."""
        if not self._shared:
            return list(self._bases)
        rows = await self._rows()
        for row in rows:
            if wanted(row) and self._known(row.id) is None:
                await self._take(row)
        return [row.name for row in rows]

    def folder(self, base_id: int) -> Path:
        """Where a knowledge base keeps its files."""
        return self._folder / str(base_id)

    async def get(self, name: str) -> Base:
        """The knowledge base. Raises NotFound, naming the nearest."""
        if name not in self._bases:
            names = await self._look(lambda row: row.name == name)
            if name not in self._bases:
                nearest = difflib.get_close_matches(name, names, n=3)
                raise NotFound("knowledge base", name, nearest=nearest)
        return self._bases[name]

    async def by_id(self, base_id: int) -> Base | None:
        """The knowledge base; None when it is gone."""
        if self._known(base_id) is None:
            await self._look(lambda row: row.id == base_id)
        return self._known(base_id)

    def _known(self, base_id: int) -> Base | None:
        return next((b for b in self._bases.values() if b.row.id == base_id), None)

    def all(self) -> list[Base]:
        """All that this server knows, by name."""
        return [self._bases[n] for n in sorted(self._bases)]

    async def listed(self) -> list[Base]:
        """All, by name."""
        await self._look()
        return self.all()

    async def create(self, call: Call, name: str, config: BaseConfig) -> Base:
        """A new knowledge base."""
        if name in self._bases:
            await self._look(lambda row: False)  # another server may have removed it
        if name in self._bases:
            raise AlreadyExists(f"there is a knowledge base {name!r} already")
        check_language(config.language, "config.language")
        served = await self.collections._access.resolve_async(
            call, config.embedding_model, ("embedding",)
        )
        model = f"{served.name}@{served.version}"
        tokens, overlap = config.chunks.tokens, config.chunks.overlap
        if overlap is not None and overlap >= tokens:
            raise InvalidArgument.at(
                "config.chunks.overlap", f"is {overlap}; it must be less than tokens, {tokens}"
            )
        config = BaseConfig(model, config.language, config.chunks)
        return await self._writes.finish(self._create(call, name, config))

    async def _create(self, call: Call, name: str, config: BaseConfig) -> Base:
        row = await self.store.create_base(name, orjson.dumps(asdict(config)).decode())
        base = Base(row, config)
        try:
            fields = (
                TextFieldConfig("text", config.language),
                TextFieldConfig("name", config.language, 0.5),
            )
            chunks = CollectionConfig(None, fields, embedding_model=config.embedding_model)
            await self.collections.create(call, base.collection, chunks)
        except BaseException:
            with contextlib.suppress(NotFound):
                await self.store.delete_base(row.id)
            raise
        self._bases[name] = base
        return base

    async def delete(self, name: str) -> int:
        """Remove a knowledge base with every trace; gives the number of its documents."""
        return await self._writes.finish(self._delete(await self.get(name)))

    async def _delete(self, base: Base) -> int:
        if self._bases.get(base.name) is not base:  # another call was quicker
            raise NotFound("knowledge base", base.name)
        del self._bases[base.name]
        try:
            count = await self.store.delete_base(base.row.id)
        except NotFound:  # another server was quicker
            raise NotFound("knowledge base", base.name) from None
        except BaseException:
            self._bases[base.name] = base  # nothing was removed
            raise
        with contextlib.suppress(NotFound):  # another server saw it without its base, at its start
            await self.collections.delete(base.collection)
        await asyncio.to_thread(shutil.rmtree, self.folder(base.row.id), True)
        return count

    def upload(self, base: Base, name: str) -> Upload:
        """A file for a knowledge base."""
        return Upload(self.folder(base.row.id), name)

    async def add(
        self,
        base: Base,
        upload: Upload,
        metadata: Mapping[str, Any],
        key_id: str,
        on_new: Callable[[DocumentRow], None] = lambda row: None,
    ) -> tuple[DocumentRow, bool]:
        """Keep an uploaded file, which is the knowledge base's from now on, or leave nothing of it;
        gives the document, and whether its content was there already.

        Args:
            on_new: hears of a document whose content was not, also when the caller has gone.
        """
        try:
            return await self._writes.finish(self._add(base, upload, metadata, key_id, on_new))
        except FailedPrecondition:  # it was not begun
            upload.abort()
            raise

    async def _add(
        self,
        base: Base,
        upload: Upload,
        metadata: Mapping[str, Any],
        key_id: str,
        on_new: Callable[[DocumentRow], None],
    ) -> tuple[DocumentRow, bool]:
        try:
            row, known = await self._stored(base, upload, metadata, key_id)
        except BaseException:
            upload.abort()
            raise
        if known:
            upload.abort()
        else:
            on_new(row)
        return row, known

    async def _stored(
        self, base: Base, upload: Upload, metadata: Mapping[str, Any], key_id: str
    ) -> tuple[DocumentRow, bool]:
        digest = await asyncio.to_thread(upload.commit)
        now = time.time()
        row = DocumentRow(
            upload.id, base.row.id, upload.name, "", upload.size, digest, metadata, key_id,
            "queued", 0.0, "", "", [], 0, 0, 0, now, now,
        )  # fmt: skip
        try:
            earlier = await self.store.add(row)
        except NotFound:
            upload.abort()
            await self._leave_no_folder(base.row.id)
            raise NotFound("knowledge base", base.name) from None
        return (row, False) if earlier is None else (earlier, True)

    async def document(self, base: Base, document: str) -> DocumentRow:
        """The document. Raises NotFound."""
        row = await self.store.get(base.row.id, document)
        if row is None:
            raise NotFound("document", document)
        return row

    def file_path(self, row: DocumentRow) -> Path:
        """Where a document's file is kept."""
        return self.folder(row.base_id) / f"{row.id}.file"

    async def reachable(self, row: DocumentRow) -> bool:
        """Whether a document's file is on this server's disk: another one may have it."""
        return not self._shared or await asyncio.to_thread(self.file_path(row).exists)

    async def delete_document(self, base: Base, document: str) -> int:
        """Remove a document with every trace; gives the number of its chunks."""
        row = await self.document(base, document)
        return await self._writes.finish(self._delete_document(base, row))

    async def _delete_document(self, base: Base, row: DocumentRow) -> int:
        # The row first: an ingest that runs, here or on another server, looks for it when it has
        # written chunks.
        await self.store.delete(row.id)
        count = await self.collections.remove(base.collection, None, chunks_of(row.id))
        self._remove_files(row)
        return count

    async def leave_no_file(self, row: DocumentRow) -> None:
        """The document was removed while it was worked on: files written since go too."""
        self._remove_files(row)
        await self._leave_no_folder(row.base_id)

    async def _leave_no_folder(self, base_id: int) -> None:
        """A base that was removed while files were written has no folder."""
        if base_id not in {row.id for row in await self.store.bases()}:
            await asyncio.to_thread(shutil.rmtree, self.folder(base_id), True)

    def _remove_files(self, row: DocumentRow) -> None:
        for path in (self.file_path(row), self.texts.path(row.base_id, row.id)):
            path.unlink(missing_ok=True)
        self.texts.forget(row.base_id, row.id)


def chunks_of(document: str) -> OneOf:
    """The condition that a document's chunks meet."""
    return OneOf("document", (tagged(document),))


def chunk_ids(row: DocumentRow) -> list[str]:
    """Ids of a document's chunks."""
    return [chunk_id(row.id, row.generation, i) for i in range(row.chunks)]


def chunk_id(document: str, generation: int, number: int) -> str:
    """A chunk's id: ingests count as generations, each document's chunks from 0."""
    return f"{document}.{generation}.{number}"


def _config(text: str) -> BaseConfig:
    d = orjson.loads(text)
    return BaseConfig(d["embedding_model"], d["language"], ChunkConfig(**d["chunks"]))
