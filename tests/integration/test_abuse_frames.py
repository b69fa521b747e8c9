"""Floods of frames that are cheap to send: memory stays bounded, and nobody else notices.

Each is sent without reading what comes back, as attackers do. The server is this process, so its
memory is ours.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import h2.events
import h2.settings
import hpack
import pytest
from forebay.settings import load_settings
from forebay.v1 import embedding_pb2 as em

from tests.conftest import Live
from tests.integration import test_abuse
from tests.integration.test_abuse import EMBED, GOOD, Client, closed_within, connect, framed

pytestmark = test_abuse.pytestmark
DATA, HEADERS, PRIORITY, RST, SETTINGS, PING, WINDOW_UPDATE, CONTINUATION = 0, 1, 2, 3, 4, 6, 8, 9
END_STREAM, END_HEADERS = 1, 4
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
#: Bytes that a flood may cost; each sends several times as much, or asks for it.
BOUND = 48 << 20


@pytest.fixture(scope="module")
def hardened(embedder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A fast lane that soon notices peers that are gone."""
    values = {
        "home": tmp_path_factory.mktemp("home"),
        "models.root": embedder,
        "grpc.port": 0,
        "grpc.lane": "fast",
        "grpc.receive_timeout_s": 1.0,
        "grpc.keepalive_s": 1.0,
        "grpc.keepalive_timeout_s": 1.0,
        "grpc.max_connections": 50,
    }
    live = Live(load_settings(values, environ={}).settings)
    ask(live)
    yield live
    live.stop()


def ask(live: Live) -> None:
    with grpc.insecure_channel(live.target) as channel:
        answer = channel.unary_unary(EMBED)(GOOD, timeout=10, wait_for_ready=True)
    assert len(em.EmbedResponse.FromString(answer).embeddings[0].values) == 384


@pytest.fixture(autouse=True)
def bounded(hardened: Live) -> Iterator[None]:
    """Afterwards memory has not grown, nothing is held, and others are served."""
    before = resident()
    yield
    ask(hardened)
    assert resident() - before < BOUND
    until = time.monotonic() + 10
    while (stats := hardened.server.lanes.stats())["held_bytes"] or stats["waiting_calls"]:
        assert time.monotonic() < until, stats
        time.sleep(0.02)


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def opened(live: Live) -> socket.socket:
    """A connection that has said hello, and reads nothing."""
    peer = connect(live)
    peer.sendall(PREFACE + frame(SETTINGS, 0, 0))
    return peer


def block(live: Live, *more: tuple[str, str]) -> bytes:
    """A header block of a good call."""
    fields = [
        (":method", "POST"),
        (":scheme", "http"),
        (":authority", live.target),
        (":path", EMBED),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
        *more,
    ]
    return hpack.Encoder().encode(fields)


def flood(peer: socket.socket, piece: bytes, times: int, seconds: float = 5.0) -> bool:
    """Send a piece over and over. True when the server hung up; it may as well stop to read."""
    until = time.monotonic() + seconds
    peer.settimeout(0.5)
    try:
        for _ in range(times):
            peer.sendall(piece)
            if time.monotonic() > until:
                break
    except TimeoutError:
        return False  # it reads no more: what it has not read costs it nothing
    except OSError:
        return True
    return closed_within(peer, 0.3)


def test_continuations_without_end_are_cut_off(hardened: Live) -> None:
    peer = opened(hardened)
    peer.sendall(frame(HEADERS, 0, 1, block(hardened)))
    more = hpack.Encoder().encode([("x-more", "a" * 4000)])
    assert flood(peer, frame(CONTINUATION, 0, 1, more) * 16, 2000), "it goes on reading headers"


def test_empty_continuations_are_cut_off(hardened: Live) -> None:
    peer = opened(hardened)
    peer.sendall(frame(HEADERS, 0, 1, block(hardened)))
    assert flood(peer, frame(CONTINUATION, 0, 1) * 1000, 500), "it goes on reading nothing"


def test_a_header_table_bomb_is_refused(hardened: Live) -> None:
    """One kilobyte in the table, named by one byte each, makes 16 MB of headers."""
    peer = opened(hardened)
    encoder = hpack.Encoder()
    first = encoder.encode([("x-bomb", "a" * 3000)])
    again = encoder.encode([("x-bomb", "a" * 3000)])
    assert len(again) == 1
    with contextlib.suppress(OSError):  # it may hang up at the first
        for stream in range(1, 41, 2):
            bomb = block(hardened) + (first if stream == 1 else b"") + again * 5000
            peer.sendall(frame(HEADERS, END_HEADERS | END_STREAM, stream, bomb))
    assert closed_within(peer, 2)


def test_many_small_headers_are_refused(hardened: Live) -> None:
    client = Client(hardened)
    many = [(f"x-{i}", "a") for i in range(3000)]
    client.h2.send_headers(1, client.headers(*many), end_stream=True)
    with contextlib.suppress(OSError):  # it may hang up on so many
        client.flush()
        for event in client.events(3):
            if isinstance(event, h2.events.ResponseReceived):
                assert dict(event.headers)[b":status"] == b"431"
    client.socket.close()


@pytest.mark.parametrize(
    ("name", "piece"),
    [
        ("ping", frame(PING, 0, 0, b"12345678")),
        ("settings", frame(SETTINGS, 0, 0)),
        ("settings that change", frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 70_000))),
        ("priority", frame(PRIORITY, 0, 1, struct.pack(">IB", 0, 1))),
        ("window", frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 1))),
        ("unknown", frame(0x77, 0, 0, b"x" * 100)),
    ],
)
def test_floods_of_control_frames_are_bounded(hardened: Live, name: str, piece: bytes) -> None:
    flood(opened(hardened), piece * 1000, 200, 2.0)


