"""A server whose host is a name: it listens on all the name's addresses, or says which it cannot have."""

from __future__ import annotations

import socket
from pathlib import Path

import grpc
import httpx
import pytest
from forebay.settings import Settings, load_settings
from forebay_cli.up import free_port, taken
from forebay_gateway.serve import sockets
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.conftest import Live
from tests.names import resolve_to

ADDRESSES = ("127.0.0.1", "127.0.0.2")


def settings(home: Path, lane: str, port: int = 0) -> Settings:
    values = {
        "home": home,
        "models.starters": False,
        "grpc.host": "here.test",
        "grpc.port": port,
        "http.host": "here.test",
        "grpc.lane": lane,
        "auth.required": "never",
        "auth.allow_insecure_bind": True,
    }
    return load_settings(values, environ={}).settings


def test_it_is_found_at_each(lane: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve_to(monkeypatch, {"here.test": ADDRESSES})
    live = Live(settings(tmp_path, lane))
    try:
        for address in ADDRESSES:
            with grpc.insecure_channel(f"{address}:{live.server.port}") as channel:
                check = health_pb2_grpc.HealthStub(channel).Check
                assert check(health_pb2.HealthCheckRequest(), timeout=10).status == 1
            if lane == "fast":  # which has the HTTP port; no gateway is behind it here
                url = f"http://{address}:{live.server.lanes.http_port}/healthz"
                assert httpx.get(url, timeout=10).status_code == 503
    finally:
        live.stop()


@pytest.mark.parametrize("taken", ADDRESSES)
def test_the_address_that_is_taken_is_named(
    lane: str, taken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve_to(monkeypatch, {"here.test": ADDRESSES})
    with socket.create_server((taken, 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen on {taken}:{port}"):
            Live(settings(tmp_path, lane, port))


def test_workers_of_a_gateway_share_each(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve_to(monkeypatch, {"here.test": ADDRESSES})
    port = free_port()
    workers = [sockets("here.test", port) for _ in range(2)]
    for made in workers:
        assert [s.getsockname() for s in made] == [(a, port) for a in ADDRESSES]
        for own in made:
            own.close()


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_command_sees_that_one_is_taken(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve_to(monkeypatch, {"here.test": ADDRESSES})
    with socket.create_server((address, 0)) as other:
        port = other.getsockname()[1]
        assert str(taken("here.test", port)) == f"{address}:{port}"
    assert taken("here.test", port) is None
