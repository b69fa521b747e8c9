"""Filters, recall under filters, saving and damage of a collection's index."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from forebay_server.indexes import dense, files
from forebay_server.indexes.collection import (
    CollectionConfig,
    CollectionIndex,
    IndexedPoint,
    TextFieldConfig,
)
from forebay_server.indexes.dense import DenseConfig, DenseIndex, DenseQuery
from forebay_server.indexes.filters import (
    AllOf,
    AnyOf,
    DateRange,
    Exists,
    Ids,
    InRange,
    NoneOf,
    OneOf,
    Words,
    tagged,
)

ROWS = [
    {"text": "red apple", "kind": "fruit", "price": 3, "tags": ["a", "b"], "on": "2026-01-31"},
    {"text": "green pear", "kind": "fruit", "price": 5.5, "fresh": True},
    {"text": "grey stone", "kind": "thing", "price": "5.5", "meta": {"weight": 7}},
    {"text": "old apple" + " pie" * 100, "kind": None, "on": "2025-06-01T12:00:00Z", "one": 1},
]


@pytest.fixture(scope="module")
def index() -> CollectionIndex:
    made = CollectionIndex(CollectionConfig(None, (TextFieldConfig("text", "en"),)))
    made.write([IndexedPoint(i, f"p{i}", None, row) for i, row in enumerate(ROWS)])
    return made


def one(key: str, *values: object) -> OneOf:
    return OneOf(key, tuple(tagged(v) for v in values))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        (one("kind", "fruit"), [0, 1]),
        (one("kind", "fruit", "thing"), [0, 1, 2]),
        (one("text", "red apple", "apple"), [0]),
        (one("text", ""), []),
        (one("price", 5.5), [1]),
        (one("price", "5.5"), [2]),
        (one("fresh", True), [1]),
        (one("one", True), []),
        (one("tags", "b"), [0]),
        (one("meta.weight", 7), [2]),
        (InRange("price", 3, 5.5), [0, 1]),
        (InRange("price", 3, 5.5, low_open=True), [1]),
        (InRange("price", 3, 5.5, high_open=True), [0]),
        (DateRange("on", 1748736000.0, 1767225600.0), [3]),
        (Exists("kind"), [0, 1, 2]),
        (Exists("text"), [0, 1, 2, 3]),
        (Exists("nothing"), []),
        (Exists("meta"), [2]),
        (Exists("met"), []),
        (Words("text", "apples"), [0, 3]),
        (Words("text", "apple red", phrase=True), []),
        (Ids(frozenset({"p2", "p9"})), [2]),
        (AllOf((one("kind", "fruit"), InRange("price", 4, 9))), [1]),
        (AnyOf((one("kind", "thing"), Words("text", "old"))), [2, 3]),
        (NoneOf((one("kind", "fruit"), one("kind", "thing"))), [3]),
    ],
)
def test_filters(index: CollectionIndex, condition: object, expected: list[int]) -> None:
    mask, _ = index.allowed(index.view(), condition)  # type: ignore[arg-type]
    assert np.flatnonzero(mask).tolist() == expected


def clusters(count: int, width: int = 48) -> np.ndarray:
    random = np.random.default_rng(3)
    centres = random.normal(size=(100, width))
    noise = 0.5 * random.normal(size=(count, width))
    return (centres[random.integers(0, 100, count)] + noise).astype(np.float32)


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    return clusters(12_000)


@pytest.fixture
def built(vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> CollectionIndex:
    """10,000 points in HNSW, 2,000 in the tail."""
    monkeypatch.setattr(dense, "BUILD_AT", 5000)
    made = CollectionIndex(CollectionConfig(DenseConfig(vectors.shape[1])))
    for start in range(0, 12_000, 2000):
        rows = vectors[start : start + 2000]
        made.write(
            [
                IndexedPoint(start + i, f"p{start + i}", v, {"n": start + i})
                for i, v in enumerate(rows)
            ]
        )
        if start == 8000:
            made.absorb()
    return made


@pytest.mark.parametrize("share", [1.0, 0.5, 0.1, 0.01])
@pytest.mark.parametrize("removed", [False, True])
def test_recall_under_filters(built, vectors, share: float, removed: bool) -> None:
    alive = np.ones(12_000, bool)
    if removed:
        alive[::3] = False
        built.write((), np.flatnonzero(~alive).tolist())
    view = built.view()
    chosen = InRange("n", 0, 12_000 * share, high_open=True) if share < 1 else None
    allowed, whole = built.allowed(view, chosen)
    expected_mask = alive & (np.arange(12_000) < 12_000 * share)
    assert (allowed == expected_mask).all()
    queries = built.dense.prepared(vectors[:50] + 0.05)
    _, slots = built.dense.search(view.dense, queries, allowed, whole, DenseQuery(10))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    truth = np.where(expected_mask, queries @ unit.T, -9).argsort(1)[:, ::-1][:, :10]
    found = [len(set(a) & set(b)) / 10 for a, b in zip(slots.tolist(), truth.tolist(), strict=True)]
    assert np.mean(found) >= 0.95
    assert expected_mask[slots].all()


def test_a_saved_index_answers_as_before(built, vectors, tmp_path: Path) -> None:
    built.write((), [5, 11_000])
    files.save(built, tmp_path / "index")
    again = files.load(built.config, tmp_path / "index")
    queries = built.dense.prepared(vectors[:20])
    for i in (built, again):
        assert len(i) == 11_998
    a, b = (
        i.dense.search(i.view().dense, queries, i.view().alive, False, DenseQuery(5))
        for i in (built, again)
    )
    assert (a[1] == b[1]).all()


@pytest.mark.parametrize(
    "name", ["dense.built", "points.npz", "ids.json", "payloads.npz", "manifest.json"]
)
@pytest.mark.parametrize("how", ["flip", "cut", "remove"])
def test_damage_is_noticed(built, tmp_path: Path, name: str, how: str) -> None:
    files.save(built, tmp_path / "index")
    path = tmp_path / "index" / name
    data = bytearray(path.read_bytes())
    if how == "remove":
        path.unlink()
    else:
        data[len(data) // 2] ^= 0xFF
        path.write_bytes(data if how == "flip" else data[: len(data) // 2])
    with pytest.raises(files.DamagedIndex):
        files.load(built.config, tmp_path / "index")


def test_ivf_is_trained_again_when_it_has_been_outgrown(monkeypatch) -> None:
    monkeypatch.setattr("forebay_server.indexes.dense.BUILD_AT", 400)
    rng = np.random.default_rng(5)
    centres = rng.normal(size=(50, 16))
    config = DenseConfig(16, "l2", "ivf_pq", code_bytes=2, probes=8)
    mine, every, sizes = DenseIndex(config), [], []
    for _ in range(6):
        rows = centres[rng.integers(0, 50, 400)] + 0.1 * rng.normal(size=(400, 16))
        every.append(rows.astype(np.float32))
        mine.append(every[-1])
        mine.absorb()
        if mine.outgrown:  # as upkeep does, with the vectors of the database
            fresh = DenseIndex(config)
            fresh.append(np.concatenate(every))
            fresh.absorb(fresh=True)
            assert fresh.view().built.nlist > mine.view().built.nlist
            mine = fresh
        assert not mine.outgrown
        sizes.append(mine.view().built.nlist)
    assert sizes[0] == 10 and sizes[-1] >= 40
    assert len(set(sizes)) <= 3, sizes  # seldom: when it would have twice the clusters


def test_saves_take_the_built_part_over(tmp_path: Path) -> None:
    vectors = np.random.default_rng(1).normal(size=(600, 8)).astype(np.float32)
    index = CollectionIndex(CollectionConfig(DenseConfig(8)))
    index.write([IndexedPoint(i, str(i), v, {}) for i, v in enumerate(vectors[:500])])
    index.absorb()
    files.save(index, tmp_path / "index")
    before = (tmp_path / "index" / files.DENSE).stat()
    index.write([IndexedPoint(i, str(i), vectors[i], {}) for i in range(500, 600)], gone=[3])
    files.save(index, tmp_path / "index")
    after = (tmp_path / "index" / files.DENSE).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    again = files.load(index.config, tmp_path / "index")
    assert len(again) == 599 and again.next_label == 600
    # A crash between the two renames of a save leaves the old one aside.
    (tmp_path / "index").rename(tmp_path / "index.old")
    assert len(files.load(index.config, tmp_path / "index")) == 599


def test_few_vectors_are_not_trained_on(monkeypatch) -> None:
    """What is left of a large IVF-PQ collection after deletions is compared one by one."""
    monkeypatch.setattr("forebay_server.indexes.dense.BUILD_AT", 100)
    mine = DenseIndex(DenseConfig(8, kind="ivf_pq", code_bytes=2))
    mine.append(np.eye(8, dtype=np.float32).repeat(30, axis=0))
    assert not mine.should_absorb()
    mine.absorb(fresh=True)
    assert mine.view().built is None and len(mine) == 240
    mine.append(np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32))
    assert mine.should_absorb()
    mine.absorb()
    assert mine.view().start == 300 and not mine.should_absorb()
