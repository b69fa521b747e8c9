"""A file on its way to disk."""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path
from typing import BinaryIO

from forebay.errors import TooLarge

#: Bytes of one uploaded file.
MAX_FILE = 256 << 20


class Upload:
    """See the module."""

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
