"""Writes whose caller goes away in the middle of them, and those that meet others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

import pytest
from forebay.errors import NotFound
from forebay_server.dataplane.collections import Collections, NewPoint
from forebay_server.dataplane.snapshots import Snapshots
from forebay_server.indexes.collection import CollectionConfig, TextFieldConfig
from forebay_server.knowledge.bases import Base, BaseConfig, KnowledgeBases
from forebay_server.storage.collections import CollectionRow, CollectionStore
from forebay_server.storage.database import Database
from forebay_server.storage.knowledge import DocumentRow, KnowledgeStore

NOTHING: Any = None
TEXTS = CollectionConfig(None, (TextFieldConfig("text", "", 1.0),))


class Pause:
    """What was committed is said to be so a while later."""

    def __init__(self) -> None:
        self.committed = asyncio.Event()

    async def __call__(self) -> None:
        self.committed.set()
        await asyncio.sleep(0.05)

    async def cut_off(self, work: Coroutine[Any, Any, Any]) -> None:
        """Begin something, and go away at its commit."""
        task = asyncio.ensure_future(work)
        await asyncio.wait_for(self.committed.wait(), 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


class PausedCollections(CollectionStore):
    """See Pause."""

    def __init__(self, database: Database) -> None:
        super().__init__(database)
        self.pause = Pause()

    async def create(self, name: str, config: str) -> CollectionRow:
        row = await super().create(name, config)
        await self.pause()
        return row


class PausedKnowledge(KnowledgeStore):
    """See Pause."""

    def __init__(self, database: Database) -> None:
        super().__init__(database)
        self.pause = Pause()

    async def add(self, row: DocumentRow) -> DocumentRow | None:
        found = await super().add(row)
        await self.pause()
        return found

    async def delete(self, document: str) -> DocumentRow | None:
        row = await super().delete(document)
        await self.pause()
        return row

    async def delete_base(self, base_id: int) -> int:
        count = await super().delete_base(base_id)
        await self.pause()
        return count


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    made = await Database.open(f"sqlite+aiosqlite:///{tmp_path}/forebay.db")
    yield made
    await made.close()


class Bench:
    """A knowledge base with one document of one chunk."""

    def __init__(self, database: Database, folder: Path) -> None:
        self.store = PausedKnowledge(database)
        self.collections = Collections(
            CollectionStore(database), folder / "collections", NOTHING, NOTHING
        )
        self.bases = KnowledgeBases(self.store, self.collections, folder / "knowledge")

    async def start(self) -> Base:
        base = Base(await self.store.create_base("b", "{}"), BaseConfig())
        await self.collections.create(NOTHING, base.collection, TEXTS)
        self.bases._bases["b"] = base
        return base

    async def add(self, base: Base, text: bytes) -> DocumentRow:
        upload = self.bases.upload(base, "a.txt")
        upload.write(text)
        row, _ = await self.bases.add(base, upload, {}, "")
        self.store.pause.committed.clear()
        point = NewPoint(f"{row.id}.1.0", None, {"text": "x", "document": row.id})
        await self.collections.upsert(NOTHING, base.collection, [point])
        return row

    async def close(self) -> None:
        await self.bases.close()
        await self.collections.close()


@pytest.fixture
async def bench(database: Database, tmp_path: Path) -> AsyncIterator[Bench]:
    made = Bench(database, tmp_path)
    yield made
    await made.close()


async def test_a_collection_whose_caller_leaves_at_the_commit_is_there(
    database: Database, tmp_path: Path
) -> None:
    store = PausedCollections(database)
    collections = Collections(store, tmp_path, NOTHING, NOTHING)
    await store.pause.cut_off(collections.create(NOTHING, "c", TEXTS))
    await collections.close()
    assert collections.get("c").name == "c"


async def test_a_base_whose_caller_leaves_at_its_removal_is_gone_with_every_trace(
    bench: Bench,
) -> None:
    base = await bench.start()
    await bench.add(base, b"some words")
    await bench.store.pause.cut_off(bench.bases.delete("b"))
    await bench.close()
    assert not bench.collections.all()
    assert not bench.bases.folder(base.row.id).exists()


async def test_a_document_whose_caller_leaves_at_its_removal_leaves_no_chunk(bench: Bench) -> None:
    base = await bench.start()
    row = await bench.add(base, b"some words")
    await bench.store.pause.cut_off(bench.bases.delete_document(base, row.id))
    await bench.close()
    assert not len(bench.collections.get(base.collection).index)
    assert not bench.bases.file_path(row).exists()


async def test_a_document_whose_caller_leaves_when_it_is_stored_is_worked_on(bench: Bench) -> None:
    base = await bench.start()
    upload = bench.bases.upload(base, "a.txt")
    upload.write(b"some words")
    queued: list[DocumentRow] = []
    await bench.store.pause.cut_off(bench.bases.add(base, upload, {}, "", queued.append))
    await bench.close()
    assert [r.id for r in queued] == [upload.id]
    assert upload.path.exists()


class LateLook(KnowledgeStore):
    """Whatever it looks for is removed just before."""

    async def _select(self, *conditions: Any, **bounds: Any) -> list[DocumentRow]:
        for row in await super()._select(*conditions, **bounds):
            await self.delete(row.id)
        return await super()._select(*conditions, **bounds)


async def test_a_document_whose_duplicate_is_removed_meanwhile_is_stored(
    database: Database, tmp_path: Path
) -> None:
    store = LateLook(database)
    bases = KnowledgeBases(store, NOTHING, tmp_path)
    base = Base(await store.create_base("b", "{}"), BaseConfig())
    for _ in range(2):
        upload = bases.upload(base, "a.txt")
        upload.write(b"some words")
        row, known = await bases.add(base, upload, {}, "")
        assert not known
        assert await store.ids(base.row.id) == [row.id] == [upload.id]


async def test_an_upload_into_a_base_that_is_removed_is_refused(bench: Bench) -> None:
    base = await bench.start()
    upload = bench.bases.upload(base, "a.txt")
    upload.write(b"some words")
    await bench.bases.delete("b")
    with pytest.raises(NotFound, match="'b'"):
        await bench.bases.add(base, upload, {}, "")
    assert not await bench.store.unfinished()
    assert not upload.path.exists()


async def test_a_collection_that_is_removed_meanwhile_leaves_no_snapshot(bench: Bench) -> None:
    base = await bench.start()
    collection = bench.collections.get(base.collection)
    async with collection.lock:
        removing = asyncio.create_task(bench.collections.delete(base.collection))
        while not collection.lock._waiters:
            await asyncio.sleep(0)
        making = asyncio.create_task(Snapshots(bench.collections).make(base.collection))
        while len(collection.lock._waiters) < 2:
            await asyncio.sleep(0)
    assert await removing == 0
    with pytest.raises(NotFound):
        await making
    assert not await bench.collections.store.snapshots(collection.row.id)


async def test_of_two_that_remove_a_base_one_is_told_that_there_is_none(bench: Bench) -> None:
    await bench.start()
    first, second = await asyncio.gather(
        bench.bases.delete("b"), bench.bases.delete("b"), return_exceptions=True
    )
    assert first == 0
    assert isinstance(second, NotFound)
    assert "knowledge base" in second.message
