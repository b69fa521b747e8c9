"""HTTPS: the HTTP port with a certificate, where the server has the port and where the gateway has it."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest
import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from forebay_cli.up import free_port
from websockets.sync.client import connect

from tests.conftest import copy_models

pytestmark = pytest.mark.timeout(180)
EXTENDED = pytest.mark.skipif(
    importlib.util.find_spec("forebay_native") is None,
    reason="the extension forebay_native is not built (cargo is needed)",
)
IRIS = {"sepal_length": 5, "sepal_width": 3, "petal_length": 1, "petal_width": 0.2}
#: Who has the port: the server itself, the gateway, several gateways.
DOORS = {
    "direct": {"FOREBAY_GRPC__LANE": "fast"},
    "gateway": {"FOREBAY_HTTP__DIRECT": "false"},
    "workers": {"FOREBAY_HTTP__WORKERS": "2"},
}


@dataclass
class Door:
    """A running `forebay up`, what it said, and who vouches for its certificate."""

    folder: Path
    process: subprocess.Popen[str]
    port: int
    authority: trustme.CA
    said: str = ""

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}"

    def context(self, client: trustme.CA | None = None) -> ssl.SSLContext:
        context = ssl.create_default_context()
        self.authority.configure_trust(context)
        if client is not None:
            client.issue_cert("client.example.com").configure_cert(context)
        return context

    def client(self, own: trustme.CA | None = None) -> httpx.Client:
        return httpx.Client(base_url=self.url, verify=self.context(own), timeout=60)


def write(folder: Path, authority: trustme.CA) -> None:
    """A certificate and its key, each put into the other's place at once."""
    made = authority.issue_cert("localhost", "127.0.0.1")
    chain = b"".join(p.bytes() for p in made.cert_chain_pems)
    for name, data in (("key.pem", made.private_key_pem.bytes()), ("cert.pem", chain)):
        (folder / f"{name}.new").write_bytes(data)
        os.replace(folder / f"{name}.new", folder / name)


def environ(folder: Path, port: int, **more: str) -> dict[str, str]:
    return {
        **{k: v for k, v in os.environ.items() if not k.startswith("FOREBAY_")},
        "FOREBAY_HOME": str(folder / "home"),
        "FOREBAY_GRPC_PORT": str(free_port()),
        "FOREBAY_HTTP_PORT": str(port),
        "FOREBAY_MODELS__ROOT": str(folder / "models"),
        "FOREBAY_MODELS__STARTERS": "false",
        "FOREBAY_HTTP__TLS_CERTIFICATE": str(folder / "cert.pem"),
        "FOREBAY_HTTP__TLS_KEY": str(folder / "key.pem"),
        "FOREBAY_HTTP__TLS_RELOAD_S": "0.1",
        **more,
    }


