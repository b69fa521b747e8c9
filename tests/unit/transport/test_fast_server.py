"""The extension's server by itself: its addresses, and its end."""

from __future__ import annotations

import contextlib
import importlib.util
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import trustme

if TYPE_CHECKING:
    import forebay_native

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("forebay_native") is None,
    reason="the extension forebay_native is not built (cargo is needed)",
)
METHOD = "/a.B/C"
LOCAL = "127.0.0.1:0"


@contextlib.contextmanager
def serving(*addresses: str, **more: Any) -> Iterator[forebay_native.Server]:
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
        "overload": ("full", b"", 0.1),
        "too_large": b"",
    }
    methods = [(METHOD, [1], False)]
    server = forebay_native.Server(addresses or [LOCAL], methods, "/nowhere", **settings | more)
    try:
        yield server
    finally:
        server.close()


def http(*addresses: str) -> dict[str, object]:
    canned = (503, [], b"")
    return {
        "addresses": addresses,
        "gateway": "/nowhere",
        "routes": [],
        "forwarded": [],
        "aside": [],
        "max_body_bytes": 1000,
        "timeout_s": 1.0,
        "idle_timeout_s": 1.0,
        "unreachable": canned,
        "stalled": canned,
    }


def connections(server: forebay_native.Server, expected: int) -> None:
    """Wait until it has so many."""
    deadline = time.monotonic() + 10
    while server.stats()["connections"] != expected:
        assert time.monotonic() < deadline, server.stats()
        time.sleep(0.01)


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


def test_the_address_that_is_taken_is_the_one_that_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(OSError, match=f"cannot listen on {taken}: "), serving(taken):
            pass
        with pytest.raises(OSError, match=f"cannot listen on {taken}: "), serving(http=http(taken)):
            pass
        with pytest.raises(OSError, match=f"cannot listen on {taken}: "), serving(LOCAL, taken):
            pass


def test_all_addresses_have_one_port_and_share_the_bound_of_connections() -> None:
    both = LOCAL, "127.0.0.2:0"
    with serving(*both, http=http(*both), max_connections=1) as server:
        assert 0 not in (server.port, server.http_port) and server.port != server.http_port
        for port in (server.port, server.http_port):
            with socket.create_connection(("127.0.0.2", port), 10):
                connections(server, 1)
                with socket.create_connection(("127.0.0.1", port), 10) as second:
                    assert second.recv(1) == b"", "one is open"
                connections(server, 1)
            connections(server, 0)


def test_who_leaves_before_it_is_said_whose_it_is_is_named_afterwards() -> None:
    """Another thread may ask for news while this one still reads what it has taken."""
    with serving() as server, grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        leaver = channel.unary_unary(METHOD).future(b"asked", timeout=20)
        (arrival, *_), _ = server.take(1, 10)
        leaver.cancel()
        assert server.take(1, 0.5) == ([], [])
        arrival[0].set_owner("me")
        assert server.take(1, 10) == ([], [("me", "cancelled")])


def test_what_waits_is_refused_by_what_is_said_of_it_alone() -> None:
    """Not by what was said of it before, and lets some of its kind through by now."""
    asked = {
        name: b"\x0a\x01" + name.encode() for name in "ab"
    }  # field 1, which tells queues apart
    with serving() as server, grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        ask = channel.unary_unary(METHOD)

        def taken(name: str) -> tuple[Any, Any]:
            call = ask.future(asked[name], timeout=20)
            (arrival, *_), _ = server.take(1, 10)
            return arrival[0], call

        def refuse(call: Any, hold_s: float) -> None:
            server.refuse_alike(call, hold_s, hold_s / 100, None, False, "full", b"\x08\x08", 0.1)

        # Futures that nobody holds are cancelled, of which `take` would bring the news.
        slow, _held = taken("b")
        refuse(slow, 0.2)
        full, _held_too = taken("a")
        time.sleep(0.3)  # for 0.8 seconds, one is let through every 2 ms
        let_through = ask.future(asked["b"], timeout=20)
        deadline = time.monotonic() + 10
        while server.stats()["waiting_calls"] != 1:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        refuse(full, 10)
        alike = ask.future(asked["a"], timeout=20)
        assert alike.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        (arrival, *_), _ = server.take(1, 10)
        server.answer([(arrival[0], 0, b"told", "", [])])
        assert let_through.result() == b"told"


