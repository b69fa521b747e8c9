"""A server in a process of its own, as its users run it, to be killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import grpc
from forebay_cli.up import free_port
from grpc_health.v1 import health_pb2, health_pb2_grpc

SERVE = ("-m", "forebay_cli", "serve")
#: As `serve`, but indexes are built, saved and rebuilt all the time, so that kills meet that too.
SERVE_WITH_CONSTANT_UPKEEP = (
    "-c",
    """
import forebay_server.dataplane.upkeep as upkeep
import forebay_server.indexes.dense as dense
dense.BUILD_AT, dense.MAX_TAIL, dense.IDLE_TAIL = 100, 60, 10
upkeep.SAVE_CHANGES, upkeep.SAVE_SHARE = 40, 0.1
upkeep.REBUILD_SLOTS, upkeep.IDLE_S = 200, 0.2
from forebay_cli.main import app
app(["serve"])
""",
)


class ServerProcess:
    """Its log is beside its home; the next server on that home goes on with it.

    Args:
        command: arguments of Python; `forebay serve` by default.
        environ: more settings, as environment variables.
    """

    def __init__(self, home: Path, *command: str, **environ: str) -> None:
        port = free_port()
        environ = {
            **{k: v for k, v in os.environ.items() if not k.startswith("FOREBAY_")},
            "FOREBAY_HOME": str(home),
            "FOREBAY_GRPC_PORT": str(port),
            "FOREBAY_MODELS__STARTERS": "false",
            "FOREBAY_OBSERVABILITY__LOG_LEVEL": "INFO",
            "FOREBAY_OBSERVABILITY__ACCESS_LOG": "false",
            **environ,
        }
        self.log = home.parent / "log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *(command or SERVE)], env=environ, stderr=log, stdout=log
            )
        self.channel = grpc.insecure_channel(f"127.0.0.1:{port}")

    def wait(self) -> None:
        """Until it serves."""
        check = health_pb2_grpc.HealthStub(self.channel).Check
        deadline = time.monotonic() + 240
        while True:
            try:
                if check(health_pb2.HealthCheckRequest(), timeout=5).status == 1:
                    return
            except grpc.RpcError:
                pass  # it does not listen yet
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def kill(self) -> None:
        """At once, by kill -9. Idempotent."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(30)
        self.channel.close()


StartProcess = Callable[..., ServerProcess]
