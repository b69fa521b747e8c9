"""A server in a process of its own, for the benchmarks of retrieval."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.common import starters

ROOT = Path(__file__).resolve().parent.parent


def data_folder() -> Path:
    """FOREBAY_DATA, or ../shared/data."""
    return Path(os.environ.get("FOREBAY_DATA") or ROOT.parent / "shared" / "data")


@contextmanager
def running(home: Path, models: str = "minilm") -> Iterator[tuple[grpc.Channel, Path]]:
    """A served channel and the data folder.

    Args:
        models: names of starter models; empty = none. `NAME:ENGINE` serves NAME as NAME-ENGINE by
            that engine, in the precision of its file.
    """
    root = home / "models"
    root.mkdir(parents=True, exist_ok=True)
    for model in models.split():
        name, _, engine = model.partition(":")
        kept = starters() / name
        place = root / model.replace(":", "-")
        if not engine:
            place.unlink(missing_ok=True)
            place.symlink_to(kept)
            continue
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        (place / "1").symlink_to(kept / "1")
        (place / "model.yaml").write_text(f"engine: {engine}\n")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    environ = {
        **os.environ,
        "FOREBAY_HOME": str(home),
        "FOREBAY_GRPC_PORT": str(port),
        "FOREBAY_OBSERVABILITY__LOG_LEVEL": "WARNING",
        "FOREBAY_OBSERVABILITY__ACCESS_LOG": "false",
    }
    process = subprocess.Popen([sys.executable, "-m", "forebay_cli", "serve"], env=environ)
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    channel = grpc.insecure_channel(f"127.0.0.1:{port}", options)
    try:
        check = health_pb2_grpc.HealthStub(channel).Check
        deadline = time.monotonic() + 120
        while True:
            try:
                if check(health_pb2.HealthCheckRequest(), timeout=5).status == 1:
                    break
            except grpc.RpcError:
                pass  # it does not listen yet
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        yield channel, data_folder()
    finally:
        channel.close()
        process.terminate()
        process.wait(60)
