"""Folders for Unix sockets between Forebay's processes."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import weakref
from pathlib import Path

PREFIX = "forebay-sockets-"
#: Bytes of a temp directory's path that leave room for the folder, 8 letters of its own, and a socket's name.
MOST = 107 - len(f"/{PREFIX}") - 8 - len("/ordinary.sock")


class SocketFolder:
    """A folder in the temp directory, as a socket's path has 107 bytes at most and a home may be deep; in
    /tmp where the temp directory is deep, too.

    It is removed when this process ends, however a start fails. One that is killed cannot do that: its
    owner holds a lock on a folder, and whoever makes the next removes those that nobody holds.
    """

    def __init__(self) -> None:
        temporary = tempfile.gettempdir()
        if len(os.fsencode(temporary)) > MOST:
            temporary = "/tmp"  # noqa: S108 (mkdtemp: its folder is this user's alone)
        for left in Path(temporary).glob(f"{PREFIX}*"):
            lock = _locked(left)
            if lock is not None:
                _remove(left, lock)
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=temporary))
            lock = _locked(self.path)
            if lock is not None and self.path.exists():
                break  # else another process that starts now has taken it for one that was left
        self._lock = lock
        self._end = weakref.finalize(self, _remove, self.path, lock)

    def hand_over(self) -> None:
        """Leave it to the program that this process becomes by exec."""
        os.set_inheritable(self._lock, True)

    def remove(self) -> None:
        """Remove it now. Idempotent."""
        self._end()


def _locked(folder: Path) -> int | None:
    """A lock on a folder of this user's, held until it is closed; None: another process has it, or there is no
    such folder."""
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        if os.fstat(lock).st_uid == os.geteuid():
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
    except OSError:
        pass
    os.close(lock)
    return None


def _remove(folder: Path, lock: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)
