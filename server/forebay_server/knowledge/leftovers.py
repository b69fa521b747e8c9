"""What crashes leave of knowledge bases, taken away at the start.

Another server that shares the database may be making what is found here. So it is looked up in the
database after it was found: a base's row is there before its collection and its folder, a
document's before its chunks, and what was removed does not come back. Only a file comes before its
row: where servers share the database, it goes when nobody has written to it for LEFT_OVER_S.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from forebay.errors import NotFound

from forebay_server.dataplane.collections import HIDDEN, Collections
from forebay_server.indexes.filters import NoneOf, OneOf, tagged
from forebay_server.storage.knowledge import KnowledgeStore

#: Seconds after which what another server could be making is certainly left over.
LEFT_OVER_S = 24 * 3600.0


def collection_of(base_id: int) -> str:
    """Name of the collection with a knowledge base's chunks."""
    return f"{HIDDEN}knowledge-{base_id}"


async def remove_leftovers(store: KnowledgeStore, collections: Collections, folder: Path) -> None:
    """See the module."""
    await _collections(store, collections)
    for row in await store.bases():
        with contextlib.suppress(NotFound):  # removed meanwhile, or being made
            await _chunks(store, collections, row.id)
    await _files(store, folder)


async def _collections(store: KnowledgeStore, collections: Collections) -> None:
    """Those of no knowledge base."""
    prefix = collection_of(0)[:-1]
    found = [c.name for c in collections.all() if c.name.startswith(prefix)]
    known = {collection_of(row.id) for row in await store.bases()}
    for name in found:
        if name not in known:
            with contextlib.suppress(NotFound):  # another server was quicker
                await collections.delete(name)


async def _chunks(store: KnowledgeStore, collections: Collections, base_id: int) -> None:
    """Those of no document."""
    name = collection_of(base_id)
    index = collections.get(name).index
    known = await store.ids(base_id)
    strangers = NoneOf((OneOf("document", tuple(tagged(i) for i in known)),))
    labels = await asyncio.to_thread(index.matching_labels, strangers)
    found = {index.ids[slot].split(".")[0] for slot in index.slots_of(labels)}
    gone = found.difference(await store.ids(base_id)) if found else ()
    if gone:
        these = OneOf("document", tuple(tagged(i) for i in sorted(gone)))
        await collections.remove(name, None, these)


async def _files(store: KnowledgeStore, folder: Path) -> None:
    """Those of no document."""
    found = await asyncio.to_thread(_listed, folder)
    known = {str(row.id): set(await store.ids(row.id)) for row in await store.bases()}
    age = 0.0 if store.owner is None else LEFT_OVER_S
    await asyncio.to_thread(_sweep, found, known, age)


def _listed(folder: Path) -> dict[Path, list[Path]]:
    if not folder.is_dir():
        return {}
    return {f: list(f.iterdir()) for f in folder.iterdir() if f.is_dir()}


def _sweep(found: Mapping[Path, Iterable[Path]], known: Mapping[str, set[str]], age: float) -> None:
    for folder, paths in found.items():
        if folder.name not in known:
            shutil.rmtree(folder, True)
            continue
        for path in paths:
            if path.name.split(".")[0] in known[folder.name]:
                continue
            with contextlib.suppress(FileNotFoundError):  # another server was quicker
                if path.is_file() and path.stat().st_mtime <= time.time() - age:
                    path.unlink()
