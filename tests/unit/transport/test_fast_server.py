"""The extension's server by itself: its end."""

from __future__ import annotations

import contextlib
import importlib.util
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import grpc
import pytest

if TYPE_CHECKING:
    import forebay_native

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("forebay_native") is None,
    reason="the extension forebay_native is not built (cargo is needed)",
)
METHOD = "/a.B/C"
LOCAL = "127.0.0.1:0"


@contextlib.contextmanager
def serving(address: str = LOCAL, **more: Any) -> Iterator[forebay_native.Server]:
    import forebay_native

    settings: dict[str, Any] = {
        "threads": 1,
        "max_message_bytes": 1 << 20,
        "max_header_bytes": 16 << 10,
        "max_connections": 10,
        "max_streams": 10,
        "max_waiting_calls": 10,
        "max_waiting_bytes": 1 << 20,
        "max_waiting_s": 10.0,
        "keepalive_s": 60.0,
        "keepalive_timeout_s": 20.0,
        "max_age_s": 0.0,
        "age_grace_s": 5.0,
        "receive_timeout_s": 5.0,
        "overload": ("full", b""),
    }
    server = forebay_native.Server(address, [(METHOD, [], False)], "/nowhere", **settings | more)
    try:
        yield server
    finally:
        server.close()


def test_a_connection_that_grows_old_in_a_drain_still_gets_its_answers() -> None:
    age = 1.0
    with (
        serving(max_age_s=age) as server,
        grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        answer = channel.unary_unary(METHOD).future(b"asked", timeout=20)
        (arrival, *_), _ = server.take(1, 10)
        ended: list[bool] = []
        draining = threading.Thread(target=lambda: ended.append(server.drain(20)))
        draining.start()
        time.sleep(age * 1.1 + 0.3)  # ages differ by a tenth
        server.answer([(arrival[0], 0, b"told", "", [])])
        assert answer.result() == b"told"
        draining.join(20)
        assert ended == [True]
