"""Documents' texts in memory."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from forebay_server.knowledge import bases
from forebay_server.knowledge.bases import Base, BaseConfig, KnowledgeBases
from forebay_server.knowledge.ingest import Ingest
from forebay_server.storage.database import Database
from forebay_server.storage.knowledge import BaseRow, KnowledgeStore

NOTHING: Any = None  # a text is read from its file alone


async def test_texts_that_many_calls_read_at_once_are_counted_once(tmp_path: Path) -> None:
    known = KnowledgeBases(NOTHING, NOTHING, tmp_path)
    base = Base(BaseRow(1, "b", "{}", 0.0), BaseConfig())
    known.folder(1).mkdir()
    half = "x" * (bases.KEPT_CHARACTERS // 2)
    (known.folder(1) / "a.txt").write_text(half)
    (known.folder(1) / "b.txt").write_text("b")
    for _ in range(2):
        assert set(await asyncio.gather(*(known.text(base, "a") for _ in range(8)))) == {half}
    assert await known.text(base, "b") == "b"
    assert known._characters == len(half) + 1


async def test_a_document_that_is_removed_while_it_is_read_leaves_no_text(tmp_path: Path) -> None:
    database = await Database.open(f"sqlite+aiosqlite:///{tmp_path}/forebay.db")
    store = KnowledgeStore(database)
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
    assert [p.name for p in known.folder(base.row.id).iterdir()] == [f"{row.id}.file"]
    await ingest.close()
    await database.close()
