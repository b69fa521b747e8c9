"""Knowledge bases and their documents: stored, listed, removed. Ingest is in ingest.py.

A knowledge base keeps its chunks in a collection of its own, its files in a folder of its own. A
document that was acknowledged is on disk: its file first, then its row.
"""

from __future__ import annotations

import asyncio
import difflib
import hashlib
import os
import secrets
import shutil
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import orjson
from forebay.errors import FailedPrecondition, InvalidArgument, NotFound, TooLarge

from forebay_server.core.call import Call
from forebay_server.dataplane.collection_config import check_language
from forebay_server.dataplane.collections import HIDDEN, Collections
from forebay_server.dataplane.writes import Writes
from forebay_server.indexes.collection import CollectionConfig, TextFieldConfig
from forebay_server.indexes.filters import NoneOf, OneOf, tagged
from forebay_server.knowledge.chunking import ChunkConfig
from forebay_server.storage.knowledge import BaseRow, DocumentRow, KnowledgeStore

#: Bytes of one uploaded file.
MAX_FILE = 256 << 20
#: Characters of documents' texts that are kept in memory, for citations of the next answers.
KEPT_CHARACTERS = 8_000_000


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
        return f"{HIDDEN}knowledge-{self.row.id}"


class Upload:
    """A file on its way to disk."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self.id = secrets.token_hex(16)
        self.path = folder / f"{self.id}.file"
        folder.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = self.path.open("wb")
        self._digest = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> None:
        """One more piece. Raises TooLarge."""
        self.size += len(data)
        if self.size > MAX_FILE:
            raise TooLarge(self.name, size=self.size, limit=MAX_FILE, unit="bytes")
        self._digest.update(data)
        self._file.write(data)

    def commit(self) -> str:
        """On disk; gives the SHA-256."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._digest.hexdigest()

    def abort(self) -> None:
        """Leave nothing. Idempotent."""
        self._file.close()
        self.path.unlink(missing_ok=True)


