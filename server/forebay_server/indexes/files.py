"""A collection's index on disk: a folder of files with a checksum each, written whole or not at all.

The files are a copy that makes starting quick; the truth is in the database. A file that is missing,
changed or of another form is noticed and the index is built anew.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from forebay_server.indexes.arrays import GrowingArray
from forebay_server.indexes.collection import CollectionConfig, CollectionIndex
from forebay_server.indexes.dense import DenseView
from forebay_server.indexes.keyword import KeywordIndex

log = logging.getLogger("forebay.indexes")

FORMAT = 4
MANIFEST, DENSE = "manifest.json", "dense.built"


class DamagedIndex(Exception):
    """The files cannot be used; says why."""


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _digest_of(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).hexdigest().encode()


def _config_digest(config: CollectionConfig) -> str:
    return hashlib.blake2b(repr(config).encode(), digest_size=16).hexdigest()


def save(index: CollectionIndex, folder: Path) -> None:
    """Write the index beside the old one, then put it in its place. Writers wait a moment, while
    what is there is looked at; searches do not."""
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    with index._lock:  # what is taken here is never changed later, or a copy
        view = index.view()
        labels, ids = index.labels.view(), index.ids.copy()
        arrays, codes = index.payloads.state()
        keywords = [k.freeze() for k in index.keyword.values()]
        tail = view.dense.tail.view() if view.dense is not None else None
        changes = index.changes
    files: dict[str, dict[str, Any]] = {}
    _save_arrays(fresh / "points.npz", {"labels": labels, "alive": view.alive})
    (fresh / "ids.json").write_bytes(orjson.dumps(ids))
    _save_arrays(fresh / "payloads.npz", arrays)
    (fresh / "payloads.json").write_bytes(orjson.dumps(codes))
    for i, frozen in enumerate(keywords):
        arrays, vocabulary = KeywordIndex.state_of(frozen, view.alive)
        _save_arrays(fresh / f"keyword{i}.npz", arrays)
        (fresh / f"keyword{i}.json").write_bytes(orjson.dumps(vocabulary))
    if view.dense is not None:
        _save_arrays(fresh / "tail.npz", {"tail": tail})
        if view.dense.built is not None:
            _save_built(index, view.dense, folder, fresh, files)
    for path in fresh.iterdir():
        if path.name not in files:
            files[path.name] = {"bytes": path.stat().st_size, "blake2b": _digest(path)}
            _sync(path)
    manifest = {"format": FORMAT, "config": _config_digest(index.config), "files": files}
    body = orjson.dumps(manifest)
    (fresh / MANIFEST).write_bytes(_digest_of(body) + b"\n" + body)
    _sync(fresh / MANIFEST)
    _sync(fresh)
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
    with index._lock:
        index.changes -= changes
    if view.dense is not None and DENSE in files:
        index.saved = (view.dense.built, files[DENSE])


def _save_built(
    index: CollectionIndex,
    view: DenseView,
    folder: Path,
    fresh: Path,
    files: dict[str, dict[str, Any]],
) -> None:
    """The built part is most of the bytes, and changes seldom: the old file is taken over."""
    if index.saved is not None and index.saved[0] is view.built:
        try:
            os.link(folder / DENSE, fresh / DENSE)
        except OSError:  # gone, or a file system without links
            pass
        else:
            files[DENSE] = index.saved[1]
            return
    assert index.dense is not None
    index.dense.save(view, str(fresh / DENSE))


def load(
    config: CollectionConfig, folder: Path, make: Callable[[], CollectionIndex] | None = None
) -> CollectionIndex:
    """The index that was saved. Raises DamagedIndex, also when there is none.

    Args:
        make: an empty one to load into.
    """
    old = folder.with_name(folder.name + ".old")
    if not folder.exists() and old.exists():  # a crash between the two renames of `save`
        old.rename(folder)
    try:
        digest, _, body = (folder / MANIFEST).read_bytes().partition(b"\n")
        if digest != _digest_of(body):
            raise DamagedIndex(f"{MANIFEST} has another checksum than when it was written")
        manifest = orjson.loads(body)
        if manifest["format"] != FORMAT or manifest["config"] != _config_digest(config):
            raise DamagedIndex("it was written for another configuration")
        for name, facts in manifest["files"].items():
            if _digest(folder / name) != facts["blake2b"]:
                raise DamagedIndex(f"{name} has another checksum than when it was written")
        index = make() if make is not None else CollectionIndex(config)
        return _load(index, folder, manifest["files"])
    except DamagedIndex:
        raise
    except FileNotFoundError as e:
        raise DamagedIndex(f"{Path(e.filename or '?').name} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, EOFError) as e:
        raise DamagedIndex(f"{type(e).__name__}: {e}"[:300]) from None


def _load(index: CollectionIndex, folder: Path, files: dict[str, Any]) -> CollectionIndex:
    points = _arrays(folder / "points.npz")
    index.labels = GrowingArray(np.int64, first=points["labels"])
    index.ids = orjson.loads((folder / "ids.json").read_bytes())
    codes = orjson.loads((folder / "payloads.json").read_bytes())
    index.payloads.restore(_arrays(folder / "payloads.npz"), codes)
    for i, keyword in enumerate(index.keyword.values()):
        vocabulary = orjson.loads((folder / f"keyword{i}.json").read_bytes())
        keyword.restore(_arrays(folder / f"keyword{i}.npz"), vocabulary)
    if index.dense is not None:
        built = str(folder / DENSE) if DENSE in files else None
        tail = _arrays(folder / "tail.npz")["tail"]
        start = len(index.ids) - len(tail)
        index.dense.restore(built, start, points["alive"].astype(bool), tail)
        if len(index.dense) != len(index.ids):
            raise DamagedIndex("vectors and ids differ in number")
        if built is not None:
            index.saved = (index.dense.view().built, files[DENSE])
    index._view = index._make_view(points["alive"].astype(bool))
    return index


def remove(folder: Path) -> None:
    """Remove a saved index, if there is one."""
    for suffix in ("", ".new", ".old"):
        shutil.rmtree(folder.with_name(folder.name + suffix), ignore_errors=True)


def _save_arrays(path: Path, arrays: dict[str, Any]) -> None:
    with path.open("wb") as file:
        np.savez(file, **arrays)


def _arrays(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
