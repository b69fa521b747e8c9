"""Nearest vectors by Qdrant: what is built lies in a collection of a Qdrant server, by label.

All else is as with FAISS: the truth is in the database, new vectors wait in a tail that is compared
here, and `absorb` uploads the tail. So a write never waits for Qdrant, a Qdrant that is away makes
searches fail but loses nothing, and one that was emptied is noticed and filled again.

Few matching points are named to Qdrant by their ids. Where many match, more are asked for, until
enough of those that match have come or there are no more: none is lost.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from forebay.errors import FailedPrecondition, Unavailable
from numpy.typing import NDArray

from forebay_server.indexes.arrays import GrowingArray
from forebay_server.indexes.dense import (
    DenseConfig,
    DenseIndex,
    DenseQuery,
    DenseView,
    Floats,
    Mask,
)

log = logging.getLogger("forebay.indexes")

#: Points of one upload.
UPLOAD = 1000
#: Matching points that are named by id.
NAMED = 5000
#: The setting's word for the client's own local mode, without a server.
LOCAL = "local"


class QdrantStore:
    """The connection. Thread-safe.

    Args:
        url: of the server, or `local`: qdrant-client's local mode in `folder`, which compares all
            vectors in numpy; for trying things out. Without a folder it keeps all in memory.
        prefix: first part of the names of its collections; two Forebays need two.
    """

    def __init__(
        self,
        url: str,
        folder: Path | None = None,
        api_key: str = "",
        prefix: str = "forebay",
        timeout_s: int = 10,
    ) -> None:
        try:
            import qdrant_client
            from qdrant_client import models
        except ImportError:
            raise FailedPrecondition(
                "retrieval.qdrant is set, and the package qdrant-client is not installed "
                "(pip install 'forebay[qdrant]')",
                reason="NOT_INSTALLED",
            ) from None
        self.models: Any = models
        self.prefix = prefix
        self.url = url
        self._lock = threading.Lock() if url == LOCAL else None
        self._client: Any = None
        if url == LOCAL and folder is None:
            self._client = qdrant_client.QdrantClient(":memory:")
        elif url == LOCAL:
            self._client = qdrant_client.QdrantClient(
                path=str(folder), force_disable_check_same_thread=True
            )
        else:
            self._client = qdrant_client.QdrantClient(
                url=url, api_key=api_key or None, timeout=timeout_s, check_compatibility=False
            )

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call the client. Raises Unavailable when Qdrant cannot be reached or refuses."""
        try:
            if self._lock is None:
                return getattr(self._client, method)(*args, **kwargs)
            with self._lock:
                return getattr(self._client, method)(*args, **kwargs)
        except Exception as e:
            raise Unavailable(
                f"Qdrant did not do {method}: {type(e).__name__}",
                reason="QDRANT_AWAY",
                retry_after_s=1.0,
            ) from e

    def names(self) -> list[str]:
        """Names of its collections with our prefix."""
        found = self.call("get_collections").collections
        return [c.name for c in found if c.name.startswith(f"{self.prefix}-")]

    def keep_only(self, known: Set[str]) -> None:
        """Remove the collections of all but these names of ours."""
        for name in self.names():
            if name.removeprefix(f"{self.prefix}-").rpartition("-")[0] not in known:
                self.call("delete_collection", name)

    def close(self) -> None:
        """Close the connection."""
        self._client.close()


@dataclass(frozen=True, slots=True)
class QdrantPart:
    """What is built: the points of a Qdrant collection."""

    name: str


