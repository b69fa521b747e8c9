"""`forebay up`: starter models, then server and gateway, each in a process of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import typer
from forebay.settings import Loaded, Settings

#: Seconds beyond the drain time before a process is killed.
SLACK_S = 10.0
READY_TIMEOUT_S = 300.0


def run(loaded: Loaded, config: Path | None) -> int:
    """Serve until a signal, or until a process ends by itself. Returns the exit status."""
    settings = loaded.settings
    started = time.monotonic()
    if settings.models.starters:
        make_starters(settings)
    metrics_port = settings.observability.metrics_port or free_port()
    environment = {
        **os.environ,
        "FOREBAY_HOME": str(settings.home),
        "FOREBAY_GRPC_PORT": str(settings.grpc.port or free_port()),
        "FOREBAY_HTTP_PORT": str(settings.http.port or free_port()),
        "FOREBAY_OBSERVABILITY__METRICS_PORT": str(metrics_port),
    }
    flags = ["--config", str(config)] if config else []
    processes = [_start(["serve", *flags], environment)]
    if settings.http.enabled:
        processes.append(_start(["gateway", *flags], environment))
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    announce = threading.Thread(
        target=_announce, args=(settings, environment, started, stop), daemon=True
    )
    announce.start()
    while not stop.wait(0.2):
        ended = [p for p in processes if p.poll() is not None]
        if ended:
            typer.echo(f"forebay: a process ended with status {ended[0].returncode}", err=True)
            stop.set()
    # The gateway first: its calls in flight need the server.
    status = 0
    for process in reversed(processes):
        status = _end(process, settings.grpc.drain_s + SLACK_S) or status
    return status


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


def _start(arguments: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    # A session of its own: the terminal's Ctrl-C reaches `up` alone, which ends them in order.
    command = [sys.executable, "-m", "forebay_cli", *arguments]
    return subprocess.Popen(command, env=environment, start_new_session=True)


def _end(process: subprocess.Popen[bytes], patience: float) -> int:
    if process.poll() is None:
        process.terminate()
    try:
        return process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _announce(
    settings: Settings, environment: dict[str, str], started: float, stop: threading.Event
) -> None:
    """Say where to call once everything answers."""
    import urllib.request

    grpc_port, http_port = environment["FOREBAY_GRPC_PORT"], environment["FOREBAY_HTTP_PORT"]
    url = f"http://{settings.http.host}:{http_port}"
    until = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < until and not stop.is_set():
        try:
            if settings.http.enabled:
                urllib.request.urlopen(f"{url}/readyz", timeout=1).close()  # noqa: S310
            else:
                socket.create_connection((settings.grpc.host, int(grpc_port)), 1).close()
            break
        except OSError:
            stop.wait(0.1)
    if stop.is_set():
        return
    took = time.monotonic() - started
    lines = [f"Forebay is ready ({took:.1f} s).", f"  gRPC     {settings.grpc.host}:{grpc_port}"]
    if settings.http.enabled:
        lines += [f"  REST     {url}/api/v1", f"  OpenAI   {url}/v1", f"  docs     {url}/docs"]
    typer.echo("\n".join([*lines, "Ctrl-C drains and stops."]))


def free_port() -> int:
    """A loopback port that is free now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
