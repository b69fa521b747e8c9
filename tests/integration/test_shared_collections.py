"""Collections of two servers that share a PostgreSQL: each takes every call, and they come to agree."""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from forebay.v1 import collection_pb2 as pb
from forebay.v1 import collection_pb2_grpc
from forebay_server.dataplane.collections import Collections
from google.protobuf import json_format

from tests.conftest import Live, NewDatabase, Start
from tests.integration.test_collections import create, ids, point

TEXT = [{"path": "text", "language": "en"}]


class Replica:
    """A server of the database, and its collections by the wire."""

    def __init__(self, live: Live) -> None:
        self.live = live
        self.stub = collection_pb2_grpc.CollectionServiceStub(live.channel)

    @property
    def collections(self) -> Collections:
        assert self.live.server._retrieval is not None
        return self.live.server._retrieval.collections

    def upsert(self, name: str, *points: pb.Point) -> pb.UpsertPointsResponse:
        return self.stub.UpsertPoints(pb.UpsertPointsRequest(collection=name, points=points))

    def remove(self, name: str, *ids: str) -> int:
        return self.stub.DeletePoints(pb.DeletePointsRequest(collection=name, ids=ids)).deleted

    def remove_by(self, name: str, condition: dict[str, Any]) -> int:
        request = pb.DeletePointsRequest(collection=name)
        json_format.ParseDict(condition, request.filter)
        return self.stub.DeletePoints(request).deleted

    def find(self, name: str, text: str = "word", limit: int = 1000) -> list[str]:
        return ids(self.stub.Search(pb.SearchRequest(collection=name, text=text, limit=limit)))

    def near(self, name: str, *vector: float) -> dict[str, list[float]]:
        asked = pb.SearchRequest(collection=name, vector=vector, limit=1000, with_vectors=True)
        hits = self.stub.Search(asked).hits
        assert len({h.id for h in hits}) == len(hits)
        return {h.id: list(h.vector) for h in hits}

    def stored(self, name: str) -> dict[str, list[float]]:
        """What the database has."""
        asked = pb.GetPointsRequest(collection=name, page_size=1000, with_vectors=True)
        return {p.id: list(p.vector) for p in self.stub.GetPoints(asked).points}

    def count(self, name: str) -> int:
        request = pb.GetCollectionRequest(collection=name)
        return self.stub.GetCollection(request).collection.points

    def names(self) -> list[str]:
        listed = self.stub.ListCollections(pb.ListCollectionsRequest())
        return [c.name for c in listed.collections]

    def delete(self, name: str) -> int:
        return self.stub.DeleteCollection(pb.DeleteCollectionRequest(collection=name)).points

    def folder(self, name: str) -> Path:
        return self.collections.folder / str(self.collections.get(name).row.id)


def soon(look: Callable[[], Any], wanted: Any) -> None:
    """Look until it is so. The bound is for machines that are busy."""
    deadline = time.monotonic() + 60
    while (seen := look()) != wanted:
        assert time.monotonic() < deadline, f"{seen!r} and not {wanted!r}"
        time.sleep(0.05)


def code_of(work: Callable[[], Any]) -> grpc.StatusCode | None:
    """The status of a call."""
    try:
        work()
    except grpc.RpcError as e:
        return e.code()
    return grpc.StatusCode.OK


@pytest.fixture(scope="module")
def url(postgres: NewDatabase, lane: str) -> str:
    """A database for each lane."""
    return postgres()


@pytest.fixture(scope="module")
def another(
    start: Start, url: str, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Replica]:
    """Starts one more server of the database, with a home of its own unless one is given."""
    models = tmp_path_factory.mktemp("models")
    return lambda **flags: Replica(start(models, storage__database=url, **flags))


@pytest.fixture(scope="module")
def pair(another: Callable[..., Replica]) -> tuple[Replica, Replica]:
    return another(), another()


