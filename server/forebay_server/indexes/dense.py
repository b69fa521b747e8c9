"""Nearest vectors by FAISS: a built index, and a tail of newer vectors that are compared one by one.

Searches never wait for writes: FAISS cannot add to an index that is being searched, so new vectors
go into the tail, and `absorb` puts a copy of the built index with the tail added in place of the
old one. Deleted and filtered-out slots are passed to FAISS as a bitmap (IDSelectorBitmap), so they
are left out while it looks, not afterwards. Where few slots match, those alone are compared: an
HNSW walk that may use one node in a hundred finds too little.
"""

from __future__ import annotations

import logging
import math
import os
import threading
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from forebay_server.indexes.arrays import GrowingArray


class _Later:
    """FAISS, imported when the first index needs it: a server without collections saves 45 MB."""

    def __getattr__(self, name: str) -> Any:
        # Its threads wait for each other some thousand times while an index is trained: spinning on
        # cores that others use makes that a hundred times slower.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        import faiss as module

        globals()["faiss"] = module
        return getattr(module, name)


faiss: Any = _Later()
log = logging.getLogger("forebay.indexes")

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]
Metric = Literal["cosine", "dot", "l2"]
Kind = Literal["flat", "hnsw", "ivf_pq", "qdrant"]

#: Vectors that wait before an index is built, and before an index takes up its tail.
BUILD_AT = 10_000
#: The tail is taken up when it has reached this share of the built part, or this many vectors, which
#: cost a search about as much as the built part does; or when it is idle and not quite small.
ABSORB_SHARE, MAX_TAIL, IDLE_TAIL = 0.1, 20_000, 500
#: Cost of one step of an HNSW walk against one comparison of a scan, which runs along the memory.
WALK_COST = 6.0
#: Greatest ef that a filtered HNSW walk is given.
MAX_EF = 4096
#: Vectors to train IVF-PQ with, per cluster, and rounds of k-means.
TRAIN_PER_LIST, TRAIN_ROUNDS = 40, 10


@dataclass(frozen=True, slots=True)
class DenseConfig:
    """Zeros are filled in by `filled`. See the contract's IndexConfig."""

    dimensions: int
    metric: Metric = "cosine"
    kind: Kind = "hnsw"
    m: int = 16
    ef_construction: int = 100
    ef_search: int = 64
    lists: int = 0
    probes: int = 16
    code_bytes: int = 0


@dataclass(frozen=True, slots=True)
class DenseView:
    """What one search sees. `built` holds the slots below `start`, `tail` those from there on;
    `device` is a copy of `built` on GPUs, where there is one."""

    built: Any
    start: int
    tail: GrowingArray
    device: Any = None


@dataclass(frozen=True, slots=True)
class DenseQuery:
    """What searches of one batch have in common."""

    limit: int
    exact: bool = False
    ef_search: int = 0
    probes: int = 0