class KnowledgeBases:
    """See the module. Lives on one event loop."""

    def __init__(self, store: KnowledgeStore, collections: Collections, folder: Path) -> None:
        self.store = store
        self.collections = collections
        self._folder = folder
        self._writes = Writes()
        self._bases: dict[str, Base] = {}
        self._texts: OrderedDict[tuple[int, str], str] = OrderedDict()
        self._characters = 0

    async def start(self) -> None:
        """Read what is stored; take away what a crash left of what was never acknowledged, or was
        being removed."""
        for row in await self.store.bases():
            base = Base(row, _config(row.config))
            if self._has_collection(base):
                self._bases[row.name] = base
            else:
                await self.store.delete_base(row.id)
        names = {b.collection for b in self._bases.values()}
        for c in self.collections.all():
            if c.name.startswith(f"{HIDDEN}knowledge-") and c.name not in names:
                await self.collections.delete(c.name)
        for base in self._bases.values():
            known = await self.store.ids(base.row.id)
            stranger = NoneOf((OneOf("document", tuple(tagged(i) for i in known)),))
            await self.collections.remove(base.collection, None, stranger)
        await asyncio.to_thread(self._sweep, await self._known_files())

    async def close(self) -> None:
        """Finish writes. Before the collections are closed."""
        await self._writes.close()

    def _has_collection(self, base: Base) -> bool:
        try:
            self.collections.get(base.collection)
        except NotFound:
            return False
        return True

    async def _known_files(self) -> dict[str, set[str]]:
        """Documents' ids by the name of their base's folder."""
        return {str(b.row.id): set(await self.store.ids(b.row.id)) for b in self._bases.values()}

    def _sweep(self, known: Mapping[str, set[str]]) -> None:
        if not self._folder.is_dir():
            return
        for folder in self._folder.iterdir():
            if folder.name not in known:
                shutil.rmtree(folder, True)
                continue
            for path in folder.iterdir():
                if path.is_file() and path.name.split(".")[0] not in known[folder.name]:
                    path.unlink(missing_ok=True)

    def folder(self, base_id: int) -> Path:
        """Where a knowledge base keeps its files."""
        return self._folder / str(base_id)

    def get(self, name: str) -> Base:
        """The knowledge base. Raises NotFound, naming the nearest."""
        base = self._bases.get(name)
        if base is None:
            nearest = difflib.get_close_matches(name, self._bases, n=3)
            raise NotFound("knowledge base", name, nearest=nearest)
        return base

    def by_id(self, base_id: int) -> Base | None:
        """The knowledge base; None when it is gone."""
        return next((b for b in self._bases.values() if b.row.id == base_id), None)

    def all(self) -> list[Base]:
        """All, by name."""
        return [self._bases[n] for n in sorted(self._bases)]

    async def create(self, call: Call, name: str, config: BaseConfig) -> Base:
        """A new knowledge base."""
        if name in self._bases:
            await self.store.create_base(name, "{}")  # raises AlreadyExists
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
            await self.store.delete_base(row.id)
            raise
        self._bases[name] = base
        return base

    async def delete(self, name: str) -> int:
        """Remove a knowledge base with every trace; gives the number of its documents."""
        return await self._writes.finish(self._delete(self.get(name)))

    async def _delete(self, base: Base) -> int:
        if self._bases.get(base.name) is not base:  # another call was quicker
            raise NotFound("knowledge base", base.name)
        del self._bases[base.name]
        try:
            count = await self.store.delete_base(base.row.id)
        except BaseException:
            self._bases[base.name] = base  # nothing was removed
            raise
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
            raise NotFound("knowledge base", base.name) from None
        return (row, False) if earlier is None else (earlier, True)

    async def document(self, base: Base, document: str) -> DocumentRow:
        """The document. Raises NotFound."""
        row = await self.store.get(base.row.id, document)
        if row is None:
            raise NotFound("document", document)
        return row

    async def text(self, base: Base, document: str) -> str:
        """A document's text, as it was read last; empty when it has none yet or is gone."""
        key = (base.row.id, document)
        kept = self._texts.get(key)
        if kept is not None:
            self._texts.move_to_end(key)
            return kept
        try:
            text = await asyncio.to_thread(_read, self.folder(base.row.id) / f"{document}.txt")
        except FileNotFoundError:
            return ""
        if key in self._texts:  # another call has read it meanwhile: it is counted once
            return text
        self._texts[key] = text
        self._characters += len(text)
        while self._characters > KEPT_CHARACTERS:
            self._characters -= len(self._texts.popitem(last=False)[1])
        return text

    def forget_text(self, row: DocumentRow) -> None:
        """The text on disk has changed or goes."""
        gone = self._texts.pop((row.base_id, row.id), None)
        self._characters -= len(gone or "")

    def text_path(self, row: DocumentRow) -> Path:
        """Where a document's text is kept."""
        return self.folder(row.base_id) / f"{row.id}.txt"

    def file_path(self, row: DocumentRow) -> Path:
        """Where a document's file is kept."""
        return self.folder(row.base_id) / f"{row.id}.file"

    async def delete_document(self, base: Base, document: str) -> int:
        """Remove a document with every trace; gives the number of its chunks."""
        row = await self.document(base, document)
        return await self._writes.finish(self._delete_document(base, row))

    async def _delete_document(self, base: Base, row: DocumentRow) -> int:
        # The row first: an ingest that runs looks for it before it writes chunks.
        await self.store.delete(row.id)
        count = await self.collections.remove(base.collection, None, chunks_of(row.id))
        for path in (self.file_path(row), self.text_path(row)):
            path.unlink(missing_ok=True)
        self.forget_text(row)
        return count


def chunks_of(document: str) -> OneOf:
    """The condition that a document's chunks meet."""
    return OneOf("document", (tagged(document),))


def _config(text: str) -> BaseConfig:
    d = orjson.loads(text)
    return BaseConfig(d["embedding_model"], d["language"], ChunkConfig(**d["chunks"]))


def _read(path: Path) -> str:
    # Not read_text: it would turn line ends, and with them the offsets.
    return path.read_bytes().decode()
