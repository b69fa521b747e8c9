"""Qdrant as a dense index, by the client's local mode: the same answers as exact FAISS."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from forebay.errors import FailedPrecondition, Unavailable
from forebay_server.indexes import files
from forebay_server.indexes.backends import Backends
from forebay_server.indexes.collection import CollectionConfig, CollectionIndex, IndexedPoint
from forebay_server.indexes.dense import DenseConfig, DenseQuery
from forebay_server.indexes.filters import InRange
from forebay_server.indexes.qdrant import LOCAL, QdrantStore

WIDTH = 8


@pytest.fixture(scope="module")
def store():
    made = QdrantStore(LOCAL)
    yield made
    made.close()


def points(vectors, first: int = 0) -> list[IndexedPoint]:
    return [
        IndexedPoint(10 * (first + i), f"p{first + i}", v, {"n": first + i})
        for i, v in enumerate(vectors)
    ]


def make(store: QdrantStore, metric, name: str) -> CollectionIndex:
    config = CollectionConfig(DenseConfig(WIDTH, metric, "qdrant"))
    return CollectionIndex(config, partial(Backends(store).make, name))


def search(index: CollectionIndex, queries, condition=None, limit: int = 10):
    view = index.view()
    allowed, whole = index.allowed(view, condition)
    assert index.dense is not None and view.dense is not None
    rows = index.dense.prepared(queries)
    return index.dense.search(view.dense, rows, allowed, whole, DenseQuery(limit, True))


@pytest.mark.parametrize("metric", ["cosine", "dot", "l2"])
@pytest.mark.filterwarnings("ignore:Local mode")
def test_it_finds_what_exact_search_finds(
    store: QdrantStore, metric, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forebay_server.indexes.qdrant.NAMED", 50)
    rng = np.random.default_rng(3)
    vectors = rng.normal(size=(660, WIDTH)).astype(np.float32)
    queries = rng.normal(size=(5, WIDTH)).astype(np.float32)
    mine = make(store, metric, metric)
    exact = CollectionIndex(CollectionConfig(DenseConfig(WIDTH, metric, "flat")))
    for index in (mine, exact):
        index.write(points(vectors[:650]))
        index.absorb()
        index.write(points(vectors[650:], 650), gone=[0, 10, 20])  # a tail, and dead points
    conditions = [None, InRange("n", 0, 40), InRange("n", 640, 655), InRange("n", 0, 140)]

    def same(one: CollectionIndex, other: CollectionIndex) -> None:
        for condition in conditions:
            scores, slots = search(one, queries, condition)
            true_scores, true_slots = search(other, queries, condition)
            np.testing.assert_array_equal(slots, true_slots)
            np.testing.assert_allclose(scores, true_scores, rtol=1e-4, atol=1e-5)

    same(mine, exact)
    # More that match than are named, far from the query: more is asked for until enough has come.
    far = InRange("n", 0, 140)
    assert (search(mine, -queries, far, limit=50)[1] >= 0).all()
    mine.absorb()  # the tail goes up, the dead come down
    exact.absorb()
    same(mine, exact)
    part = mine.view().dense.built  # type: ignore[union-attr]
    assert store.call("count", part.name, exact=True).count == 657

    files.save(mine, tmp_path / "index")
    again = files.load(mine.config, tmp_path / "index", lambda: make(store, metric, metric))
    same(again, exact)
    assert mine.nbytes < exact.nbytes
    store.call("delete_collection", part.name)
    with pytest.raises(files.DamagedIndex):
        files.load(mine.config, tmp_path / "index", lambda: make(store, metric, metric))
    with pytest.raises(Unavailable):
        search(mine, queries)


def test_what_predecessors_left_is_removed(store: QdrantStore) -> None:
    vectors = np.eye(WIDTH, dtype=np.float32)
    old, new, other = (make(store, "dot", n) for n in ("7", "7", "77"))
    for index in (old, new, other):
        index.write(points(vectors))
        index.absorb()
    assert new.dense is not None
    new.dense.discard_others()
    names = [n for n in store.names() if n.startswith(("forebay-7-", "forebay-77-"))]
    assert len(names) == 2 and new.view().dense.built.name in names  # type: ignore[union-attr]
    assert (search(new, vectors)[1][:, 0] == np.arange(WIDTH)).all()
    store.keep_only({"77"})
    assert [n.rpartition("-")[0] for n in store.names()] == ["forebay-77"]


def test_a_server_that_is_away_is_unavailable_and_loses_nothing() -> None:
    away = QdrantStore("http://127.0.0.1:9", timeout_s=1)
    index = make(away, "cosine", "away")
    index.write(points(np.eye(WIDTH, dtype=np.float32)))
    with pytest.raises(Unavailable):
        index.absorb()
    assert (search(index, np.eye(WIDTH))[1][:, 0] == np.arange(WIDTH)).all()


def test_a_server_without_qdrant_refuses_its_collections() -> None:
    with pytest.raises(FailedPrecondition) as caught:
        Backends().check(DenseConfig(3, kind="qdrant"))
    assert "retrieval.qdrant" in caught.value.message
