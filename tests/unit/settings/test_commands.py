"""What commands say of wrong settings: one line, whichever command reads them."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import forebay
import pytest
from forebay.settings import load_settings
from forebay_cli.main import app
from forebay_cli.up import free_port
from typer.testing import CliRunner


@pytest.mark.parametrize(
    "command", [["config"], ["keys", "list"], ["models", "list"], ["plan", "--fit", "minilm"]]
)
def test_a_wrong_variable_is_one_line(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOREBAY_GRCP_PORT", "1")
    run = CliRunner().invoke(app, command)
    assert run.exit_code == 2, run.output
    assert run.output.startswith("forebay: FOREBAY_GRCP_PORT names no setting")
    assert len(run.output.strip().splitlines()) == 1


def test_a_key_for_calls_is_no_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exported in a shell, it must not keep a server from starting there."""
    monkeypatch.setenv("FOREBAY_KEY", "fb_secret")
    monkeypatch.setenv("FOREBAY_HOME", str(tmp_path))
    load_settings()
    run = CliRunner().invoke(app, ["config"])
    assert run.exit_code == 0, run.output
    assert "fb_secret" not in run.output


def one_line(command: list[str]) -> str:
    """What a command says that cannot go on; nothing else, and status 2."""
    run = CliRunner().invoke(app, command)
    assert run.exit_code == 2, run.output
    assert run.exception is None or isinstance(run.exception, SystemExit)
    line = run.output.strip()
    assert line.startswith("forebay: ") and "\n" not in line
    return line


def test_a_home_that_is_a_file_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.touch()
    monkeypatch.setenv("FOREBAY_HOME", str(home))
    assert str(home) in one_line(["keys", "list"])


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("postgres://u:hunter2@h/db", "no URL of a database"),
        ("postgresql+asyncpg://u:hunter2@h:hunter2/db", "no URL of a database"),
        ("hunter2", "no URL of a database"),
        ("sqlite+aiosqlite:////dev/null/hunter/x.db", "unable to open"),
        ("postgresql+asyncpg://u:hunter2@127.0.0.1:1/db", "asyncpg"),
    ],
)
def test_a_database_that_cannot_be_used_is_one_line(
    url: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if words == "asyncpg" and importlib.util.find_spec("asyncpg") is not None:
        words = "the database cannot be used"
    monkeypatch.setenv("FOREBAY_HOME", str(tmp_path))
    monkeypatch.setenv("FOREBAY_STORAGE__DATABASE", url)
    line = one_line(["keys", "create", "shop"])
    assert words in line and "hunter2" not in line


@pytest.mark.parametrize(
    ("name", "url"),
    [("REDIS", "http://u:hunter2@h/0"), ("DATABASE", "postgresql+nothing://u:hunter2@h/db")],
)
def test_a_server_whose_storage_has_a_wrong_url_ends_with_a_line(
    name: str, url: str, tmp_path: Path
) -> None:
    environ = {
        **os.environ,
        "FOREBAY_HOME": str(tmp_path),
        "FOREBAY_GRPC_PORT": "0",
        "FOREBAY_MODELS__STARTERS": "false",
        f"FOREBAY_STORAGE__{name}": url,
    }
    command = [sys.executable, "-m", "forebay_cli", "serve"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    said = done.stdout + done.stderr
    assert f"storage.{name.lower()} is no URL" in said
    assert "Traceback" not in said and "hunter2" not in said


@pytest.mark.parametrize("key", ["fbk_sch\u00fcssel", "fbk_one\nfbk_two", "fbk_one\n"])
def test_a_key_that_no_call_can_carry_is_one_line(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOREBAY_HOME", str(tmp_path))
    monkeypatch.setenv("FOREBAY_KEY", key)
    line = one_line(["models", "list"])
    assert "FOREBAY_KEY" in line and "fbk_" not in line


@pytest.mark.parametrize(
    "command",
    [
        ["promote", "iris", "99999999999999999999"],
        ["promote", "iris", "0"],
        ["load", "iris", "--version", "99999999999999999999"],
        ["rollback", "\udcff"],
    ],
)
def test_arguments_that_no_request_can_carry_are_refused(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOREBAY_HOME", str(tmp_path))
    run = CliRunner().invoke(app, ["models", *command])
    assert run.exit_code == 2
    assert isinstance(run.exception, SystemExit)


def test_a_file_of_tls_that_is_not_there_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOREBAY_HOME", str(tmp_path))
    monkeypatch.setenv("FOREBAY_CLIENT__TLS_CA", str(tmp_path / "ca.pem"))
    for command in (["models", "list"], ["gateway", "--upstream", "127.0.0.1:1"]):
        assert "client.tls_ca is " in one_line(command)


def test_the_version_is_said() -> None:
    run = CliRunner().invoke(app, ["--version"])
    assert run.exit_code == 0
    assert run.output == f"forebay {forebay.__version__}\n"


def test_a_server_that_is_not_there_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOREBAY_GRPC_PORT", str(free_port()))
    run = CliRunner().invoke(app, ["models", "list"])
    assert run.exit_code == 1
    assert "UNAVAILABLE" in run.output
    assert "Does the server run there?" in run.output


@pytest.mark.parametrize(
    ("command", "flag", "variable"),
    [
        ("serve", "--grpc-port", "FOREBAY_GRPC_PORT"),
        ("serve", "FOREBAY_OBSERVABILITY__METRICS_PORT", "FOREBAY_OBSERVABILITY__METRICS_PORT"),
        ("serve", "FOREBAY_HTTP_PORT", "FOREBAY_HTTP_PORT"),
        ("gateway", "--http-port", "FOREBAY_HTTP_PORT"),
    ],
)
def test_serve_and_gateway_say_what_chooses_another_port(
    command: str, flag: str, variable: str, tmp_path: Path
) -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith("FOREBAY_")}
    env |= {"FOREBAY_HOME": str(tmp_path / "home"), "FOREBAY_GRPC_PORT": "0"}
    if command == "serve":  # with the port for HTTP, as `up` starts it
        env |= {"FOREBAY_HTTP__GATEWAY": str(tmp_path / "gateway.sock"), "FOREBAY_HTTP_PORT": "0"}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            [sys.executable, "-m", "forebay_cli", command],
            env=env | {variable: port},
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 1
    line = f"forebay: 127.0.0.1:{port} is in use by a program; {flag} chooses another port\n"
    assert done.stderr == line
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("flag", ["--grpc-port", "--http-port"])
def test_a_port_in_use_is_answered_with_the_flag_for_another(flag: str, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        command = ["up", "--home", str(tmp_path), "--grpc-port", "0", "--http-port", "0"]
        run = CliRunner().invoke(app, [*command, flag, port])
    assert run.exit_code == 1
    line = f"forebay: 127.0.0.1:{port} is in use by a program; {flag} chooses another port"
    assert run.output.strip() == line