@contextlib.contextmanager
def websocket(folder: Path, **more: Any) -> Iterator[tuple[Any, socket.socket, socket.socket]]:
    """A server, and both ends of a WebSocket that goes through it: the client's and the gateway's."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "gateway"))
        listener.listen()
        listener.settimeout(10)
        own = http(LOCAL) | {"gateway": listener.getsockname()}
        with (
            serving(http=own, **more) as server,
            socket.create_connection(("127.0.0.1", server.http_port), 10) as client,
        ):
            upgrade = b"Host: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
            client.sendall(b"GET /talk HTTP/1.1\r\n" + upgrade)
            gateway, _ = listener.accept()
            with gateway:
                gateway.settimeout(10)
                assert gateway.recv(65536).startswith(b"GET /talk ")
                gateway.sendall(b"HTTP/1.1 101 Switching Protocols\r\n" + upgrade)
                assert client.recv(65536).startswith(b"HTTP/1.1 101 ")
                client.sendall(b"asked")
                assert gateway.recv(65536) == b"asked"
                gateway.sendall(b"told")
                assert client.recv(65536) == b"told"
                yield server, client, gateway


def test_a_websocket_counts_as_a_connection_until_it_ends(tmp_path: Path) -> None:
    with websocket(tmp_path, max_connections=1) as (server, client, gateway):
        connections(server, 1)
        with socket.create_connection(("127.0.0.1", server.http_port), 10) as second:
            assert second.recv(1) == b"", "one is open"
        client.close()
        assert gateway.recv(1) == b""
        gateway.close()
        connections(server, 0)


def test_a_drain_waits_for_a_websocket_and_closing_ends_it(tmp_path: Path) -> None:
    with websocket(tmp_path) as (server, client, gateway):
        assert not server.drain(0.2)
        client.sendall(b"still here")
        assert gateway.recv(65536) == b"still here"
        server.close()
        assert client.recv(1) == gateway.recv(1) == b""


def test_a_drain_has_ended_when_a_websocket_has(tmp_path: Path) -> None:
    with websocket(tmp_path) as (server, client, gateway):
        ended: list[bool] = []
        draining = threading.Thread(target=lambda: ended.append(server.drain(20)))
        draining.start()
        gateway.close()
        assert client.recv(1) == b""
        client.close()
        draining.join(20)
        assert ended == [True]


def test_a_client_that_stays_when_a_websocket_has_ended_is_cut_off(tmp_path: Path) -> None:
    with websocket(tmp_path) as (server, client, gateway):
        gateway.close()
        assert client.recv(1) == b""
        connections(server, 0)


@pytest.fixture
def certificate() -> tuple[bytes, bytes, None]:
    made = trustme.CA().issue_cert("localhost")
    chain = b"".join(p.bytes() for p in made.cert_chain_pems)
    return chain, made.private_key_pem.bytes(), None


@pytest.mark.parametrize("of_http", [False, True])
def test_handshakes_are_bounded_in_number_and_time_and_drains_do_not_wait_for_them(
    certificate: tuple[bytes, bytes, None], of_http: bool
) -> None:
    tls = {"http_tls" if of_http else "tls": certificate}
    bounds = {"max_connections": 1, "receive_timeout_s": 0.5}
    with serving(http=http(LOCAL), **tls, **bounds) as server:
        place = ("127.0.0.1", server.http_port if of_http else server.port)
        with socket.create_connection(place, 10) as silent:
            connections(server, 1)
            with socket.create_connection(place, 10) as second:
                assert second.recv(1) == b"", "one is open"
            assert silent.recv(1) == b"", "it never said a word"
        connections(server, 0)
    with serving(http=http(LOCAL), receive_timeout_s=60.0, **tls) as server:
        place = ("127.0.0.1", server.http_port if of_http else server.port)
        with socket.create_connection(place, 10) as silent:
            connections(server, 1)
            assert server.drain(10)
            assert silent.recv(1) == b""


def test_each_port_has_a_certificate_of_its_own(certificate: tuple[bytes, bytes, None]) -> None:
    chain, _, _ = certificate
    for name, section in (("tls", "grpc"), ("http_tls", "http")):
        with (
            pytest.raises(ValueError, match=f"^{section}.tls_key: "),
            serving(http=http(LOCAL), **{name: (chain, b"no key", None)}),
        ):
            pass
    with serving(http=http(LOCAL), http_tls=certificate) as server:
        with pytest.raises(ValueError, match=r"^http.tls_certificate: "):
            server.set_tls(b"", certificate[1], http=True)
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with (
            socket.create_connection(("127.0.0.1", server.http_port), 10) as raw,
            context.wrap_socket(raw, suppress_ragged_eofs=False) as secure,
        ):
            secure.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            heard = b""
            while piece := secure.recv(65536):  # raises where the end is not TLS's own
                heard += piece
            assert heard.startswith(b"HTTP/1.1 503 ")  # no gateway is there
        with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            grpc.channel_ready_future(channel).result(10)


def test_only_a_socket_that_was_left_gives_way(tmp_path: Path) -> None:
    path = tmp_path / "server.sock"
    for _ in range(2):  # the second finds what the first has left
        with serving(f"unix:{path}"), grpc.insecure_channel(f"unix:{path}") as channel:
            grpc.channel_ready_future(channel).result(10)
            with pytest.raises(OSError, match="in use"), serving(f"unix:{path}"):
                pass
    file = tmp_path / "notes"
    file.write_text("mine")
    with pytest.raises(OSError, match="in use"), serving(f"unix:{file}"):
        pass
    assert file.read_text() == "mine"
