"""`forebay up`: it says when it is ready, ends in order, and does not outlive its server."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import httpx
import pytest
import trustme
from forebay.v1 import model_pb2, model_pb2_grpc
from forebay_cli import huge_pages
from forebay_cli.main import app
from forebay_cli.up import free_port, taken
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.mmap_dict import MmapedDict
from typer.testing import CliRunner

from tests.conftest import copy_models

pytestmark = pytest.mark.timeout(120)
EXTENDED = pytest.mark.skipif(
    importlib.util.find_spec("forebay_native") is None,
    reason="the extension forebay_native is not built (cargo is needed)",
)


def test_workers_share_the_port_and_count_together(starters: Path, tmp_path: Path) -> None:
    route = "/api/v1/models"

    def counted(text: str) -> int:
        found = re.search(
            rf'seconds_count{{route="{route}",status="200"}} (\d+)', text.replace("duration_", "")
        )
        return int(found[1]) if found else 0

    def get(url: str) -> str:
        with urllib.request.urlopen(url, timeout=10) as answer:  # a connection of its own
            return answer.read().decode()

    with up(starters, tmp_path, FOREBAY_HTTP__WORKERS="3") as (process, url):
        assert len(children(process.pid)) == 4
        for _ in range(60):
            get(url + route)
        assert {counted(get(f"{url}/metrics")) for _ in range(12)} == {60}
        each = [
            counted_by(p, route) for p in (tmp_path / "gateway-metrics").glob("*/histogram_*.db")
        ]
        assert len(each) == 3 and sum(each) == 60 and min(each) > 0
        process.terminate()
        assert process.wait(60) == 0


def counted_by(file: Path, route: str) -> int:
    """Requests of a route that one worker served."""
    total = 0
    for key, value, *_ in MmapedDict.read_all_values_from_file(str(file)):
        _, name, labels, _ = json.loads(key)
        if name.endswith("seconds_bucket") and labels["route"] == route:
            total += int(value)
    return total


def test_it_refuses_a_port_on_which_another_listens(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        env = {**os.environ, "FOREBAY_HOME": str(tmp_path), "FOREBAY_HTTP_PORT": str(port)}
        env |= {"FOREBAY_GRPC_PORT": str(free_port()), "FOREBAY_MODELS__STARTERS": "false"}
        command = [sys.executable, "-m", "forebay_cli", "up"]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert f"127.0.0.1:{port} is in use" in done.stderr
    assert "ready" not in done.stdout


@contextmanager
def up(starters: Path, home: Path, **more: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A running `forebay up` and its REST address."""
    port = free_port()
    env = {
        **os.environ,
        "FOREBAY_HOME": str(home),
        "FOREBAY_GRPC_PORT": str(free_port()),
        "FOREBAY_HTTP_PORT": str(port),
        "FOREBAY_MODELS__ROOT": str(copy_models(starters, home / "models", "iris")),
        "FOREBAY_MODELS__STARTERS": "false",
        **more,
    }
    command = [sys.executable, "-m", "forebay_cli", "up"]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert re.fullmatch(r"Forebay is ready \(\d+\.\d s\)\.\n", process.stdout.readline())
            yield process, f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.communicate(timeout=60)


