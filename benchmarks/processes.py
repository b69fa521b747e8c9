"""A server under measurement: all of its processes, their CPU time and memory, and their end.

Processes are found by a variable that they inherit, so workers count that left their parent's tree.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")
MARK = "BENCH_SERVER"


class Processes:
    """A command and everything that it starts.

    Args:
        command: the server's command line.
        log: file that gets its output.
        environment: variables beside this process's own.
        cwd: its working folder.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        environment: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        self._mark = f"{MARK}={uuid.uuid4().hex}".encode()
        name, _, value = self._mark.decode().partition("=")
        env = {**os.environ, **(environment or {}), name: value}
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                list(command), env=env, cwd=cwd, stdout=out, stderr=out, start_new_session=True
            )

    def pids(self) -> list[int]:
        """The processes that live now."""
        out = []
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit():
                continue
            try:
                if self._mark in (folder / "environ").read_bytes().split(b"\0"):
                    out.append(int(folder.name))
            except OSError:  # ended, or another user's
                continue
        return out

    def alive(self) -> bool:
        """Whether the process that was started still runs."""
        return self.process.poll() is None

    def cpu_seconds(self) -> float:
        """User and system time of all processes so far."""
        total = 0
        for pid in self.pids():
            try:
                fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            total += int(fields[11]) + int(fields[12])
        return total / TICKS

    def memory_mb(self) -> float:
        """Proportional set size of all processes, in MB: shared pages count once."""
        total = 0
        for pid in self.pids():
            try:
                text = Path(f"/proc/{pid}/smaps_rollup").read_text()
            except OSError:
                continue
            total += next(int(x.split()[1]) for x in text.splitlines() if x.startswith("Pss:"))
        return total / 1024

    def settle(self, patience_s: float = 15.0) -> None:
        """Wait until the processes idle: some servers go on computing for callers that left."""
        until, before, calm = time.monotonic() + patience_s, self.cpu_seconds(), 0
        while time.monotonic() < until and calm < 2:
            time.sleep(0.25)
            now = self.cpu_seconds()
            calm = calm + 1 if now - before < 0.05 else 0
            before = now

    def stop(self, patience_s: float = 20.0) -> None:
        """SIGTERM to the first process; what is left after that is killed, each by its id."""
        if self.alive():
            self.process.terminate()
            try:
                self.process.wait(patience_s)
            except subprocess.TimeoutExpired:
                pass  # killed below
        for number in (signal.SIGTERM, signal.SIGKILL):
            left = self.pids()
            for pid in left:
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    pass  # ended meanwhile
            until = time.monotonic() + 5
            while left and self.pids() and time.monotonic() < until:
                time.sleep(0.1)
        self.process.wait()
