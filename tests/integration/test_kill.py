"""kill -9 at random moments: nothing acknowledged is lost, nothing is half there.

The server runs as its users run it, but builds, saves and rebuilds its indexes a hundred times more
often, so that kills meet those too. FOREBAY_KILLS sets how often it is killed, 5 by default;
FOREBAY_SEED when.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np
import pytest
from forebay.v1 import collection_pb2 as pb
from forebay.v1.collection_pb2_grpc import CollectionServiceStub
from google.protobuf import json_format

from tests.integration.server_process import SERVE_WITH_CONSTANT_UPKEEP, StartProcess

KILLS = int(os.environ.get("FOREBAY_KILLS", "5"))
#: Points of one group. A write replaces or removes a whole group; all its points carry its number.
GROUP, GROUPS = 7, 60
#: The kinds of index, one collection each; IVF-PQ is trained, and trained again as it grows.
KINDS = {"graph": "INDEX_TYPE_HNSW", "trained": "INDEX_TYPE_IVF_PQ"}
WIDTH = 8


@dataclass
class Expected:
    """What a collection must hold. A group's state is the number of its points, 0 = not there.

    `sent` is the state after the write that was begun last; it is `acked` once that was answered.
    """

    acked: dict[int, int] = field(default_factory=lambda: dict.fromkeys(range(GROUPS), 0))
    sent: dict[int, int] = field(default_factory=lambda: dict.fromkeys(range(GROUPS), 0))


def group_points(group: int, number: int) -> list[pb.Point]:
    rng = np.random.default_rng(number)
    points = []
    for i in range(group * GROUP, group * GROUP + GROUP):
        point = pb.Point(id=f"p{i}", vector=rng.normal(size=WIDTH).tolist())
        point.payload.update({"n": number, "group": group, "text": f"word{number} common"})
        points.append(point)
    return points


class Writer:
    """One thread that writes to one collection until the server dies."""

    def __init__(self, stub, name: str, expected: Expected, seed: str) -> None:
        self.stub, self.name, self.expected = stub, name, expected
        self.chance = random.Random(seed)
        self.stopping = threading.Event()
        self.done: dict[str, int] = {}
        self.snapshots: dict[str, int] = {}
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        kinds = ["upsert"] * 5 + ["stream"] * 3 + ["delete", "delete_by_filter", "snapshot"]
        while not self.stopping.is_set():
            kind = self.chance.choice(kinds)
            try:
                getattr(self, f"_{kind}")()
            except grpc.RpcError:
                return
            self.done[kind] = self.done.get(kind, 0) + 1

    def _begin(self, groups: list[int], number: int) -> None:
        for g in groups:
            self.expected.sent[g] = number

    def _end(self, groups: list[int]) -> None:
        for g in groups:
            self.expected.acked[g] = self.expected.sent[g]

    def _new_number(self) -> int:
        return self.chance.randrange(1, 1 << 40)

    def _upsert(self) -> None:
        group, number = self.chance.randrange(GROUPS), self._new_number()
        self._begin([group], number)
        points = group_points(group, number)
        self.stub.UpsertPoints(
            pb.UpsertPointsRequest(collection=self.name, points=points), timeout=30
        )
        self._end([group])

    def _stream(self) -> None:
        groups = self.chance.sample(range(GROUPS), 8)
        number = self._new_number()

        def messages() -> Iterator[pb.UpsertStreamRequest]:
            yield pb.UpsertStreamRequest(header={"collection": self.name})
            for group in groups:
                points = group_points(group, number)
                yield pb.UpsertStreamRequest(points={"points": points})

        self._begin(groups, number)
        self.stub.UpsertStream(messages(), timeout=30)
        self._end(groups)

    def _delete(self) -> None:
        group = self.chance.randrange(GROUPS)
        self._begin([group], 0)
        ids = [f"p{i}" for i in range(group * GROUP, group * GROUP + GROUP)]
        self.stub.DeletePoints(pb.DeletePointsRequest(collection=self.name, ids=ids), timeout=30)
        self._end([group])

    def _delete_by_filter(self) -> None:
        group = self.chance.randrange(GROUPS)
        self._begin([group], 0)
        request = pb.DeletePointsRequest(collection=self.name)
        condition = {"equals": {"key": "group", "value": group}}
        json_format.ParseDict(condition, request.filter)
        self.stub.DeletePoints(request, timeout=30)
        self._end([group])

    def _snapshot(self) -> None:
        made = self.stub.Snapshot(pb.SnapshotRequest(collection=self.name), timeout=30).snapshot
        self.snapshots[made.name] = made.points
        target = f"copy-{self.chance.randrange(1 << 30)}"
        self.stub.RestoreSnapshot(
            pb.RestoreSnapshotRequest(collection=self.name, snapshot=made.name, target=target),
            timeout=30,
        )
        self.stub.DeleteCollection(pb.DeleteCollectionRequest(collection=target), timeout=30)


def everything(stub, name: str) -> dict[int, set[int]]:
    """Numbers by group, of whole groups. Half a group fails."""
    found: dict[int, list[int]] = {}
    token = ""
    while True:
        request = pb.GetPointsRequest(collection=name, page_size=1000, page_token=token)
        page = stub.GetPoints(request, timeout=30)
        for p in page.points:
            found.setdefault(int(p.id[1:]) // GROUP, []).append(int(p.payload["n"]))
        token = page.next_page_token
        if not token:
            break
    for group, numbers in found.items():
        assert len(numbers) == GROUP and len(set(numbers)) == 1, f"{name} {group}: {numbers}"
    return {g: set(n) for g, n in found.items()}


def check(stub, name: str, expected: Expected) -> None:
    """Stored points and the index agree, and each group has the state of its last acknowledged
    write, or of the one that was cut off before its answer."""
    stored = everything(stub, name)
    for group in range(GROUPS):
        kept = next(iter(stored.get(group, {0})))
        allowed = (expected.acked[group], expected.sent[group])
        assert kept in allowed, f"{name} group {group} has {kept}, not one of {allowed}"
        expected.acked[group] = expected.sent[group] = kept
    for group in random.Random(0).sample(range(GROUPS), 12):
        number = expected.acked[group]
        condition = {"equals": {"key": "group", "value": group}}
        search = pb.SearchRequest(collection=name, vector=[1] * WIDTH, limit=50)
        json_format.ParseDict(condition, search.filter)
        hits = stub.Search(search, timeout=30).hits
        assert {h.id for h in hits} == ids_of(group, number)
        if number:
            words = pb.SearchRequest(collection=name, text=f"word{number}", limit=100)
            words.mode = pb.SEARCH_MODE_KEYWORD
            hits = stub.Search(words, timeout=30).hits
            assert {h.id for h in hits} == {
                i for g, n in expected.acked.items() if n == number for i in ids_of(g, n)
            }
    search = pb.SearchRequest(collection=name, vector=[1] * WIDTH, limit=1000, exact=True)
    hits = stub.Search(search, timeout=30).hits
    assert len(hits) == len({h.id for h in hits}) == GROUP * len(stored)


def ids_of(group: int, number: int) -> set[str]:
    return {f"p{i}" for i in range(group * GROUP, group * GROUP + GROUP)} if number else set()


def check_snapshots(stub, name: str, acked: dict[str, int]) -> None:
    """Every snapshot that was answered is there; the newest restores to whole groups."""
    listed = stub.ListSnapshots(pb.ListSnapshotsRequest(collection=name), timeout=30).snapshots
    have = {s.name: s.points for s in listed}
    assert acked.items() <= have.items()
    collections = stub.ListCollections(pb.ListCollectionsRequest(), timeout=30).collections
    assert {c.name for c in collections} >= set(KINDS)
    for c in collections:  # a restore that was cut off leaves nothing, one that was not is whole
        if c.name not in KINDS:
            everything(stub, c.name)
            stub.DeleteCollection(pb.DeleteCollectionRequest(collection=c.name), timeout=30)
    if listed:
        request = pb.RestoreSnapshotRequest(
            collection=name, snapshot=listed[0].name, target="restored"
        )
        stub.RestoreSnapshot(request, timeout=60)
        assert GROUP * len(everything(stub, "restored")) == listed[0].points
        stub.DeleteCollection(pb.DeleteCollectionRequest(collection="restored"), timeout=30)


def damage(home: Path, chance: random.Random) -> str | None:
    """Change one byte of one file of the saved indexes of KINDS; gives the file's name."""
    files = [p for p in home.glob("collections/[12]/index/*") if p.stat().st_size]
    if not files:
        return None
    path = chance.choice(sorted(files))
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)
    return path.name


