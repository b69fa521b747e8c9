"""Callers' files: bytes in a folder, facts in the database.

A file is written under another name, synced, put in place, and then gets its row; a row is removed
before its bytes. So a row always has its bytes, and bytes without a row (an upload that was cut off)
are removed at the next start. A file is seen by its key alone.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import BinaryIO

from forebay.errors import Internal, NotFound, TooLarge

from forebay_server.storage.files import FileRow, FileStore

log = logging.getLogger("forebay.files")

#: Bytes of one piece of a download.
PIECE = 256 << 10
SWEEP_EVERY_S = 60.0
#: Seconds after which an upload's remains are taken for abandoned: another server may be writing.
STALE_S = 24 * 3600.0


class Upload:
    """A file on its way to disk."""

    def __init__(self, folder: Path, room: int) -> None:
        self.id = f"file-{secrets.token_hex(16)}"
        self.path = folder / f"{self.id}.part"
        self.size = 0
        self._folder = folder
        self._room = room
        self._digest = hashlib.sha256()
        self._file: BinaryIO = self.path.open("xb")

    def write(self, data: bytes) -> None:
        """One more piece. Raises TooLarge."""
        self.size += len(data)
        if self.size > self._room:
            raise TooLarge("file", size=self.size, limit=self._room, unit="bytes")
        self._digest.update(data)
        self._file.write(data)

    def commit(self) -> str:
        """On disk under its name; gives the SHA-256."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self.path.rename(self._folder / self.id)
        folder = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        return self._digest.hexdigest()

    def abort(self) -> None:
        """Leave nothing. Idempotent."""
        self._file.close()
        self.path.unlink(missing_ok=True)
        (self._folder / self.id).unlink(missing_ok=True)


class FileLibrary:
    """See the module. Lives on one event loop.

    Args:
        max_file_bytes: bound of one file.
        max_bytes_per_key: bound of all files of a key.
        keep_s: how long files are kept whose uploader says nothing; 0 = for ever.
    """

    def __init__(
        self,
        store: FileStore,
        folder: Path,
        max_file_bytes: int,
        max_bytes_per_key: int,
        keep_s: float = 0.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.store = store
        self._folder = folder
        self._max_file = max_file_bytes
        self._max_key = max_bytes_per_key
        self._keep_s = keep_s
        self._clock = clock

    async def start(self) -> None:
        """Make the folder, and remove what uploads left that were cut off."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        known = await self.store.ids()
        stale = self._clock() - STALE_S
        for path in self._folder.iterdir():
            if path.name not in known and path.stat().st_mtime < stale:
                path.unlink(missing_ok=True)

    async def keep(self) -> None:
        """Remove files whose time is over, for ever."""
        while True:
            try:
                await self.sweep()
            except Exception:
                log.exception("removing expired files failed; it is tried again")
            await asyncio.sleep(SWEEP_EVERY_S)

    async def sweep(self) -> None:
        """Remove files whose time is over."""
        for row in await self.store.expired(self._clock()):
            await self.delete(row.key_id, row.id)

    async def upload(self, key_id: str) -> Upload:
        """A new file. Raises TooLarge when the key has no room left."""
        used = await self.store.size(key_id)
        if used >= self._max_key:
            raise TooLarge("files", size=used, limit=self._max_key, unit="bytes")
        return Upload(self._folder, self._max_file)

    async def add(
        self, key_id: str, upload: Upload, name: str, purpose: str, keep_s: float | None
    ) -> FileRow:
        """Keep an upload. Raises TooLarge; the caller aborts it then."""
        digest = await asyncio.to_thread(upload.commit)
        now = self._clock()
        keep = self._keep_s if keep_s is None else keep_s
        expires = now + keep if keep else None
        row = FileRow(upload.id, key_id, name, purpose, upload.size, digest, now, expires)
        await self.store.add(row, self._max_key)
        return row

    async def get(self, key_id: str, file: str) -> FileRow:
        """The key's file. Raises NotFound."""
        row = await self.store.get(key_id, file, self._clock())
        if row is None:
            raise NotFound("file", file)
        return row

    async def page(
        self,
        key_id: str,
        purpose: str,
        oldest_first: bool,
        behind: tuple[float, str] | None,
        limit: int,
    ) -> list[FileRow]:
        """The key's files by their time, behind a time and id, or from the first."""
        return await self.store.page(key_id, purpose, self._clock(), oldest_first, behind, limit)

    async def delete(self, key_id: str, file: str) -> None:
        """Remove a file. Raises NotFound."""
        if not await self.store.delete(key_id, file):
            raise NotFound("file", file)
        await asyncio.to_thread((self._folder / file).unlink, True)

    async def read(self, row: FileRow) -> AsyncGenerator[bytes, None]:
        """A file's bytes, in pieces. A file that is deleted meanwhile is read to its end."""
        try:
            source = await asyncio.to_thread((self._folder / row.id).open, "rb")
        except FileNotFoundError:
            if await self.store.get(row.key_id, row.id, self._clock()) is None:
                raise NotFound("file", row.id) from None
            raise Internal(f"the bytes of {row.id} are missing", reason="FILE_LOST") from None
        try:
            while data := await asyncio.to_thread(source.read, PIECE):
                yield data
        finally:
            source.close()