@contextlib.contextmanager
def up(starters: Path, folder: Path, **more: str) -> Iterator[Door]:
    copy_models(starters, folder / "models", "iris", "minilm")
    authority = trustme.CA()
    write(folder, authority)
    port = free_port()
    command = [sys.executable, "-m", "forebay_cli", "up"]
    with subprocess.Popen(
        command, env=environ(folder, port, **more), stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            door = Door(folder, process, port, authority)
            assert process.stdout is not None
            for line in process.stdout:
                door.said += line
                if line.startswith("Ctrl-C"):
                    break
            assert door.said.startswith("Forebay is ready"), door.said
            yield door
        finally:
            process.terminate()
            process.communicate(timeout=60)


@pytest.fixture(
    scope="module", params=[pytest.param("direct", marks=EXTENDED), "gateway", "workers"]
)
def door(
    request: pytest.FixtureRequest, starters: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Door]:
    with up(starters, tmp_path_factory.mktemp("tls"), **DOORS[request.param]) as running:
        yield running


def test_a_rest_call_and_what_up_says(door: Door) -> None:
    assert f"  REST     https://127.0.0.1:{door.port}/api/v1\n" in door.said
    with door.client() as client:
        for _ in range(2):  # the second on the same connection
            answer = client.post("/api/v1/tabular:predict", json={"model": "iris", "rows": [IRIS]})
            assert answer.json()["predictions"][0]["label"] == "setosa"
        assert client.get("/readyz").status_code == 200
        long = client.post(
            "/api/v1/embeddings:embed", json={"model": "minilm", "texts": ["a " * 50] * 200}
        )
        assert len(long.json()["embeddings"]) == 200


def test_strangers_are_not_trusted(door: Door) -> None:
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(f"{door.url}/readyz", timeout=30)


def test_the_openai_sdk(door: Door) -> None:
    with (
        openai.DefaultHttpxClient(verify=door.context()) as http,
        openai.OpenAI(base_url=f"{door.url}/v1", api_key="none", http_client=http) as client,
    ):
        made = client.embeddings.create(model="minilm", input=["a", "b"])
        assert [len(d.embedding) for d in made.data] == [384, 384]
        assert {m.id for m in client.models.list()} >= {"minilm"}


def test_a_stream_comes_as_it_is_made(door: Door) -> None:
    with (
        door.client() as client,
        client.stream("GET", "/api/v1/models:watch", params={"model": "iris"}) as stream,
    ):
        assert stream.headers["content-type"].startswith("text/event-stream")
        assert "iris" in next(stream.iter_lines())  # and it goes on


def test_a_websocket(door: Door) -> None:
    url = f"wss://localhost:{door.port}/api/v1/embeddings:embedStream"
    with connect(url, ssl=door.context()) as websocket:
        for text in ("one", "two"):
            websocket.send(json.dumps({"request": {"texts": [text]}}))
            answer = json.loads(websocket.recv())
            assert len(answer["response"]["embeddings"][0]["values"]) == 384


def test_http_1_1_is_what_is_spoken(door: Door) -> None:
    context = door.context()
    context.set_alpn_protocols(["h2", "http/1.1"])
    with (
        socket.create_connection(("localhost", door.port), 30) as raw,
        context.wrap_socket(raw, server_hostname="localhost") as secure,
    ):
        assert secure.selected_alpn_protocol() == "http/1.1"


@pytest.mark.parametrize(
    "words",
    [b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", bytes(99)],
)
def test_what_is_not_tls_ends_and_is_not_answered(door: Door, words: bytes) -> None:
    with (
        door.client() as client,
        socket.create_connection(("127.0.0.1", door.port), 20) as plain,
    ):
        assert client.get("/readyz").status_code == 200
        plain.sendall(words)
        heard = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := plain.recv(65536):
                heard += piece
        assert b"HTTP" not in heard
        assert client.get("/readyz").status_code == 200


def test_renewed_files_are_taken_for_new_connections(door: Door) -> None:
    before = door.authority
    with door.client() as kept:
        assert kept.get("/readyz").status_code == 200
        (door.folder / "cert.pem").write_text("half writ")
        time.sleep(0.5)  # looked at, and not taken
        with door.client() as client:
            assert client.get("/readyz").status_code == 200
        door.authority = trustme.CA()
        write(door.folder, door.authority)
        until = time.monotonic() + 30
        served = 0
        while served < 8:  # by each of several workers
            try:
                with door.client() as client:
                    served += client.get("/readyz").status_code == 200
            except httpx.ConnectError:
                served = 0
                assert time.monotonic() < until, "the new certificate is not served"
        assert kept.get("/readyz").status_code == 200
        door.authority, renewed = before, door.authority
        with pytest.raises(httpx.ConnectError), door.client() as client:
            client.get("/readyz")
        door.authority = renewed


@pytest.mark.parametrize("kind", [pytest.param("direct", marks=EXTENDED), "gateway"])
def test_clients_need_a_certificate_where_an_authority_is_named(
    starters: Path, tmp_path: Path, kind: str
) -> None:
    """Renewed as the others are; `up` says that it is ready all the same."""
    first, second = trustme.CA(), trustme.CA()
    first.cert_pem.write_to_path(tmp_path / "ca.pem")
    ca = {"FOREBAY_HTTP__TLS_CLIENT_CA": str(tmp_path / "ca.pem")}
    with up(starters, tmp_path, **DOORS[kind], **ca) as door:

        def let_in(own: trustme.CA | None) -> bool:
            try:
                with door.client(own) as client:
                    return client.get("/healthz").status_code == 200
            except (httpx.TransportError, ssl.SSLError):
                return False

        assert let_in(first) and not let_in(second) and not let_in(None)
        own = first.issue_cert("health.example.com")
        own.private_key_and_cert_chain_pem.write_to_path(tmp_path / "own.pem")
        shown = {
            f"FOREBAY_CLIENT__TLS_{n}": str(tmp_path / "own.pem") for n in ("CERTIFICATE", "KEY")
        }
        until = time.monotonic() + 30
        while health(door, **ca, **shown).returncode:  # nobody could ask whether it is ready
            assert time.monotonic() < until, "it does not get ready"
        assert health(door, **ca).returncode == 1
        second.cert_pem.write_to_path(tmp_path / "ca.pem")
        until = time.monotonic() + 30
        while not all(let_in(second) for _ in range(4)):
            assert time.monotonic() < until, "the new authority is not taken"
        assert not let_in(first) and not let_in(None)


def health(door: Door, *options: str, **more: str) -> subprocess.CompletedProcess[str]:
    """`forebay health` with the settings of the door's server."""
    command = [sys.executable, "-m", "forebay_cli", "health", *options]
    set_up = environ(door.folder, door.port, **more)
    return subprocess.run(command, env=set_up, capture_output=True, text=True, timeout=60)


def test_health_asks_by_tls(door: Door) -> None:
    done = health(door)
    assert (done.returncode, done.stdout) == (0, "ready\n"), done.stderr
    unused = free_port()
    done = health(door, FOREBAY_HTTP_PORT=str(unused))
    assert done.returncode == 1
    assert done.stderr.startswith(f"forebay: not ready: 127.0.0.1:{unused} does not answer")


@pytest.mark.parametrize(
    ("fault", "word"),
    [
        ("missing", r"http.tls_key is '.*key.pem': No such file"),
        ("words", r"http.tls_certificate"),
        ("strange", r"http.tls_certificate.*tls_key"),
        ("locked", r"http.tls_.*key"),
    ],
)
@pytest.mark.parametrize("command", [pytest.param("serve", marks=EXTENDED), "gateway"])
def test_files_that_are_not_what_they_should_be_stop_the_start(
    tmp_path: Path, command: str, fault: str, word: str
) -> None:
    write(tmp_path, trustme.CA())
    key = tmp_path / "key.pem"
    if fault == "missing":
        key.unlink()
    elif fault == "words":
        (tmp_path / "cert.pem").write_text("no certificate")
    elif fault == "strange":
        key.write_bytes(trustme.CA().issue_cert("localhost").private_key_pem.bytes())
    else:  # it would be asked for at the terminal
        key.write_bytes(
            load_pem_private_key(key.read_bytes(), None).private_bytes(
                Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")
            )
        )
    # The server reads the files where the port is its own, the gateway where it is not.
    behind = {"FOREBAY_HTTP__GATEWAY": str(tmp_path / "g")} if command == "serve" else {}
    done = subprocess.run(
        [sys.executable, "-m", "forebay_cli", command],
        env=environ(tmp_path, free_port(), **behind),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == (1 if command == "serve" else 2)
    told = done.stdout + done.stderr
    assert "Traceback" not in told and re.search(word, told), told
    assert not (tmp_path / "home").exists(), "all that takes seconds comes after it"


@pytest.mark.parametrize("lane", [pytest.param("fast", marks=EXTENDED), "ordinary"])
def test_a_file_that_is_not_there_stops_the_server_before_it_opens_anything(
    tmp_path: Path, lane: str
) -> None:
    files = {f"FOREBAY_GRPC__TLS_{n}": str(tmp_path / "none.pem") for n in ("CERTIFICATE", "KEY")}
    write(tmp_path, trustme.CA())
    done = subprocess.run(
        [sys.executable, "-m", "forebay_cli", "serve"],
        env=environ(tmp_path, free_port(), FOREBAY_GRPC__LANE=lane, **files),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert f"grpc.tls_certificate is '{tmp_path / 'none.pem'}': No such file" in done.stderr
    assert not (tmp_path / "home").exists()