@pytest.mark.slow
@pytest.mark.timeout(180 + 30 * KILLS)
def test_kill_9_loses_no_acknowledged_write(tmp_path: Path, start_process: StartProcess) -> None:
    seed = os.environ.get("FOREBAY_SEED", "1")
    chance = random.Random(seed)
    home = tmp_path / "home"
    server = start_process(*SERVE_WITH_CONSTANT_UPKEEP)
    stub = CollectionServiceStub(server.channel)
    for name, kind in KINDS.items():
        request = pb.CreateCollectionRequest(collection=name)
        config = {
            "dimensions": WIDTH,
            "index": {"type": kind, "code_bytes": 2},
            "text_fields": [{"path": "text"}],
        }
        json_format.ParseDict(config, request.config)
        stub.CreateCollection(request)
    expected = {name: Expected() for name in KINDS}
    snapshots: dict[str, dict[str, int]] = {name: {} for name in KINDS}
    done: dict[str, int] = {}
    damaged = 0
    for n in range(KILLS):
        writers = [Writer(stub, c, expected[c], f"{seed}/{n}/{c}") for c in KINDS]
        time.sleep(chance.uniform(0.05, 2.0))
        server.kill()
        for w in writers:
            w.stopping.set()
            w.thread.join(60)
            snapshots[w.name] |= w.snapshots
            for kind, count in w.done.items():
                done[kind] = done.get(kind, 0) + count
        hurt = damage(home, chance) if n % 3 == 2 else None
        before = server.log.stat().st_size
        server = start_process(*SERVE_WITH_CONSTANT_UPKEEP)
        stub = CollectionServiceStub(server.channel)
        if hurt is not None:
            damaged += 1
            said = ""
            until = time.monotonic() + 10  # another thread writes the log
            while "is built anew" not in said and time.monotonic() < until:
                said = server.log.read_bytes()[before:].decode()
            assert "is built anew" in said, f"damage to {hurt} was not noticed: {said}"
        for name in KINDS:
            check(stub, name, expected[name])
            check_snapshots(stub, name, snapshots[name])
    log = server.log.read_text()
    print(f"{KILLS} kills, {damaged} damaged files, answered writes: {done}")
    print({word: log.count(f": {word} took") for word in ("absorb", "rebuild", "save")})
    assert sum(done.values()) > 5 * KILLS
    assert "failed" not in log and "Traceback" not in log, log[-3000:]