class DenseIndex:
    """See the module. One writer at a time, any readers; slots are 0, 1, 2, ... in order."""

    def __init__(self, config: DenseConfig, gpu: bool = False) -> None:
        """Args: gpu: search flat and IVF-PQ indexes on the GPUs that FAISS sees."""
        self.config = config
        self._gpu = gpu
        self._view = DenseView(None, 0, GrowingArray(np.float32, config.dimensions))
        self._lock = threading.Lock()  # appends and the swap at the end of an absorb

    @property
    def _metric(self) -> int:
        return faiss.METRIC_L2 if self.config.metric == "l2" else faiss.METRIC_INNER_PRODUCT

    def view(self) -> DenseView:
        """The vectors of this moment."""
        return self._view

    def __len__(self) -> int:
        v = self._view
        return v.start + len(v.tail)

    @property
    def nbytes(self) -> int:
        """Bytes in memory, roughly."""
        v = self._view
        return v.tail.nbytes + (0 if v.built is None else _size(v.built))

    def append(self, vectors: Floats) -> None:
        """Add [n, dimensions]; normalised here for cosine."""
        rows = self.prepared(vectors)
        with self._lock:
            self._view.tail.append(rows)

    def prepared(self, vectors: Floats) -> Floats:
        """Vectors as they are compared: float32, of unit length for cosine."""
        rows = np.ascontiguousarray(vectors, np.float32)
        if self.config.metric != "cosine":
            return rows
        with np.errstate(over="ignore"):
            norms = np.linalg.norm(rows, axis=1, keepdims=True)
        odd = ~((norms > 1e-15) & (norms < 1e18))[:, 0]
        if odd.any():  # their squares are beyond float32, and so is the length or its precision
            exact = rows[odd].astype(np.float64)
            size = np.linalg.norm(exact, axis=1, keepdims=True)
            rows = rows.copy()
            rows[odd] = exact / np.where(size > 0, size, 1)
            norms[odd] = 1
        return rows / norms

    # Building.

    def should_absorb(self, idle: bool = False) -> bool:
        """Whether enough has gathered in the tail. `idle`: nothing was written lately."""
        v = self._view
        if idle and v.built is not None and len(v.tail) > IDLE_TAIL:
            return True
        least = max(BUILD_AT, min(ABSORB_SHARE * v.start, MAX_TAIL))
        return len(v.tail) >= max(least, self._trainable)

    @property
    def _trainable(self) -> int:
        """Vectors without which nothing can be built: IVF-PQ learns 256 codes."""
        return 256 if self.config.kind == "ivf_pq" and self._view.built is None else 1

    @property
    def outgrown(self) -> bool:
        """Whether the built part was trained when there was much less: it is to be built anew."""
        built = self._view.built
        if self.config.kind != "ivf_pq" or self.config.lists or built is None:
            return False
        return _lists(len(self)) >= 2 * built.nlist

    def absorb(self, expected: int = 0, fresh: bool = False) -> None:
        """Build, or take the tail into the built index. Long; searches and appends go on.

        Args:
            expected: vectors that there will be, where more is known to come.
            fresh: nobody searches yet, so that the built index may be changed in its place.
        """
        before = self._view
        rows = before.tail.view()
        if len(rows) < self._trainable:
            return
        if before.built is None:
            built = self._new(rows, max(expected, len(rows)))
        else:
            built = before.built if fresh else faiss.clone_index(before.built)
        built.add(rows)
        with self._lock:
            newer = self._view.tail.view()[len(rows) :]
            tail = GrowingArray(np.float32, self.config.dimensions, newer)
            device = self._on_device(built)
            self._view = DenseView(built, before.start + len(rows), tail, device)

    def _on_device(self, built: Any) -> Any:
        """A copy on the GPUs; None where that cannot be (FAISS has no HNSW there)."""
        if not self._gpu or built is None or self.config.kind not in ("flat", "ivf_pq"):
            return None
        try:
            return faiss.index_cpu_to_all_gpus(built)
        except RuntimeError as e:  # a code size that GPUs have not, or no memory left
            log.warning("an index stays on the CPU: %s", str(e).splitlines()[0][:200])
            return None

    def forget(self, labels: NDArray[np.int64]) -> None:
        """Points are dead. Their vectors stay until the collection is rebuilt."""

    def discard(self) -> None:
        """Nothing of it lies anywhere else."""

    def discard_others(self) -> None:
        """Nothing of its predecessors lies anywhere else."""

    def _new(self, rows: Floats, expected: int) -> Any:
        c, d = self.config, self.config.dimensions
        if c.kind == "flat":
            return faiss.IndexFlat(d, self._metric)
        if c.kind == "hnsw":
            index = faiss.IndexHNSWFlat(d, c.m, self._metric)
            index.hnsw.efConstruction = c.ef_construction
            return index
        lists = min(c.lists or _lists(expected), max(1, len(rows) // TRAIN_PER_LIST))
        size = c.code_bytes or next(b for b in range(max(1, d // 4), 0, -1) if d % b == 0)
        index = faiss.index_factory(d, f"IVF{lists},PQ{size}", self._metric)
        index.cp.niter = TRAIN_ROUNDS
        step = max(1, len(rows) // training(expected))
        index.train(np.ascontiguousarray(rows[::step]))
        return index

    # Searching.

    def search(
        self, view: DenseView, queries: Floats, allowed: Mask, whole: bool, how: DenseQuery
    ) -> tuple[Floats, NDArray[np.int64]]:
        """The best slots of each query.

        Args:
            queries: [q, dimensions], `prepared`.
            allowed: by slot; slots beyond its end are left out.
            whole: every slot of `allowed` is allowed, so that nothing need be looked up.

        Returns:
            scores [q, limit], greater is better, and slots [q, limit], -1 where there are no more.
        """
        n = len(allowed)
        parts = []
        start = min(view.start, n)
        if view.built is not None and start:
            parts.append(self._search_built(view, queries, allowed[:start], whole, how))
        tail = view.tail.view()[: n - start]
        if len(tail):
            mine = None if whole else np.flatnonzero(allowed[start : start + len(tail)])
            parts.append(self._scan(tail, queries, mine, start, how.limit))
        if not parts:
            shape = (len(queries), how.limit)
            return np.full(shape, -np.inf, np.float32), np.full(shape, -1, np.int64)
        scores, slots = (np.concatenate(p, axis=1) for p in zip(*parts, strict=True))
        if len(parts) > 1:
            order = np.argsort(-scores, axis=1, kind="stable")[:, : how.limit]
            scores = np.take_along_axis(scores, order, 1)
            slots = np.take_along_axis(slots, order, 1)
        return scores, slots

    def _search_built(
        self, view: DenseView, queries: Floats, allowed: Mask, whole: bool, how: DenseQuery
    ) -> tuple[Floats, NDArray[np.int64]]:
        c, built = self.config, view.built
        matching = view.start if whole else int(np.count_nonzero(allowed))
        # The bitmap hides slots beyond the reader's view as well as those that do not match.
        selector = bitmap = None
        if not whole or len(allowed) < view.start:
            bitmap = np.packbits(allowed, bitorder="little")
            selector = faiss.IDSelectorBitmap(bitmap)
        share = matching / max(1, view.start)
        ef = max(how.ef_search or c.ef_search, how.limit)
        if c.kind == "hnsw" and not how.exact:
            ef_now = min(MAX_EF, int(ef / max(share, 1e-9))) if share < 1 else ef
            if matching > ef_now * c.m * WALK_COST or share == 1:
                # The unbounded queue finds the same in up to a sixth less time; it takes no selector.
                params = faiss.SearchParametersHNSW(
                    efSearch=ef_now, sel=selector, bounded_queue=selector is not None
                )
                return self._faiss(built, queries, how.limit, params)
        if view.device is not None and selector is None and not how.exact:
            params = None
            if c.kind == "ivf_pq":
                params = faiss.SearchParametersIVF(nprobe=min(built.nlist, how.probes or c.probes))
            return self._faiss(view.device, queries, how.limit, params)
        if c.kind == "ivf_pq":
            probes = built.nlist if how.exact else how.probes or c.probes
            probes = min(built.nlist, math.ceil(probes / max(share, 0.01)))
            params = faiss.SearchParametersIVF(nprobe=probes, sel=selector)
            return self._faiss(built, queries, how.limit, params)
        rows = _flat_rows(built, c.dimensions)
        chosen = None if share == 1 else np.flatnonzero(allowed)
        return self._scan(rows, queries, chosen, 0, how.limit)

    def _faiss(
        self, index: Any, queries: Floats, limit: int, params: Any
    ) -> tuple[Floats, NDArray[np.int64]]:
        scores, slots = index.search(queries, limit, params=params)
        if self._metric == faiss.METRIC_L2:
            scores = -scores
        scores[slots < 0] = -np.inf
        return scores, slots

    def _scan(
        self, rows: Floats, queries: Floats, chosen: NDArray[Any] | None, base: int, limit: int
    ) -> tuple[Floats, NDArray[np.int64]]:
        """Compare the chosen rows (None = all), exactly."""
        if chosen is not None:
            rows = rows[chosen]
        if not len(rows):
            shape = (len(queries), limit)
            return np.full(shape, -np.inf, np.float32), np.full(shape, -1, np.int64)
        k = min(limit, len(rows))
        scores, places = faiss.knn(queries, np.ascontiguousarray(rows), k, metric=self._metric)
        if self._metric == faiss.METRIC_L2:
            scores = -scores
        slots = places if chosen is None else chosen[places]
        slots = np.where(places < 0, -1, slots + base).astype(np.int64)
        if k < limit:
            gap = ((0, 0), (0, limit - k))
            scores = np.pad(scores, gap, constant_values=-np.inf)
            slots = np.pad(slots, gap, constant_values=-1)
        return scores, slots

    # Saving.

    def save(self, view: DenseView, path: str) -> None:
        """Write the built part to a file."""
        faiss.write_index(view.built, path)

    def restore(self, path: str | None, start: int, alive: Mask, tail: Floats) -> None:
        """Take over what `save` wrote. Raises RuntimeError for a file that FAISS cannot read.

        Args:
            start: vectors that are built in.
            alive: by slot.
        """
        built = faiss.read_index(path) if path else None
        if built is not None and (
            built.d != self.config.dimensions
            or built.metric_type != self._metric
            or built.ntotal != start
        ):
            raise RuntimeError("the index file is of another collection")
        rows = GrowingArray(np.float32, self.config.dimensions, tail)
        self._view = DenseView(built, start, rows, self._on_device(built))


def _lists(vectors: int) -> int:
    """Clusters of an IVF index that nobody has chosen: four times the root, as FAISS advises, and no
    more than that many vectors can train."""
    return max(1, min(int(4 * math.sqrt(vectors)), vectors // TRAIN_PER_LIST))


def training(vectors: int) -> int:
    """Vectors that train an IVF index for so many."""
    return TRAIN_PER_LIST * max(256, _lists(vectors))


def _flat_rows(index: Any, dimensions: int) -> Floats:
    """The vectors that a flat or HNSW index holds, without a copy."""
    storage = faiss.downcast_index(index.storage) if hasattr(index, "storage") else index
    pointer = storage.get_xb()
    return faiss.rev_swig_ptr(pointer, storage.ntotal * dimensions).reshape(-1, dimensions)


def _size(index: Any) -> int:
    """Bytes of a built index, from its shape."""
    if isinstance(index, faiss.IndexHNSW):
        links = index.hnsw.nb_neighbors(0) + 4
        return index.ntotal * (4 * index.d + 4 * links)
    if isinstance(index, faiss.IndexIVFPQ):
        return index.ntotal * (index.code_size + 8) + 4 * index.nlist * index.d
    return index.ntotal * index.d * 4


def set_threads(count: int) -> None:
    """Threads of FAISS's calls that are made by this thread."""
    faiss.omp_set_num_threads(count)


def gpus() -> int:
    """GPUs that FAISS sees; 0 with faiss-cpu."""
    return faiss.get_num_gpus() if hasattr(faiss, "StandardGpuResources") else 0
