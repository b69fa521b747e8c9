"""The folders of sockets: none stays behind, and none that is used is removed."""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from forebay.sockets import PREFIX, SocketFolder

HOLDER = """
import sys
from forebay.sockets import SocketFolder
folder = SocketFolder()
(folder.path / "a.sock").touch()
print(folder.path, flush=True)
sys.stdin.readline()
raise OSError("the start fails")
"""


@pytest.fixture(autouse=True)
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    # A test's own folder may be too deep for sockets.
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield Path(folder)


def holder() -> tuple[subprocess.Popen[str], Path]:
    """A process that has a folder, and the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_a_process_that_fails_removes_its_folder() -> None:
    process, folder = holder()
    assert folder.is_dir()
    process.communicate("\n", timeout=30)
    assert process.returncode == 1
    assert not folder.exists()


def test_what_a_killed_process_left_is_removed_by_the_next_and_nothing_else(
    temporary: Path,
) -> None:
    (temporary / f"{PREFIX}file").touch()
    (temporary / "forebay-other").mkdir()
    running, used = holder()
    killed, left = holder()
    killed.kill()
    killed.communicate(timeout=30)
    assert left.is_dir()
    mine, other = SocketFolder(), SocketFolder()
    assert not left.exists()
    assert (used / "a.sock").exists() and mine.path.is_dir() and other.path.is_dir()
    assert (temporary / "forebay-other").is_dir()
    for one in (mine, other):
        one.remove()
        one.remove()
        assert not one.path.exists()
    running.communicate("\n", timeout=30)


def test_one_that_is_handed_over_stays_used() -> None:
    script = HOLDER.replace("sys.stdin.readline()", "folder.hand_over()").replace(
        'raise OSError("the start fails")',
        "import os; os.execv(sys.executable, [sys.executable, '-c', 'input()'])",
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    folder = Path(process.stdout.readline().strip())
    while b"input()" not in Path(f"/proc/{process.pid}/cmdline").read_bytes():
        assert process.poll() is None
    SocketFolder().remove()
    assert folder.is_dir()
    process.communicate("\n", timeout=30)
    SocketFolder().remove()
    assert not folder.exists()


def test_in_a_deep_temp_directory_a_socket_still_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (deep := tmp_path / ("d" * 60)).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    folder = SocketFolder()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder.path / "ordinary.sock"))
    folder.remove()
    assert not folder.path.exists() and not list(deep.iterdir())