def children(pid: int) -> list[int]:
    return [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.usefixtures("hang_ups")
def test_it_answers_when_it_says_so_and_a_signal_ends_all(
    starters: Path, tmp_path: Path, number: signal.Signals
) -> None:
    with up(starters, tmp_path) as (process, url):
        with urllib.request.urlopen(f"{url}/api/v1/models", timeout=10) as answer:
            assert json.load(answer)["models"][0]["name"] == "iris"
        asked = urllib.request.Request(f"{url}/api/v1/models", headers={"host": "evil.example"})
        with pytest.raises(urllib.error.HTTPError) as refused:  # it needs no key, see origins.py
            urllib.request.urlopen(asked, timeout=10)
        assert refused.value.code == 403
        parts = children(process.pid)
        assert len(parts) == 2
        process.send_signal(number)
        assert process.wait(60) == 0
    assert not any(alive(p) for p in parts)


@pytest.mark.parametrize("lane", ["auto", "ordinary"])
def test_its_gateway_reaches_a_server_that_wants_certificates(
    starters: Path, tmp_path: Path, lane: str
) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("inference.example.com")
    chain = b"".join(p.bytes() for p in certificate.cert_chain_pems)
    (tmp_path / "cert.pem").write_bytes(chain)
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    more = {
        "FOREBAY_GRPC__LANE": lane,
        "FOREBAY_GRPC__TLS_CERTIFICATE": str(tmp_path / "cert.pem"),
        "FOREBAY_GRPC__TLS_KEY": str(tmp_path / "key.pem"),
        "FOREBAY_GRPC__TLS_CLIENT_CA": str(tmp_path / "ca.pem"),
    }
    with (
        up(starters, tmp_path, **more) as (_, url),
        urllib.request.urlopen(f"{url}/api/v1/models", timeout=10) as answer,
    ):
        assert json.load(answer)["models"][0]["name"] == "iris"


def test_its_gateway_and_commands_reach_a_server_on_ipv6(
    starters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOREBAY_GRPC__HOST", "::1")
    monkeypatch.setenv("FOREBAY_GRPC_PORT", str(free_port()))
    more = {"FOREBAY_GRPC_PORT": os.environ["FOREBAY_GRPC_PORT"]}
    with up(starters, tmp_path, **more):
        run = CliRunner().invoke(app, ["models", "list"])
    assert run.exit_code == 0, run.output
    assert run.output.startswith("iris@1")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_server_and_gateway_do_not_outlive_a_kill(
    starters: Path, tmp_path: Path, workers: str
) -> None:
    port = free_port()
    more = {"FOREBAY_GRPC_PORT": str(port), "FOREBAY_HTTP__WORKERS": workers}
    with up(starters, tmp_path, **more) as (process, _):
        parts = children(process.pid)
        assert len(parts) == 1 + int(workers)
        process.kill()
        process.wait(10)
        until(lambda: not any(alive(p) for p in parts))
    assert not taken("127.0.0.1", port), "the next `forebay up` would refuse to start"


def test_health_says_at_once_that_it_leaves_and_calls_are_answered_meanwhile(
    starters: Path, tmp_path: Path
) -> None:
    """A stream through the gateway keeps that from its end, and the server serves until then."""
    port = free_port()
    more = {"FOREBAY_GRPC_PORT": str(port), "FOREBAY_GRPC__DRAIN_S": "30"}
    with (
        up(starters, tmp_path, **more) as (process, url),
        grpc.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        health = health_pb2_grpc.HealthStub(channel)
        models = model_pb2_grpc.ModelServiceStub(channel)
        asked = health_pb2.HealthCheckRequest()

        def status() -> int:
            return health.Check(asked, timeout=5).status

        assert status() == health_pb2.HealthCheckResponse.SERVING
        with urllib.request.urlopen(f"{url}/api/v1/models:watch", timeout=30) as stream:
            stream.readline()
            process.terminate()
            until(lambda: status() == health_pb2.HealthCheckResponse.NOT_SERVING)
            answer = models.ListModels(model_pb2.ListModelsRequest(), timeout=5)
            assert answer.models[0].name == "iris"
            assert process.poll() is None
        assert process.wait(60) == 0


@EXTENDED
def test_http_is_closed_before_its_gateway_leaves(starters: Path, tmp_path: Path) -> None:
    """Not one request more finds the server there and the gateway gone: a balancer takes it elsewhere."""
    seen: list[int] = []

    def asked(client: httpx.Client) -> bool:
        try:
            seen.append(client.get("/api/v1/models").status_code)
        except httpx.TransportError:
            return False
        return True

    with up(starters, tmp_path) as (process, url), httpx.Client(base_url=url) as kept:
        assert asked(kept)
        with kept.stream("GET", "/api/v1/models:watch", timeout=30) as stream:
            lines = stream.iter_lines()
            next(lines)
            process.terminate()
            until(lambda: not asked(kept))
            assert process.poll() is None  # the stream goes on
        assert process.wait(60) == 0
    assert set(seen) == {200}


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_it_ends_with_a_fault_when_its_server_dies(starters: Path, tmp_path: Path) -> None:
    with up(starters, tmp_path) as (process, _):
        server, gateway = children(process.pid)
        os.kill(server, signal.SIGKILL)
        assert process.wait(60) != 0
    assert not alive(gateway)


@EXTENDED
def test_no_folder_of_sockets_stays_when_a_start_fails_or_a_server_is_killed(
    starters: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    def left() -> list[Path]:
        return list(temporary.glob("forebay-*"))

    # A test's own folder may be too deep for sockets.
    temporary = Path(tempfile.mkdtemp())
    request.addfinalizer(lambda: shutil.rmtree(temporary))
    where = {"TMPDIR": str(temporary)}
    with up(starters, tmp_path / "a", **where) as (process, _):
        assert len(left()) == 2  # between server and gateway, and between the server's lanes
        os.kill(children(process.pid)[0], signal.SIGKILL)
        assert process.wait(60) != 0
    [killed] = left()  # the next start removes it
    env = {**os.environ, **where, "FOREBAY_HOME": str(tmp_path / "b"), "FOREBAY_GRPC_PORT": "0"}
    env |= {"FOREBAY_MODELS__ROOT": str(starters)}
    command = [sys.executable, "-m", "forebay_cli", "serve"]
    with subprocess.Popen(command, env=env) as server:
        try:
            until(lambda: left() and killed not in left())
        finally:
            server.terminate()  # it starts still
        assert server.wait(60) == 0
    assert not left()


@pytest.mark.skipif(
    not huge_pages.optional(), reason="this kernel gives large pages to all or none"
)
@pytest.mark.parametrize("given", [None, "glibc.malloc.hugetlb=0"])
def test_the_server_has_large_pages_unless_it_is_told_otherwise(
    starters: Path, tmp_path: Path, given: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if given is None:
        monkeypatch.delenv(huge_pages.VARIABLE, raising=False)
    else:
        monkeypatch.setenv(huge_pages.VARIABLE, given)
    with up(starters, tmp_path) as (process, _):
        server = next(
            p
            for p in children(process.pid)
            if b"serve" in Path(f"/proc/{p}/cmdline").read_bytes().split(b"\0")
        )
        environ = Path(f"/proc/{server}/environ").read_bytes().split(b"\0")
    wanted = given or huge_pages.VALUE
    assert f"{huge_pages.VARIABLE}={wanted}".encode() in environ


def test_grpc_alone_on_a_unix_socket(starters: Path, tmp_path: Path) -> None:
    path = tmp_path / "grpc.sock"
    alone = {"FOREBAY_HTTP__ENABLED": "false", "FOREBAY_GRPC__HOST": f"unix:{path}"}
    with up(starters, tmp_path, **alone) as (process, _):
        assert process.stdout is not None
        assert process.stdout.readline() == f"  gRPC     unix:{path}\n"
        with grpc.insecure_channel(f"unix:{path}") as channel:
            grpc.channel_ready_future(channel).result(10)
