"""Documents' texts in memory."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from forebay_server.knowledge import bases
from forebay_server.knowledge.bases import Base, BaseConfig, KnowledgeBases
from forebay_server.storage.knowledge import BaseRow

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