@pytest.fixture
def name(request: pytest.FixtureRequest, pair: tuple[Replica, Replica]) -> str:
    """A collection with words and vectors, made on the first server."""
    made = re.sub(r"[^\w-]+", "-", request.node.name[5:])[-60:].strip("-_")
    create(pair[0].stub, made, dimensions=2, metric="METRIC_L2", text_fields=TEXT)
    return made


def test_what_one_makes_the_other_knows_at_once(pair: tuple[Replica, Replica]) -> None:
    a, b = pair
    for made, call in {
        "written": lambda n: b.upsert(n, point("x", [1, 1], text="word")),
        "streamed": lambda n: b.stub.UpsertStream(
            iter([pb.UpsertStreamRequest(header={"collection": n})])
        ),
        "searched": lambda n: b.near(n, 0, 0),
        "search-streamed": lambda n: list(
            b.stub.SearchStream(
                pb.SearchStreamRequest(requests=[pb.SearchRequest(collection=n, vector=[0, 0])])
            )
        ),
        "looked-at": b.count,
        "read": b.stored,
        "emptied": lambda n: b.remove(n, "x"),
        "emptied-by-filter": lambda n: b.remove_by(n, {"exists": {"key": "x"}}),
        "kept": lambda n: b.stub.Snapshot(pb.SnapshotRequest(collection=n)),
        "removed": b.delete,
    }.items():
        create(a.stub, made, dimensions=2, text_fields=TEXT)
        call(made)
    with pytest.raises(grpc.RpcError) as caught:
        create(b.stub, "looked-at", dimensions=2)
    assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS
    with pytest.raises(grpc.RpcError) as caught:
        b.find("writen")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert "written" in str(caught.value.details())


def test_a_write_is_found_at_once_where_it_was_made_and_soon_elsewhere(
    pair: tuple[Replica, Replica], name: str
) -> None:
    a, b = pair
    a.upsert(name, point("a", [1, 0], text="word"), point("b", [2, 0], text="word"))
    assert a.near(name, 0, 0) == {"a": [1, 0], "b": [2, 0]}
    soon(lambda: b.near(name, 0, 0), {"a": [1, 0], "b": [2, 0]})
    b.upsert(name, point("a", [3, 0], text="other"))
    assert b.find(name) == ["b"]
    soon(lambda: a.find(name), ["b"])
    soon(lambda: a.near(name, 0, 0), {"a": [3, 0], "b": [2, 0]})
    assert a.remove(name, "b", "a") == 2
    soon(lambda: b.near(name, 0, 0), {})
    soon(lambda: b.count(name), 0)


def test_a_write_meets_those_of_others(pair: tuple[Replica, Replica], name: str) -> None:
    """What was written elsewhere just before is there as well, before this server has looked."""
    a, b = pair
    b.count(name)
    for i in range(20):
        a.upsert(name, point(f"a{i}", [i, 1]), point("both", [i, 1]))
        b.upsert(name, point(f"b{i}", [i, 2]), point("both", [i, 2]))
        a.remove(name, f"a{i - 1}")
        answer = b.upsert(name, point("both", [i, 3]))
        assert (answer.inserted, answer.updated) == (0, 1)
        found = b.near(name, 0, 0)
        assert found == {f"a{i}": [i, 1], "both": [i, 3]} | {f"b{j}": [j, 2] for j in range(i + 1)}


def test_both_write_at_once_and_agree_with_the_database(
    pair: tuple[Replica, Replica], name: str
) -> None:
    def writer(seed: int) -> None:
        chance = random.Random(seed)
        replica = pair[seed % 2]
        for step in range(40):
            some = chance.sample(range(60), 8)
            if chance.random() < 0.3:
                replica.remove(name, *(f"p{i}" for i in some))
            else:
                value = float(seed * 1000 + step)
                points = [point(f"p{i}", [value, i], text="word") for i in some]
                replica.upsert(name, *points)
                written.append(value)

    written: list[float] = []
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(writer, range(8)))
    stored = pair[0].stored(name)
    assert stored
    assert {v[0] for v in stored.values()} <= set(written)
    for replica in pair:
        soon(lambda r=replica: r.near(name, 0, 0), stored)
        soon(lambda r=replica: sorted(r.find(name)), sorted(stored))
        soon(lambda r=replica: r.count(name), len(stored))


