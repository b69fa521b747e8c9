"""What hostile and broken clients do to the fast lane: bounded, and nobody else notices."""

from __future__ import annotations

import contextlib
import gzip
import importlib.util
import socket
import ssl
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import h2.config
import h2.connection
import h2.events
import h2.exceptions
import pytest
import trustme
from forebay.settings import load_settings
from forebay.v1 import embedding_pb2 as em

from tests.conftest import Live

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("forebay_native") is None,
    reason="the extension forebay_native is not built (cargo is needed)",
)
EMBED = "/forebay.v1.EmbeddingService/Embed"
GOOD = em.EmbedRequest(texts=["hello"]).SerializeToString()
TIMEOUT_S = 1.0


@pytest.fixture(scope="module")
def hardened(embedder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A fast lane with short timeouts and small bounds."""
    values = {
        "home": tmp_path_factory.mktemp("home"),
        "models.root": embedder,
        "grpc.port": 0,
        "grpc.lane": "fast",
        "grpc.receive_timeout_s": TIMEOUT_S,
        "grpc.max_connections": 20,
        "grpc.max_waiting_bytes": 1 << 20,
    }
    live = Live(load_settings(values, environ={}).settings)
    yield live
    live.stop()


@pytest.fixture(autouse=True)
def others_are_served(hardened: Live) -> Iterator[None]:
    yield
    with grpc.insecure_channel(hardened.target) as channel:
        answer = channel.unary_unary(EMBED)(GOOD, timeout=10, wait_for_ready=True)
    assert len(em.EmbedResponse.FromString(answer).embeddings[0].values) == 384
    stats = hardened.server.lanes.stats()
    assert stats["held_bytes"] == 0
    assert stats["waiting_calls"] == 0


def connect(live: Live) -> socket.socket:
    made = socket.create_connection(("127.0.0.1", live.server.port), timeout=10)
    made.settimeout(10)
    return made


def closed_within(peer: socket.socket, seconds: float) -> bool:
    """Whether the server ends the connection in time; reads what it still says."""
    peer.settimeout(seconds)
    try:
        while peer.recv(65536):
            pass
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


class Client:
    """HTTP/2 by hand."""

    def __init__(self, live: Live) -> None:
        self.socket = connect(live)
        config = h2.config.H2Configuration(validate_outbound_headers=False)
        self.h2 = h2.connection.H2Connection(config)
        self.h2.initiate_connection()
        self.flush()
        self.target = live.target

    def flush(self) -> None:
        self.socket.sendall(self.h2.data_to_send())

    def headers(self, *more: tuple[str, str], path: str = EMBED) -> list[tuple[str, str]]:
        return [
            (":method", "POST"),
            (":scheme", "http"),
            (":authority", self.target),
            (":path", path),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
            *more,
        ]

    def events(self, seconds: float = 5) -> Iterator[h2.events.Event]:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.socket.settimeout(max(0.01, until - time.monotonic()))
            try:
                data = self.socket.recv(65536)
            except (TimeoutError, OSError):
                return
            if not data:
                return
            yield from self.h2.receive_data(data)
            self.flush()


def framed(message: bytes, flag: int = 0, length: int | None = None) -> bytes:
    return struct.pack(">BI", flag, len(message) if length is None else length) + message


def test_garbage_instead_of_http2(hardened: Live) -> None:
    for words in (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"\x16\x03\x01" + b"\0" * 60, b"\0" * 99):
        peer = connect(hardened)
        peer.sendall(words)
        assert closed_within(peer, 5)


def test_a_connection_that_never_speaks_is_closed(hardened: Live) -> None:
    silent, slow = connect(hardened), connect(hardened)
    slow.sendall(b"PRI * HTTP/2.0")
    assert closed_within(silent, TIMEOUT_S + 3)
    assert closed_within(slow, TIMEOUT_S + 3)


def test_a_message_that_never_ends_is_given_up(hardened: Live) -> None:
    client = Client(hardened)
    client.h2.send_headers(1, client.headers())
    client.h2.send_data(1, framed(GOOD)[:4])
    client.flush()
    statuses = [
        dict(e.headers).get(b"grpc-status")
        for e in client.events(TIMEOUT_S + 3)
        if isinstance(e, h2.events.ResponseReceived | h2.events.TrailersReceived)
    ]
    assert b"4" in statuses


def test_a_length_that_lies_reserves_nothing(hardened: Live) -> None:
    client = Client(hardened)
    for stream in range(1, 41, 2):  # 20 x 16 MB said, nothing sent
        client.h2.send_headers(stream, client.headers())
        client.h2.send_data(stream, framed(b"", length=16_000_000))
    client.flush()
    refused = [
        e
        for e in client.events(2)
        if isinstance(e, h2.events.ResponseReceived) and (b"grpc-status", b"8") in e.headers
    ]
    assert len(refused) == 20
    client.socket.close()


def test_lengths_that_are_said_keep_nobody_out(hardened: Live) -> None:
    """Together they say more than may be held (1 MB), and send five bytes each."""
    client = Client(hardened)
    sizes = [(1 << 20) >> n for n in range(1, 20)] * 2
    for stream, size in zip(range(1, 80, 2), sizes, strict=False):
        client.h2.send_headers(stream, client.headers())
        client.h2.send_data(stream, framed(b"", length=size))
    client.flush()
    until = time.monotonic() + 5
    while not hardened.server.lanes.stats()["held_bytes"]:
        assert time.monotonic() < until
        time.sleep(0.01)
    with grpc.insecure_channel(hardened.target) as channel:
        assert channel.unary_unary(EMBED)(GOOD, timeout=5)
    client.socket.close()
    while hardened.server.lanes.stats()["held_bytes"]:
        assert time.monotonic() < until
        time.sleep(0.01)


def test_messages_that_unpack_to_much_hold_nobody_up(hardened: Live) -> None:
    """15 KB become 15 MB each, and are refused for it. What came after them need not wait for all."""
    client = Client(hardened)
    for _ in client.events():  # until the server's windows are known
        if client.h2.outbound_flow_control_window >= 1 << 20:
            break
    bomb = framed(gzip.compress(bytes(15_000_000), mtime=0), flag=1)
    bombs = range(1, 41, 2)
    for stream in bombs:
        client.h2.send_headers(stream, client.headers(("grpc-encoding", "gzip")))
        client.h2.send_data(stream, bomb, end_stream=True)
    client.h2.send_headers(41, client.headers())
    client.h2.send_data(41, framed(GOOD), end_stream=True)
    client.flush()
    ended: list[int] = []
    for event in client.events(20):
        if isinstance(event, h2.events.StreamEnded):
            ended.append(event.stream_id or 0)
            if len(ended) == len(bombs) + 1:
                break
    assert sorted(ended) == [*bombs, 41]
    assert ended.index(41) < len(bombs) / 2
    client.socket.close()
    until = time.monotonic() + 5
    while hardened.server.lanes.stats()["held_bytes"]:
        assert time.monotonic() < until
        time.sleep(0.01)


def test_rapid_resets_end_the_connection(hardened: Live) -> None:
    client = Client(hardened)
    try:
        for stream in range(1, 40_001, 2):
            client.h2.send_headers(stream, client.headers())
            client.h2.reset_stream(stream)
            if stream % 200 == 1:
                client.flush()
    except OSError:
        return  # it has hung up on us
    ended = [e for e in client.events() if isinstance(e, h2.events.ConnectionTerminated)]
    assert ended or closed_within(client.socket, 1)


def test_resets_after_the_request_leave_nothing_behind(hardened: Live) -> None:
    client = Client(hardened)
    with contextlib.suppress(OSError):  # it may hang up on a client that does this too often
        for stream in range(1, 401, 2):
            client.h2.send_headers(stream, client.headers())
            client.h2.send_data(stream, framed(GOOD), end_stream=True)
            if stream % 20 == 1:
                client.flush()
                time.sleep(0.002)
            client.h2.reset_stream(stream)
        client.flush()
    client.socket.close()
    until = time.monotonic() + 10
    while hardened.server.lanes.stats()["held_bytes"]:
        assert time.monotonic() < until
        time.sleep(0.01)


def test_headers_beyond_the_bound_are_refused(hardened: Live) -> None:
    client = Client(hardened)
    client.h2.send_headers(1, client.headers(("x-large", "a" * 60_000)), end_stream=True)
    client.flush()
    seen = [
        dict(e.headers).get(b":status")
        for e in client.events(3)
        if isinstance(e, h2.events.ResponseReceived)
    ]
    assert seen in ([], [b"431"])


def test_a_frame_beyond_the_bound_ends_the_connection(hardened: Live) -> None:
    client = Client(hardened)
    client.h2.send_headers(1, client.headers())
    client.flush()
    size = 1 << 20
    client.socket.sendall(size.to_bytes(3, "big") + b"\0\0" + (1).to_bytes(4, "big"))
    assert closed_within(client.socket, 5)


def test_what_is_no_grpc_is_told_so(hardened: Live) -> None:
    for change in ({"content-type": "text/html"}, {":method": "GET"}):
        client = Client(hardened)
        headers = [(k, change.get(k, v)) for k, v in client.headers()]
        client.h2.send_headers(1, headers, end_stream=True)
        client.flush()
        first = next(e for e in client.events() if isinstance(e, h2.events.ResponseReceived))
        assert dict(first.headers)[b":status"] == b"415"


@pytest.mark.parametrize("path", [EMBED, "/forebay.v1.ServerService/GetServerInfo"])
@pytest.mark.parametrize("without", [":authority", "te"])
def test_headers_that_matter_to_proxies_may_be_missing(
    hardened: Live, path: str, without: str
) -> None:
    """On both ways: calls that are answered here, and those that are passed on."""
    client = Client(hardened)
    client.h2.send_headers(1, [h for h in client.headers(path=path) if h[0] != without])
    client.h2.send_data(1, framed(GOOD if path == EMBED else b""), end_stream=True)
    client.flush()
    told = (
        dict(e.headers).get(b"grpc-status")
        for e in client.events()
        if isinstance(e, h2.events.ResponseReceived | h2.events.TrailersReceived)
    )
    assert next(filter(None, told)) == b"0"
    client.socket.close()


def test_connections_beyond_the_bound_are_refused(hardened: Live) -> None:
    held = [Client(hardened) for _ in range(20)]
    time.sleep(0.1)
    assert closed_within(connect(hardened), 3)
    for client in held:
        client.socket.close()


def test_tls_certificates_of_clients_and_renewal(embedder: Path, tmp_path: Path) -> None:
    authority, stranger = trustme.CA(), trustme.CA()

    def write(ca: trustme.CA) -> None:
        server = ca.issue_cert("localhost", "127.0.0.1")
        server.private_key_pem.write_to_path(tmp_path / "key.pem")
        (tmp_path / "cert.pem").write_bytes(b"".join(p.bytes() for p in server.cert_chain_pems))

    write(authority)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    values = {
        "home": tmp_path / "home",
        "models.root": embedder,
        "grpc.port": 0,
        "grpc.lane": "fast",
        "grpc.tls_certificate": tmp_path / "cert.pem",
        "grpc.tls_key": tmp_path / "key.pem",
        "grpc.tls_client_ca": tmp_path / "ca.pem",
        "grpc.tls_reload_s": 0.1,
    }
    live = Live(load_settings(values, environ={}).settings)
    target = f"localhost:{live.server.port}"

    def credentials(roots: trustme.CA, issuer: trustme.CA | None) -> grpc.ChannelCredentials:
        if issuer is None:
            return grpc.ssl_channel_credentials(roots.cert_pem.bytes())
        mine = issuer.issue_cert("client")
        chain = b"".join(p.bytes() for p in mine.cert_chain_pems)
        key = mine.private_key_pem.bytes()
        return grpc.ssl_channel_credentials(roots.cert_pem.bytes(), key, chain)

    def embed(roots: trustme.CA, issuer: trustme.CA | None) -> bool:
        with grpc.secure_channel(target, credentials(roots, issuer)) as channel:
            try:
                return bool(channel.unary_unary(EMBED)(GOOD, timeout=5))
            except grpc.RpcError:
                return False

    try:
        assert embed(authority, authority)
        assert not embed(authority, None), "a client without a certificate got in"
        assert not embed(authority, stranger), "a stranger's certificate got in"
        write(stranger)
        until = time.monotonic() + 10
        while not embed(stranger, authority):
            assert time.monotonic() < until, "the new certificate is not served"
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_alpn_protocols(["h2"])
        with (
            socket.create_connection(("localhost", live.server.port)) as raw,
            context.wrap_socket(raw, server_hostname="localhost") as secure,
        ):
            assert secure.selected_alpn_protocol() == "h2"
    finally:
        live.stop()
