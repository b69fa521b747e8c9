"""Versions that arrive file by file."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from forebay.errors import AlreadyExists, InvalidArgument

from forebay_server.repository.inspect import describe
from forebay_server.repository.manifest import check_files

log = logging.getLogger("forebay.repository")

#: First letters of the folders of versions that are not whole yet.
UNFINISHED = ".upload-"


def remove_unfinished(root: Path) -> None:
    """Remove what uploads have left whose server was killed. One that is under way, in this process
    or another on this machine, holds a lock on its folder."""
    for folder in root.glob(f"*/{UNFINISHED}*"):
        lock = _locked(folder)
        if lock is None:
            continue
        try:
            shutil.rmtree(folder, ignore_errors=True)
            if not any(folder.parent.iterdir()):  # the upload had made it
                folder.parent.rmdir()
        except OSError as e:
            log.warning("an unfinished upload stays in %s: %s", folder, e.strerror)
        finally:
            os.close(lock)


def _locked(folder: Path) -> int | None:
    """A descriptor that holds the folder; None where another one does, or where none can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class VersionUpload:
    """A version that arrives file by file, in a hidden folder that is renamed when it is whole."""

    def __init__(self, root: Path, model: str, version: int, max_bytes: int) -> None:
        self.model = model
        self.version = version
        self.bytes_written = 0
        self._max = max_bytes
        self._final = root / model / str(version)
        self._folder = root / model / f"{UNFINISHED}{version}-{os.getpid()}-{id(self)}"
        self._open: dict[str, Any] = {}
        if self._final.exists():
            raise AlreadyExists(f"version {model}@{version} is there already")
        self._folder.mkdir(parents=True)
        self._lock = _locked(self._folder)

    def write(self, path: str, data: bytes) -> None:
        """Append a piece to a file of the version."""
        file = self._open.get(path)
        if file is None:
            if "\0" in path:
                raise InvalidArgument.at("chunk.path", f"{path!r} is no file's name")
            target = (self._folder / path).resolve()
            if self._folder.resolve() not in target.parents or path.startswith((".", "/")):
                raise InvalidArgument.at(
                    "chunk.path", f"{path!r} lies outside of the version's folder"
                )
            if target.suffix in (".pkl", ".joblib", ".pt", ".bin", ".so"):
                raise InvalidArgument.at(
                    "chunk.path", f"{path!r}: the server reads ONNX, JSON and tokenizer files only"
                )
            if len(self._open) >= 256:
                raise InvalidArgument.at("chunk.path", "a version has at most 256 files")
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                file = self._open[path] = target.open("xb")
            except (FileExistsError, NotADirectoryError):
                raise InvalidArgument.at(
                    "chunk.path", f"{path!r} is, or lies in, what another path of this version is"
                ) from None
        file.write(data)
        self.bytes_written += len(data)
        if self.bytes_written > self._max:
            raise InvalidArgument.at(
                "chunk.data", f"the version has more than {self._max} bytes", reason="TOO_LARGE"
            )

    def commit(self) -> None:
        """Check it and make it appear. Raises FailedPrecondition naming what is wrong."""
        for file in self._open.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        manifest = describe(self._folder)
        check_files(self._folder, manifest)
        if self._final.exists():
            raise AlreadyExists(f"version {self.model}@{self.version} is there already")
        for folder, _, _ in os.walk(self._folder):
            _sync(Path(folder))
        self._folder.rename(self._final)
        # The version's name, and the model's where it is a new one: what was answered is there after
        # a power cut.
        _sync(self._final.parent)
        _sync(self._final.parent.parent)
        self._unlock()

    def abort(self) -> None:
        """Leave nothing behind."""
        for file in self._open.values():
            file.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._unlock()
        parent = self._folder.parent
        if parent.is_dir() and not any(parent.iterdir()):
            parent.rmdir()

    def _unlock(self) -> None:
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)
