"""`forebay up`: starter models, then server and gateway, each in a process of its own (supervise)."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

import typer
from forebay.addresses import Address, listening
from forebay.settings import Loaded, Settings
from forebay.sockets import SocketFolder

from forebay_cli.settings import has_fast_lane

#: Seconds beyond the drain time before a process is killed.
SLACK_S = 10.0


def run(loaded: Loaded, config: Path | None) -> NoReturn:
    """Become the process that starts server and gateway and stays with them until a signal."""
    settings = loaded.settings
    must_be_free(settings.grpc.host, settings.grpc.port, "--grpc-port")
    if settings.http.enabled:
        must_be_free(settings.http.host, settings.http.port, "--http-port")
    started = time.monotonic()
    if settings.models.starters:
        make_starters(settings)
    grpc_port, http_port = settings.grpc.port or free_port(), settings.http.port or free_port()
    metrics_port = settings.observability.metrics_port or free_port()
    flags = ["--config", str(config)] if config else []
    folder, sockets = _sockets(settings)
    commands = [[sys.executable, "-m", "forebay_cli", "serve", "--supervised", *flags]]
    if settings.http.enabled:
        commands += gateways(settings, http_port, flags)
    url = _url(settings, http_port)
    place = settings.grpc.model_copy(update={"port": grpc_port}).address
    said = [f"  gRPC     {place}"]
    if settings.http.enabled:
        said += [f"  REST     {url}/api/v1", f"  OpenAI   {url}/v1", f"  docs     {url}/docs"]
    unix = place.startswith("unix:")
    ready: dict[str, object] = {
        "address": os.path.abspath(place.removeprefix("unix:")) if unix else place
    }
    if settings.http.enabled:
        ready = _ready(settings, http_port, "/readyz", sockets.get("FOREBAY_HTTP__GATEWAY", ""))
    spec = {
        "commands": commands,
        "environment": {
            "FOREBAY_HOME": str(settings.home),
            "FOREBAY_GRPC_PORT": str(grpc_port),
            "FOREBAY_HTTP_PORT": str(http_port),
            "FOREBAY_OBSERVABILITY__METRICS_PORT": str(metrics_port),
            **sockets,
        },
        "remove": str(folder.path) if folder else "",
        "door": f"{settings.http.host}:{http_port}" if "FOREBAY_HTTP__GATEWAY" in sockets else "",
        "patience_s": settings.grpc.drain_s + SLACK_S,
        "ready": ready,
        "said": "\n".join([*said, "Ctrl-C drains and stops."]),
        "since": started,
    }
    if folder is not None:
        folder.hand_over()
    _become(spec)


def _url(settings: Settings, port: int) -> str:
    http = settings.http
    return f"{'https' if http.secure else 'http'}://{http.host}:{port}"


def _ready(settings: Settings, port: int, path: str, behind: str = "") -> dict[str, object]:
    """Whom the supervisor asks whether HTTP is served.

    Args:
        behind: the gateway's Unix socket, where the server has the port.
    """
    http = settings.http
    if http.secure and behind:
        return {"address": behind, "path": path}
    address = f"{http.host}:{port}"
    if http.tls_client_ca is not None:  # it has no certificate to show
        return {"address": address}
    return {"address": address, "path": path, "tls": http.secure}


def _sockets(settings: Settings) -> tuple[SocketFolder | None, dict[str, str]]:
    """The folder of the sockets between server and gateway, and the settings that name them; none
    where they need none."""
    http, names = settings.http, {}
    if http.enabled and http.direct and http.workers == 1 and has_fast_lane(settings):
        names["FOREBAY_HTTP__GATEWAY"] = "gateway.sock"
    if http.enabled and not http.upstream and settings.grpc.secure:
        # The certificate is for the names that clients use, and may ask for one in return.
        names["FOREBAY_GRPC__GATEWAY_SOCKET"] = "server.sock"
    if not names:
        return None, {}
    folder = SocketFolder()
    sockets = {name: f"{folder.path}/{socket}" for name, socket in names.items()}
    if "FOREBAY_GRPC__GATEWAY_SOCKET" in sockets:
        sockets["FOREBAY_HTTP__UPSTREAM"] = f"unix:{folder.path}/server.sock"
    return folder, sockets


def run_gateway(settings: Settings, config: Path | None) -> NoReturn:
    """Become the process that starts the gateway's workers and stays with them until a signal."""
    http = settings.http
    must_be_free(http.host, http.port, "--http-port")
    port = http.port or free_port()
    url = _url(settings, port)
    spec = {
        "commands": gateways(settings, port, ["--config", str(config)] if config else []),
        "environment": {
            "FOREBAY_HTTP_PORT": str(port),
            "FOREBAY_HTTP__UPSTREAM": http.upstream,
        },
        "patience_s": settings.grpc.drain_s + SLACK_S,
        "ready": _ready(settings, port, "/healthz"),
        "said": f"  REST     {url}/api/v1",
        "since": time.monotonic(),
    }
    _become(spec)


def gateways(settings: Settings, port: int, flags: list[str]) -> list[list[str]]:
    """The commands of the gateway's workers."""
    command = [sys.executable, "-m", "forebay_cli", "gateway", "--supervised", *flags]
    if settings.http.workers == 1:
        return [command]
    folder = metrics_folder(settings, port)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return [[*command, "--worker"]] * settings.http.workers


def metrics_folder(settings: Settings, port: int) -> Path:
    """Where the workers on a port keep their metrics, so that each can give the sums of all."""
    return settings.home / "gateway-metrics" / str(port)


def _become(spec: dict[str, object]) -> NoReturn:
    script = str(Path(__file__).with_name("supervise.py"))
    os.execv(sys.executable, [sys.executable, "-I", "-S", script, json.dumps(spec)])  # noqa: S606 - no shell


def make_starters(settings: Settings) -> None:
    """Make missing starter models in a process of its own: their libraries are not served with."""
    from forebay_exporters.starters import missing

    root = settings.models_root
    if not missing(root):
        return
    command = [
        sys.executable,
        "-m",
        "forebay_cli.make_starters",
        str(root),
        str(settings.home / "cache"),
    ]
    data = settings.data or _data_folder()
    done = subprocess.run(command + ([str(data)] if data else []))
    if done.returncode:
        typer.echo(
            "forebay: some starter models could not be made; the others are served", err=True
        )


def _data_folder() -> Path | None:
    """`../shared/data`, where a checkout has it."""
    folder = Path.cwd().parent / "shared" / "data"
    return folder if (folder / "tabular").is_dir() else None


def taken(host: str, port: int) -> Address | None:
    """The first of the host's addresses where a program listens already. Raises OSError: the host is
    unknown."""
    for address in listening(host, port):
        with socket.socket(address.family) as s:
            # Not the last one's ended connections.
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                s.bind(address.place)
            except OSError as e:
                if e.errno == errno.EADDRINUSE:
                    return address
    return None


def must_be_free(host: str, port: int, flag: str) -> None:
    """Exit where a program listens there: it would answer, and be taken for this one.

    Args:
        flag: what chooses another port; none is needed for 0, any free one.
    """
    if port <= 0 or host.startswith("unix:"):
        return
    try:
        address = taken(host, port)
    except OSError as e:
        typer.echo(f"forebay: {e}", err=True)
        sys.exit(1)
    if address is not None:
        typer.echo(
            f"forebay: {address} is in use by a program; {flag} chooses another port", err=True
        )
        sys.exit(1)


def free_port() -> int:
    """A loopback port that is free now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
