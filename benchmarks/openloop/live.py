"""A server of its own for a run, and what the run costs it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Served:
    """A running `forebay serve`."""

    port: int
    pid: int
    metrics_port: int
    log: Path

    @property
    def target(self) -> str:
        """host:port."""
        return f"127.0.0.1:{self.port}"

    def cpu_seconds(self) -> float:
        """User and system time of the process so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def rss_mb(self) -> float:
        """Resident memory, MB."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def pss_mb(self) -> float:
        """Proportional memory, MB."""
        for line in Path(f"/proc/{self.pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1e3
        return 0.0

    def descriptors(self) -> int:
        """Open files and sockets."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def threads(self) -> int:
        """Threads."""
        return len(os.listdir(f"/proc/{self.pid}/task"))


@contextmanager
def serve(
    models: Path, cpus: str = "", command: tuple[str, ...] = (), **environment: str
) -> Iterator[Served]:
    """`forebay serve` on the models, ready; ends it at the end.

    Args:
        cpus: processors that it may use, as taskset takes them; empty = all.
        command: another command that serves, in the place of `forebay serve`.
        environment: settings, as FOREBAY_GRPC__LANE="fast".
    """
    from forebay_cli.up import free_port

    port, metrics = free_port(), free_port()
    with tempfile.TemporaryDirectory() as home:
        env = {
            **os.environ,
            "FOREBAY_HOME": home,
            "FOREBAY_GRPC_PORT": str(port),
            "FOREBAY_MODELS__ROOT": str(models),
            "FOREBAY_MODELS__STARTERS": "false",
            "FOREBAY_OBSERVABILITY__METRICS_PORT": str(metrics),
            **environment,
        }
        full = list(command) or [sys.executable, "-m", "forebay_cli", "serve"]
        if cpus:
            full = ["taskset", "-c", cpus, *full]
        log = Path(home, "log")
        with log.open("wb") as out:
            process = subprocess.Popen(full, env=env, stderr=out)
            try:
                _ready(port, process, log)
                yield Served(port, process.pid, metrics, log)
            finally:
                process.terminate()
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def _ready(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for _ in range(600):
            if process.poll() is not None:
                raise RuntimeError(f"the server ended: {log.read_text()[-2000:]}")
            try:
                status = stub.Check(health_pb2.HealthCheckRequest(), timeout=1).status
                if status == health_pb2.HealthCheckResponse.SERVING:
                    return
            except grpc.RpcError:
                pass
            time.sleep(0.1)
    raise RuntimeError("the server does not get ready")
