"""kill -9 at random moments: nothing acknowledged is lost, nothing is half there.

FOREBAY_KILLS sets how often the server is killed, 10 by default; FOREBAY_SEED when.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
import pytest
from forebay.v1 import collection_pb2 as pb
from forebay.v1 import collection_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

KILLS = int(os.environ.get("FOREBAY_KILLS", "10"))
#: Points of one write; all carry the write's number.
GROUP = 7


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Process:
    """`forebay serve` as its users run it."""

    def __init__(self, home: Path) -> None:
        port = free_port()
        environ = {
            **{k: v for k, v in os.environ.items() if not k.startswith("FOREBAY_")},
            "FOREBAY_HOME": str(home),
            "FOREBAY_GRPC_PORT": str(port),
            "FOREBAY_MODELS__STARTERS": "false",
            "FOREBAY_OBSERVABILITY__LOG_LEVEL": "ERROR",
            "FOREBAY_OBSERVABILITY__ACCESS_LOG": "false",
        }
        command = [sys.executable, "-m", "forebay_cli", "serve"]
        self.process = subprocess.Popen(command, env=environ)
        self.channel = grpc.insecure_channel(f"127.0.0.1:{port}")
        self.stub = collection_pb2_grpc.CollectionServiceStub(self.channel)
        check = health_pb2_grpc.HealthStub(self.channel).Check
        deadline = time.monotonic() + 240
        while True:
            try:
                if check(health_pb2.HealthCheckRequest(), timeout=5).status == 1:
                    return
            except grpc.RpcError:
                pass
            assert self.process.poll() is None, "the server ended by itself"
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(30)
        self.channel.close()


def write(stub, number: int, ids: list[int]) -> None:
    request = pb.UpsertPointsRequest(collection="c")
    for i in ids:
        point = request.points.add(id=f"p{i}", vector=[number, i, 1, 0])
        point.payload.update({"n": number, "text": f"word{number} common"})
    stub.UpsertPoints(request, timeout=30)


@pytest.mark.slow
@pytest.mark.timeout(120 + 15 * KILLS)
def test_kill_9_loses_no_acknowledged_write(tmp_path: Path) -> None:
    chance = random.Random(os.environ.get("FOREBAY_SEED", "1"))
    server = Process(tmp_path)
    server.stub.CreateCollection(
        pb.CreateCollectionRequest(
            collection="c", config={"dimensions": 4, "text_fields": [{"path": "text"}]}
        )
    )
    # Group g holds points g*7..g*7+6. `sent` and `acked` are numbers of its newest writes.
    sent: dict[int, int] = {}
    acked: dict[int, int] = {}
    number = 0
    for _ in range(KILLS):
        stopping = threading.Event()

        def writer(stub=server.stub, stopping=stopping) -> None:
            nonlocal number
            while not stopping.is_set():
                number += 1
                group = chance.randrange(40)
                ids = list(range(group * GROUP, group * GROUP + GROUP))
                sent[group] = number
                try:
                    write(stub, number, ids)
                except grpc.RpcError:
                    return
                acked[group] = number

        thread = threading.Thread(target=writer)
        thread.start()
        time.sleep(chance.uniform(0.05, 0.8))
        server.kill()
        stopping.set()
        thread.join(30)
        server = Process(tmp_path)
        check(server.stub, sent, acked)
    server.kill()
    assert len(acked) > 5


def check(stub, sent: dict[int, int], acked: dict[int, int]) -> None:
    """Stored points and the index agree; each group has one number: the acknowledged one, or that
    of a write that was cut off before its answer."""
    stored: dict[int, set[int]] = {}
    count = 0
    token = ""
    while True:
        page = stub.GetPoints(pb.GetPointsRequest(collection="c", page_size=1000, page_token=token))
        for p in page.points:
            stored.setdefault(int(p.id[1:]) // GROUP, set()).add(int(p.payload["n"]))
            count += 1
        token = page.next_page_token
        if not token:
            break
    for group, numbers in stored.items():
        assert len(numbers) == 1, f"group {group} is half written: {numbers}"
        (kept,) = numbers
        assert kept in (acked.get(group), sent[group])
        found = stub.Search(
            pb.SearchRequest(
                collection="c", text=f"word{kept}", mode=pb.SEARCH_MODE_KEYWORD, limit=20
            )
        ).hits
        assert {int(h.id[1:]) // GROUP for h in found} == {group} and len(found) == GROUP
        acked[group] = sent[group] = kept
    assert set(acked) == set(stored)
    assert count == GROUP * len(stored)
    everything = stub.Search(pb.SearchRequest(collection="c", vector=[1, 1, 1, 0], limit=1000))
    assert len(everything.hits) == count
