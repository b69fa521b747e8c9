"""Commands and a gateway apart call a server by TLS, with a certificate of their own where it wants one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import trustme
from forebay_cli.main import app
from forebay_cli.up import free_port
from typer.testing import CliRunner

from tests.conftest import Live, Start, copy_models

NAME = "inference.example.com"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    for name in (NAME, "client.example.com"):
        certificate = authority.issue_cert(name)
        chain = b"".join(p.bytes() for p in certificate.cert_chain_pems)
        (folder / f"{name}.pem").write_bytes(chain)
        certificate.private_key_pem.write_to_path(folder / f"{name}.key")
    return folder


@pytest.fixture(scope="module")
def secured(
    starters: Path, start: Start, files: Path, tmp_path_factory: pytest.TempPathFactory
) -> Live:
    return start(
        copy_models(starters, tmp_path_factory.mktemp("models"), "iris"),
        grpc__tls_certificate=files / f"{NAME}.pem",
        grpc__tls_key=files / f"{NAME}.key",
        grpc__tls_client_ca=files / "ca.pem",
    )


@pytest.fixture
def environ(secured: Live, files: Path, tmp_path: Path) -> dict[str, str]:
    return {
        "FOREBAY_HOME": str(tmp_path),
        "FOREBAY_CLIENT__TLS_CA": str(files / "ca.pem"),
        "FOREBAY_CLIENT__TLS_CERTIFICATE": str(files / "client.example.com.pem"),
        "FOREBAY_CLIENT__TLS_KEY": str(files / "client.example.com.key"),
        "FOREBAY_CLIENT__TLS_NAME": NAME,
    }


@pytest.fixture
def by_tls(
    secured: Live, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> pytest.MonkeyPatch:
    """The environment of a command that is to call the server."""
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FOREBAY_GRPC_PORT", str(secured.server.port))
    return monkeypatch


@pytest.mark.usefixtures("by_tls")
def test_commands_call_by_tls() -> None:
    run = CliRunner().invoke(app, ["models", "list"])
    assert run.exit_code == 0, run.output
    assert run.output.startswith("iris@1")


def test_health_is_asked_by_tls(by_tls: pytest.MonkeyPatch) -> None:
    run = CliRunner().invoke(app, ["health", "--grpc"])
    assert (run.exit_code, run.output) == (0, "ready\n")
    by_tls.setenv("FOREBAY_HTTP__ENABLED", "false")
    assert CliRunner().invoke(app, ["health"]).exit_code == 0
    by_tls.delenv("FOREBAY_CLIENT__TLS_CERTIFICATE")
    by_tls.delenv("FOREBAY_CLIENT__TLS_KEY")
    run = CliRunner().invoke(app, ["health"])
    assert run.exit_code == 1
    assert "UNAVAILABLE" in run.output


def test_a_gateway_apart_calls_by_tls(secured: Live, environ: dict[str, str]) -> None:
    port = free_port()
    command = [sys.executable, "-m", "forebay_cli", "gateway", "--http-port", str(port)]
    command += ["--upstream", secured.target]
    with subprocess.Popen(command, env=os.environ | environ) as gateway:
        try:
            assert models(f"http://127.0.0.1:{port}")[0]["name"] == "iris"
        finally:
            gateway.terminate()
            gateway.wait(30)


def models(url: str) -> list[dict[str, str]]:
    deadline = time.monotonic() + 30
    while True:
        try:
            with urllib.request.urlopen(f"{url}/api/v1/models", timeout=10) as answer:
                return json.load(answer)["models"]
        except urllib.error.HTTPError as e:
            raise AssertionError(e.read()) from e
        except OSError:  # it does not listen yet
            assert time.monotonic() < deadline
            time.sleep(0.1)