class QdrantIndex(DenseIndex):
    """See the module.

    Args:
        name: of the collection here, for the one there.
        labels: by slot, of the whole collection; ids in Qdrant.
    """

    def __init__(
        self, config: DenseConfig, store: QdrantStore, name: str, labels: Callable[[], NDArray[Any]]
    ) -> None:
        super().__init__(config)
        self._store = store
        self._name = f"{store.prefix}-{name}-"
        self._labels = labels
        self._removed: NDArray[np.int64] = np.zeros(0, np.int64)

    @property
    def outgrown(self) -> bool:
        """Never: Qdrant trains its own."""
        return False

    @property
    def nbytes(self) -> int:
        """Bytes in this process's memory."""
        return self._view.tail.nbytes

    def absorb(self, expected: int = 0, fresh: bool = False) -> None:
        """Upload the tail. Raises Unavailable; what is uploaded already does no harm."""
        before = self._view
        labels = self._labels()[before.start :]
        rows = before.tail.view()[: len(labels)]  # a write in the making has no labels yet
        if not len(rows):
            return
        part = before.built or self._create()
        for start in range(0, len(rows), UPLOAD):
            some = slice(start, start + UPLOAD)
            batch = self._store.models.Batch(
                ids=labels[some][: len(rows) - start].tolist(), vectors=rows[some].tolist()
            )
            self._store.call("upsert", part.name, points=batch, wait=True)
        with self._lock:
            tail = GrowingArray(
                np.float32, self.config.dimensions, self._view.tail.view()[len(rows) :]
            )
            self._view = DenseView(part, before.start + len(rows), tail)

    def _create(self) -> QdrantPart:
        m, c = self._store.models, self.config
        part = QdrantPart(self._name + secrets.token_hex(4))
        distance = m.Distance.EUCLID if c.metric == "l2" else m.Distance.DOT
        self._store.call(
            "create_collection",
            part.name,
            vectors_config=m.VectorParams(size=c.dimensions, distance=distance),
            hnsw_config=m.HnswConfigDiff(m=c.m, ef_construct=c.ef_construction),
        )
        return part

    def forget(self, labels: NDArray[np.int64]) -> None:
        """Remove points that are dead. They were hidden before; this makes room."""
        part = self._view.built
        new = np.setdiff1d(labels, self._removed, assume_unique=True)
        if part is None or not len(new):
            return
        for start in range(0, len(new), UPLOAD):
            points = self._store.models.PointIdsList(points=new[start : start + UPLOAD].tolist())
            self._store.call("delete", part.name, points_selector=points, wait=True)
        self._removed = np.union1d(self._removed, new)

    def discard(self) -> None:
        """Remove all that it has in Qdrant, and what a crash has left of its predecessors."""
        for name in self._store.names():
            if name.startswith(self._name):
                self._store.call("delete_collection", name)

    def discard_others(self) -> None:
        """Remove its predecessors."""
        part = self._view.built
        for name in self._store.names():
            if name.startswith(self._name) and (part is None or name != part.name):
                self._store.call("delete_collection", name)

    # Searching.

    def _search_built(
        self, view: DenseView, queries: Floats, allowed: Mask, whole: bool, how: DenseQuery
    ) -> tuple[Floats, NDArray[np.int64]]:
        m, labels = self._store.models, self._labels()[: len(allowed)]
        matching = len(allowed) if whole else int(np.count_nonzero(allowed))
        shape = (len(queries), how.limit)
        scores = np.full(shape, -np.inf, np.float32)
        slots = np.full(shape, -1, np.int64)
        if not matching:
            return scores, slots
        named = None
        if matching <= NAMED and not whole:
            ids = labels[np.flatnonzero(allowed)].tolist()
            named = m.Filter(must=[m.HasIdCondition(has_id=ids)])
        params = m.SearchParams(
            exact=how.exact, hnsw_ef=max(how.ef_search or self.config.ef_search, how.limit)
        )
        enough = min(how.limit, matching)
        ask = enough if named or whole else int(enough * len(allowed) / matching * 1.2) + 16
        left = list(range(len(queries)))
        while left:
            requests = [
                m.QueryRequest(query=queries[i].tolist(), limit=ask, filter=named, params=params)
                for i in left
            ]
            answers = self._store.call("query_batch_points", view.built.name, requests=requests)
            again = []
            for i, answer in zip(left, answers, strict=True):
                got = self._matching(answer.points, labels, allowed)[: how.limit]
                if len(got) < enough and len(answer.points) >= ask:
                    again.append(i)
                    continue
                slots[i, : len(got)] = [slot for slot, _ in got]
                scores[i, : len(got)] = [score for _, score in got]
            left, ask = again, ask * 4
        return scores, slots

    def _matching(
        self, points: Sequence[Any], labels: NDArray[np.int64], allowed: Mask
    ) -> list[tuple[int, float]]:
        if not points:
            return []
        ids = np.fromiter((p.id for p in points), np.int64, len(points))
        at = np.minimum(np.searchsorted(labels, ids), len(labels) - 1)
        good = (labels[at] == ids) & allowed[at]
        l2 = self.config.metric == "l2"
        return [
            (int(slot), -(p.score**2) if l2 else p.score)
            for p, slot, ok in zip(points, at, good, strict=True)
            if ok
        ]

    # Saving.

    def save(self, view: DenseView, path: str) -> None:
        """Write down which Qdrant collection it is."""
        Path(path).write_bytes(orjson.dumps({"qdrant": view.built.name}))

    def restore(self, path: str | None, start: int, alive: Mask, tail: Floats) -> None:
        """Take over what `save` wrote. Raises RuntimeError when Qdrant has not what it should."""
        part = QdrantPart(orjson.loads(Path(path).read_bytes())["qdrant"]) if path else None
        if part is not None:
            try:
                self._check(part, int(np.count_nonzero(alive[:start])))
            except Unavailable as e:  # searches will say so until it is back
                log.warning("the points in Qdrant could not be counted: %s", e.message)
        self._view = DenseView(part, start, GrowingArray(np.float32, self.config.dimensions, tail))

    def _check(self, part: QdrantPart, live: int) -> None:
        if part.name not in self._store.names():
            raise RuntimeError(f"Qdrant has no collection {part.name}")
        have = self._store.call("count", part.name, exact=True).count
        if have < live:
            raise RuntimeError(f"Qdrant has {have} of {live} points in {part.name}")