def test_a_flood_of_empty_data_is_given_up(hardened: Live) -> None:
    peer = opened(hardened)
    peer.sendall(frame(HEADERS, END_HEADERS, 1, block(hardened)))
    flood(peer, frame(DATA, 0, 1) * 1000, 500, 2.0)


def test_streams_opened_and_left_are_bounded(hardened: Live) -> None:
    """More calls at once than a connection may have, none of which ever gets its message."""
    peer = opened(hardened)
    with contextlib.suppress(OSError):  # it may hang up on so many
        for stream in range(1, 8001, 2):
            peer.sendall(frame(HEADERS, END_HEADERS, stream, block(hardened)))
    closed_within(peer, 0.5)
    peer.close()


def test_a_reset_for_each_call_with_its_message_is_bounded(hardened: Live) -> None:
    peer = opened(hardened)
    head, body = block(hardened), framed(GOOD)
    reset = struct.pack(">I", 8)
    with contextlib.suppress(OSError):  # it may hang up on so many
        for stream in range(1, 20_001, 2):
            peer.sendall(
                frame(HEADERS, END_HEADERS, stream, head)
                + frame(DATA, END_STREAM, stream, body)
                + frame(RST, 0, stream, reset)
            )
    closed_within(peer, 0.5)
    peer.close()


def test_a_window_beyond_its_greatest_ends_the_connection(hardened: Live) -> None:
    peer = opened(hardened)
    peer.sendall(frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 0x7FFFFFFF)))
    assert closed_within(peer, 3)


def test_data_on_a_stream_that_was_never_opened_ends_the_connection(hardened: Live) -> None:
    peer = opened(hardened)
    peer.sendall(frame(DATA, 0, 9, b"x"))
    assert closed_within(peer, 3)


def test_answers_that_nobody_reads_are_held_back_and_let_go(hardened: Live) -> None:
    """A window of 0: the server may not send. Its answers go with the connection."""
    client = Client(hardened)
    client.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 0})
    for stream in range(1, 201, 2):
        client.h2.send_headers(stream, client.headers())
        client.h2.send_data(stream, framed(GOOD), end_stream=True)
    client.flush()
    ended = [e for e in client.events(2) if isinstance(e, h2.events.StreamEnded)]
    assert not ended
    client.socket.close()


@pytest.mark.parametrize("port", ["grpc", "http"])
def test_a_peer_that_takes_no_answers_is_let_go(hardened: Live, port: str) -> None:
    """Its kernel acknowledges and says that there is no room. The server's would ask it for minutes,
    after the connection's close too, and for ever on HTTP, which has no PING."""
    with socket.socket() as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        if port == "grpc":
            peer.connect(("127.0.0.1", hardened.server.port))
            wide = frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 0x7FFFFFFF))
            peer.sendall(PREFACE + wide + frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 1 << 30)))
            head, body = block(hardened), framed(GOOD)
            for stream in range(1, 401, 2):
                peer.sendall(frame(HEADERS, END_HEADERS, stream, head))
                peer.sendall(frame(DATA, END_STREAM, stream, body))
        else:
            peer.connect(("127.0.0.1", hardened.server.lanes.http_port))
            request = (
                b"POST /v1/embeddings HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
            )
            text = b'{"model": "minilm", "input": "hello"}'
            peer.sendall((request + b"content-length: %d\r\n\r\n" % len(text) + text) * 200)
        ends = peer.getpeername()[1], peer.getsockname()[1]
        assert kernel_knows(*ends)
        until = time.monotonic() + 15
        while kernel_knows(*ends):
            assert time.monotonic() < until, "its connection is kept"
            time.sleep(0.1)


def kernel_knows(server: int, peer: int) -> bool:
    """Whether the server's end of a connection is there, closed by the server or not."""
    rows = [line.split()[1:3] for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    ends = f":{server:04X}", f":{peer:04X}"
    return any(local.endswith(ends[0]) and remote.endswith(ends[1]) for local, remote in rows)


def test_a_peer_that_is_gone_without_a_word_is_noticed(hardened: Live) -> None:
    """Half-open: it answers no PING. The kernel would keep such a connection for ever."""
    peer = opened(hardened)
    begun = time.monotonic()
    assert closed_within(peer, 6)
    assert time.monotonic() - begun > 0.9, "it was closed before it could have been asked"


def test_headers_that_trickle_in_are_given_up(hardened: Live) -> None:
    """Slowloris: a header block of a byte at a time, PINGs unanswered."""
    peer = opened(hardened)
    data = frame(HEADERS, END_HEADERS, 1, block(hardened))
    peer.settimeout(0.01)
    until = time.monotonic() + 8
    try:
        for i in range(len(data) - 1):
            peer.sendall(data[i : i + 1])
            time.sleep(0.2)
            if time.monotonic() > until:
                break
    except OSError:
        return
    assert closed_within(peer, 1), "it waits as long as the client likes"


def test_a_body_that_trickles_in_is_given_up(hardened: Live) -> None:
    client = Client(hardened)
    client.h2.send_headers(1, client.headers())
    body = framed(GOOD)
    seen: list[bytes | None] = []
    for i in range(12):
        client.h2.send_data(1, body[i : i + 1])
        client.flush()
        for event in client.events(0.2):
            if isinstance(event, h2.events.ResponseReceived):
                seen.append(dict(event.headers).get(b"grpc-status"))
        if seen:
            break
    assert seen == [b"4"]
    client.socket.close()
