"""Documents' texts: on disk, and those that were read last in memory."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from pathlib import Path

from forebay.errors import Unavailable

from forebay_server.storage.knowledge import KnowledgeStore

#: Characters of documents' texts that are kept in memory, for citations of the next answers.
KEPT_CHARACTERS = 8_000_000


class DocumentTexts:
    """See the module. Lives on one event loop. A document is said by its base's id and its own."""

    def __init__(self, store: KnowledgeStore, folder: Path) -> None:
        self._store = store
        self._folder = folder
        # With when its file was written, where another server may write it anew.
        self._kept: OrderedDict[tuple[int, str], tuple[int, str]] = OrderedDict()
        self.characters = 0

    def path(self, base_id: int, document: str) -> Path:
        """Where a document's text is kept."""
        return self._folder / str(base_id) / f"{document}.txt"

    async def read(self, base_id: int, document: str) -> str:
        """A document's text, as it was read last; empty when it has none yet or is gone.

        Raises:
            Unavailable: another server has it, on a disk of its own.
        """
        key, path = (base_id, document), self.path(base_id, document)
        shared = self._store.owner is not None
        try:
            kept = self._kept.get(key)
            if kept is not None and (
                not shared or kept[0] == await asyncio.to_thread(_written_at, path)
            ):
                if key in self._kept:  # it may be forgotten meanwhile
                    self._kept.move_to_end(key)
                return kept[1]
            written_at, text = await asyncio.to_thread(_read, path)
        except FileNotFoundError:
            row = await self._store.get(base_id, document) if shared else None
            if row is None or not row.characters:
                return ""
            raise Unavailable(
                f"the text of document {document!r} is not on this server's disk; servers that "
                "share a database need a shared FOREBAY_HOME/knowledge",
                reason="TEXT_AWAY",
            ) from None
        self.forget(base_id, document)  # another call may have read it: it is counted once
        self._kept[key] = (written_at, text)
        self.characters += len(text)
        while self.characters > KEPT_CHARACTERS:
            self.characters -= len(self._kept.popitem(last=False)[1][1])
        return text

    def forget(self, base_id: int, document: str) -> None:
        """The text on disk has changed or goes."""
        gone = self._kept.pop((base_id, document), None)
        if gone is not None:
            self.characters -= len(gone[1])


def _read(path: Path) -> tuple[int, str]:
    written_at = _written_at(path)
    # Not read_text: it would turn line ends, and with them the offsets.
    return written_at, path.read_bytes().decode()


def _written_at(path: Path) -> int:
    return path.stat().st_mtime_ns
