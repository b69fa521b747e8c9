"""Versions on their way to disk."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from forebay_server.repository.uploads import VersionUpload, remove_unfinished


def test_an_upload_that_is_under_way_is_not_removed(tmp_path: Path) -> None:
    upload = VersionUpload(tmp_path, "new", 1, 1000)
    upload.write("a.json", b"{}")
    remove_unfinished(tmp_path)
    assert [p.name for p in (tmp_path / "new").glob("*/*")] == ["a.json"]
    upload.abort()
    assert not (tmp_path / "new").exists()


def test_a_version_that_was_taken_in_is_on_disk_with_its_name(
    starters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = VersionUpload(tmp_path, "new", 1, 1 << 30)
    source = starters / "iris" / "1"
    for path in source.iterdir():
        upload.write(path.name, path.read_bytes())
    synced: list[tuple[int, bool]] = []
    really = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append((os.fstat(descriptor).st_ino, (tmp_path / "new" / "1").exists()))
        really(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    upload.commit()
    # The names within before the version appears, those that lead to it after.
    assert ((tmp_path / "new" / "1").stat().st_ino, False) in synced
    assert synced[-2:] == [((tmp_path / "new").stat().st_ino, True), (tmp_path.stat().st_ino, True)]
    remove_unfinished(tmp_path)
    shutil.rmtree(tmp_path / "new" / "1")