@pytest.mark.parametrize("trusted_s", [0.0, 1e9])
def test_writes_of_many_pages_come_whole(
    pair: tuple[Replica, Replica], name: str, trusted_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when a server is far behind: searches meanwhile see each point once, old or new."""
    monkeypatch.setattr("forebay_server.storage.collections.PAGE", 50)
    monkeypatch.setattr("forebay_server.dataplane.upkeep.LABELS", 64)
    monkeypatch.setattr("forebay_server.dataplane.upkeep.TRUSTED_S", trusted_s)
    a, b = pair
    asked = pb.SearchRequest(collection=name, vector=[0, 0], limit=1000, with_payload=False)
    points = [f"p{i}" for i in range(500)]
    for version in range(1, 4):
        a.upsert(name, *(point(p, [version, i]) for i, p in enumerate(points)))
        stored = a.stored(name)
        while b.near(name, 0, 0) != stored:
            assert sorted(ids(b.stub.Search(asked))) == sorted(points) or version == 1
    b.remove(name, *points[:99])
    a.upsert(name, point("last", [0, 0]))
    soon(lambda: b.near(name, 0, 0) == a.near(name, 0, 0) == a.stored(name), True)
    assert len(a.stored(name)) == 402


def test_removal_by_filter_takes_what_the_other_wrote(
    pair: tuple[Replica, Replica], name: str
) -> None:
    a, b = pair
    b.count(name)
    for i in range(20):
        a.upsert(name, *(point(f"p{i}-{k}", [i, k], old=k < 3) for k in range(5)))
        assert b.remove_by(name, {"equals": {"key": "old", "value": True}}) == 3
    soon(lambda: a.near(name, 0, 0), a.stored(name))
    soon(lambda: a.count(name), 40)


def test_a_deleted_collection_is_gone_for_both(pair: tuple[Replica, Replica], name: str) -> None:
    a, b = pair
    a.upsert(name, point("a", [1, 0]))
    kept = b.stub.Snapshot(pb.SnapshotRequest(collection=name)).snapshot
    assert kept.points == 1
    folder = b.folder(name)
    assert folder.exists()
    assert a.delete(name) == 1
    soon(lambda: name in b.names(), False)
    assert code_of(lambda: b.near(name, 0, 0)) is grpc.StatusCode.NOT_FOUND
    soon(folder.exists, False)


def test_a_write_to_a_collection_that_is_gone_is_refused(
    pair: tuple[Replica, Replica], name: str
) -> None:
    a, b = pair
    for round_ in range(5):
        b.count(name)
        a.delete(name)
        with pytest.raises(grpc.RpcError) as caught:
            b.upsert(name, point("a", [1, 0]))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert name in str(caught.value.details())
        # And one to a collection that has been made anew goes there.
        create(a.stub, name, dimensions=2)
        b.count(name)
        a.delete(name)
        create(a.stub, name, dimensions=2, metric="METRIC_L2")
        b.upsert(name, point("a", [1, round_]))
        assert b.near(name, 0, 0) == {"a": [1, round_]}
        soon(lambda n=round_: a.near(name, 0, 0) == {"a": [1, n]}, True)


def test_names_may_be_exchanged(pair: tuple[Replica, Replica], name: str) -> None:
    a, b = pair
    other = f"{name}-2"
    create(a.stub, other, dimensions=2)
    a.upsert(name, point("one", [1, 0]))
    b.upsert(other, point("two", [2, 0]))
    for old, new in ((name, "between"), (other, name), ("between", other)):
        a.live.run(a.collections.rename(old, new))
    for replica in pair:
        soon(lambda r=replica: r.near(name, 0, 0), {"two": [2, 0]})
        soon(lambda r=replica: r.near(other, 0, 0), {"one": [1, 0]})
        soon(lambda r=replica: "between" in r.names(), False)


def test_snapshots_lie_with_the_server_that_made_them(
    pair: tuple[Replica, Replica], name: str
) -> None:
    a, b = pair
    a.upsert(name, point("a", [1, 0], text="word"))
    kept = b.stub.Snapshot(pb.SnapshotRequest(collection=name)).snapshot
    (listed,) = a.stub.ListSnapshots(pb.ListSnapshotsRequest(collection=name)).snapshots
    assert listed == kept
    request = pb.RestoreSnapshotRequest(collection=name, snapshot=kept.name, target=f"{name}-again")
    with pytest.raises(grpc.RpcError) as caught:
        a.stub.RestoreSnapshot(request)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    file = b.folder(name) / "snapshots" / f"{kept.name}.db"
    assert str(file.relative_to(b.live.settings.home)) in str(caught.value.details())
    assert b.stub.RestoreSnapshot(request).collection.points == 1
    assert a.near(request.target, 0, 0) == {"a": [1, 0]}
    # As it says, the file may be taken there.
    copy = a.folder(name) / "snapshots" / file.name
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_bytes(file.read_bytes())
    create(b.stub, f"{name}-taken", dimensions=2)
    request.target = f"{name}-taken"
    assert code_of(lambda: a.stub.RestoreSnapshot(request)) is grpc.StatusCode.ALREADY_EXISTS
    request.target = f"{name}-third"
    assert a.stub.RestoreSnapshot(request).collection.points == 1


def test_a_server_that_starts_leaves_what_others_work_at(
    pair: tuple[Replica, Replica],
    another: Callable[..., Replica],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    a, _ = pair
    a.upsert(name, point("a", [1, 0], text="word"))
    store = a.collections.store
    config = a.collections.get(name).row.config
    fresh = a.live.run(store.create(".restoring-fresh", config))
    third = another()
    assert third.near(name, 0, 0) == {"a": [1, 0]}
    assert fresh.id in {r.id for r in a.live.run(store.all())}
    third.upsert(name, point("b", [2, 0], text="word"))
    soon(lambda: a.near(name, 0, 0), {"a": [1, 0], "b": [2, 0]})
    third.live.stop()
    # While it is away, others write; its own index on disk is brought up to that.
    a.remove(name, "a")
    a.upsert(name, point("b", [3, 0], text="word"), point("c", [4, 0], text="word"))
    monkeypatch.setattr("forebay_server.dataplane.collections.RESTORED_S", -1.0)
    third = another(home=third.live.settings.home)
    assert third.near(name, 0, 0) == {"b": [3, 0], "c": [4, 0]}
    third.live.stop()
    assert fresh.id not in {r.id for r in a.live.run(store.all())}
    soon(lambda: fresh.name in {c.name for c in a.collections.all()}, False)


def test_a_database_that_was_away_is_caught_up_with(
    pair: tuple[Replica, Replica], name: str
) -> None:
    a, b = pair
    b.count(name)
    store, end = a.collections.store, asyncio.Event()

    async def away() -> None:
        """Nobody reads the collections, and all connections are cut while they wait for that."""
        async with store._database.begin() as db:
            await db.exec_driver_sql("LOCK TABLE collections IN ACCESS EXCLUSIVE MODE")
            await asyncio.wait_for(end.wait(), 30)
            await db.exec_driver_sql(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE pid <> pg_backend_pid() AND datname = current_database()"
            )

    holding = asyncio.run_coroutine_threadsafe(away(), a.live.loop)
    follower = b.collections.follower
    assert follower is not None
    soon(lambda: follower.behind_s() > 3, True)
    a.live.loop.call_soon_threadsafe(end.set)
    holding.result(30)
    soon(lambda: code_of(lambda: a.upsert(name, point("a", [1, 0]))), grpc.StatusCode.OK)
    soon(lambda: b.near(name, 0, 0), {"a": [1, 0]})
    soon(lambda: follower.behind_s() < 3, True)
