"""Documents that servers of one database claim."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from forebay_server.dataplane.collections import Collections, NewPoint
from forebay_server.indexes.collection import CollectionConfig, TextFieldConfig
from forebay_server.knowledge.bases import Base, BaseConfig, KnowledgeBases, chunk_id
from forebay_server.knowledge.claims import Claims
from forebay_server.knowledge.ingest import Ingest
from forebay_server.storage import knowledge
from forebay_server.storage.collections import CollectionStore
from forebay_server.storage.database import Database
from forebay_server.storage.knowledge import DocumentRow, KnowledgeStore

NOTHING: Any = None
FIRST = (0.0, "")


def store_of(database: Database, owner: str) -> KnowledgeStore:
    """A server's store, as on a database that several share."""
    made = KnowledgeStore(database)
    made.owner = owner
    return made


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    made = await Database.open(f"sqlite+aiosqlite:///{tmp_path}/forebay.db")
    yield made
    await made.close()


async def add(store: KnowledgeStore, base_id: int, name: str = "a") -> DocumentRow:
    now = time.time()
    row = DocumentRow(
        name, base_id, name, "", 1, name, {}, "", "queued", 0.0, "", "", [], 0, 0, 0, now, now
    )
    await store.add(row)
    return row


async def test_a_document_is_one_servers_until_its_claim_runs_out(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = store_of(database, "one"), store_of(database, "two")
    base = await one.create_base("b", "{}")
    row = await add(one, base.id)
    assert not await two.free(FIRST, 10)
    assert await two.claim(row.id) is None
    assert not await two.update(row.id, status="parsing")
    assert await one.update(row.id, status="parsing")
    monkeypatch.setattr(knowledge, "OWNED_S", -1.0)
    await one.renew([row.id])  # until a moment that is over
    monkeypatch.undo()
    assert [r.id for r in await two.free(FIRST, 10)] == [row.id]
    taken = await two.claim(row.id)
    assert taken is not None and taken.status == "parsing"
    assert await one.claim(row.id) is None
    await one.renew([row.id])
    await one.release()
    assert not await one.update(row.id, progress=0.5)
    assert await two.update(row.id, status="ready")
    assert not await one.free(FIRST, 10)


async def test_a_document_that_is_done_is_queued_again_once(database: Database) -> None:
    one, two = store_of(database, "one"), store_of(database, "two")
    base = await one.create_base("b", "{}")
    row = await add(one, base.id)
    assert not await two.queue_again(row.id)
    await one.update(row.id, status="ready")
    assert await two.queue_again(row.id)
    assert not await one.queue_again(row.id)
    assert not await one.free(FIRST, 10)
    await two.update(row.id, status="ready")
    assert await two.queue_again(row.id, mine=False)
    assert len(await one.free(FIRST, 10)) == 1


async def test_documents_that_a_server_cannot_reach_do_not_hide_others(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forebay_server.knowledge.claims.LOOK", 2)
    one, two = store_of(database, "one"), store_of(database, "two")
    base = await one.create_base("b", "{}")
    for i in range(5):
        await add(one, base.id, str(i))
    await one.release()
    taken: list[str] = []

    async def able(row: DocumentRow) -> bool:
        return row.id == "4"

    claims = Claims(two, able, lambda row: taken.append(row.id))
    for _ in range(3):
        await claims._look()
    assert taken == ["4"]


class Bench:
    """A knowledge base with one document, on which this server works for the second time."""

    def __init__(self, database: Database, folder: Path) -> None:
        self.store = store_of(database, "one")
        self.points = CollectionStore(database)
        self.collections = Collections(self.points, folder / "collections", NOTHING, NOTHING)
        self.bases = KnowledgeBases(self.store, self.collections, folder / "knowledge")
        self.ingest = Ingest(self.bases, NOTHING, NOTHING)

    async def start(self) -> tuple[Base, DocumentRow]:
        base = Base(await self.store.create_base("b", "{}"), BaseConfig())
        texts = CollectionConfig(None, (TextFieldConfig("text", "", 1.0),))
        await self.collections.create(NOTHING, base.collection, texts)
        await add(self.store, base.row.id)
        await self.store.update("a", generation=1, chunks=1)
        row = await self.store.get(base.row.id, "a")
        assert row is not None
        return base, row

    async def ids(self, base: Base) -> list[str]:
        collection = self.collections.get(base.collection).row.id
        return [p.point_id async for page in self.points.points_from(collection, 0) for p in page]

    async def close(self) -> None:
        await self.ingest.close()
        await self.bases.close()
        await self.collections.close()


@pytest.fixture
async def bench(database: Database, tmp_path: Path) -> AsyncIterator[Bench]:
    made = Bench(database, tmp_path)
    yield made
    await made.close()


def point(generation: int) -> NewPoint:
    return NewPoint(chunk_id("a", generation, 0), None, {"text": "x", "document": "a"})


async def test_chunks_that_another_server_wrote_just_now_are_replaced(bench: Bench) -> None:
    base, row = await bench.start()
    collection = bench.collections.get(base.collection).row.id
    # Past this server's index, which has not heard of it yet.
    await bench.points.upsert(collection, [(chunk_id("a", 1, 0), b"{}", None)])
    assert await bench.ingest._store(base, row, [point(2)])
    assert await bench.ids(base) == [chunk_id("a", 2, 0)]


async def test_chunks_that_come_after_another_server_has_begun_anew_are_removed(
    bench: Bench, database: Database
) -> None:
    base, row = await bench.start()
    await bench.store.release()
    two = store_of(database, "two")
    await two.claim("a")
    assert not await bench.ingest._store(base, row, [point(2)])
    assert await bench.ids(base) == [
        chunk_id("a", 2, 0)
    ]  # as the other server's: it writes them too
    await two.update("a", generation=3, chunks=1)
    assert not await bench.ingest._store(base, row, [point(2)])
    assert await bench.ids(base) == []


async def test_chunks_of_a_document_that_was_removed_elsewhere_are_removed(bench: Bench) -> None:
    base, row = await bench.start()
    await bench.store.delete("a")
    assert not await bench.ingest._store(base, row, [point(2)])
    assert await bench.ids(base) == []
