"""The loop of an engine's process: what it takes, and when it begins."""

from __future__ import annotations

import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forebay_server.generation
import msgspec
import pytest

sys.path.insert(0, str(Path(forebay_server.generation.__file__).parent / "workers"))
from forebay_worker.loop import GATHER_S, Link, together


def frame(message: dict[str, Any]) -> bytes:
    data = msgspec.msgpack.encode(message)
    return struct.pack("<I", len(data)) + data


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, Link]]:
    near, far = socket.socketpair()
    yield far, Link(near)
    near.close()
    far.close()


def test_requests_that_come_together_begin_together(ends: tuple[socket.socket, Link]) -> None:
    far, link = ends
    for i in range(5):
        far.sendall(frame({"op": "generate", "i": i}))
    assert [c["i"] for c in together(link)] == [0, 1, 2, 3, 4]


def test_an_idle_engine_does_not_wait_for_ever(ends: tuple[socket.socket, Link]) -> None:
    far, link = ends
    done = threading.Event()

    def flood() -> None:
        while not done.wait(0.0002):
            far.sendall(frame({"op": "generate"}))

    flooding = threading.Thread(target=flood)
    flooding.start()
    try:
        started = time.monotonic()
        first = together(link)
        took = time.monotonic() - started
    finally:
        done.set()
        flooding.join()
    assert first
    assert took < 20 * GATHER_S  # a busy machine is no fault


def test_other_commands_are_not_waited_behind(ends: tuple[socket.socket, Link]) -> None:
    far, link = ends
    far.sendall(frame({"op": "stats"}))
    assert [c["op"] for c in together(link)] == ["stats"]


def test_a_server_that_is_gone_ends_the_loop(ends: tuple[socket.socket, Link]) -> None:
    far, link = ends
    far.close()
    with pytest.raises(EOFError):
        together(link)
