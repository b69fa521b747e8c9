"""Documents' texts in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from forebay_server.knowledge import texts
from forebay_server.knowledge.bases import Base, BaseConfig, KnowledgeBases
from forebay_server.knowledge.ingest import Ingest
from forebay_server.storage.database import Database
from forebay_server.storage.knowledge import KnowledgeStore

NOTHING: Any = None  # a text is read from its file alone


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[KnowledgeStore]:
    database = await Database.open(f"sqlite+aiosqlite:///{tmp_path}/forebay.db")
    yield KnowledgeStore(database)
    await database.close()


async def test_texts_that_many_calls_read_at_once_are_counted_once(
    store: KnowledgeStore, tmp_path: Path
) -> None:
    kept = texts.DocumentTexts(store, tmp_path)
    (tmp_path / "1").mkdir()
    half = "x" * (texts.KEPT_CHARACTERS // 2)
    kept.path(1, "a").write_text(half)
    kept.path(1, "b").write_text("b")
    for _ in range(2):
        assert set(await asyncio.gather(*(kept.read(1, "a") for _ in range(8)))) == {half}
    assert await kept.read(1, "b") == "b"
    assert kept.characters == len(half) + 1


async def test_a_document_that_is_removed_while_it_is_read_leaves_no_text(
    store: KnowledgeStore, tmp_path: Path
) -> None:
    known = KnowledgeBases(store, NOTHING, tmp_path)
    base = Base(await store.create_base("b", "{}"), BaseConfig())
    known._bases["b"] = base
    upload = known.upload(base, "a.txt")
    upload.write(b"The word is xylophone.")
    row, _ = await known.add(base, upload, {}, "")
    ingest = Ingest(known, NOTHING, NOTHING)
    working = asyncio.create_task(ingest._document(row))
    while (await known.document(base, row.id)).status == "queued":
        await asyncio.sleep(0)
    await store.delete(row.id)  # its reader is being started
    await working
    assert [p.name for p in known.folder(base.row.id).iterdir()] == []
    await ingest.close()
