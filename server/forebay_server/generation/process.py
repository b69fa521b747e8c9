"""An engine in a process of its own and, often, in another environment: its life.

When the process dies, its requests fail as Unavailable (ENGINE_DIED), and a new one is started with
back-off; calls that come meanwhile wait for it as long as their deadline and RESTART_WAIT_S allow.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from forebay.errors import FailedPrecondition

from forebay_server.core.generation import (
    Capabilities,
    GenerationDelta,
    GenerationRequest,
    GenerationSpec,
)
from forebay_server.generation.connection import Connection
from forebay_server.generation.frames import died, pack, receive

log = logging.getLogger("forebay.generation")

#: The processes' own code, for environments that need not have Forebay: alone on PYTHONPATH.
WORKERS = Path(__file__).with_name("workers")
#: Seconds for an engine to start: vLLM compiles and warms up.
LOAD_TIMEOUT_S = 900.0
#: Seconds that a call waits for a process that is being started anew.
RESTART_WAIT_S = 180.0
BACKOFF_S = (0.5, 30.0)
#: Environment that the process keeps; keys and tokens of the server are none of its business.
KEEP_ENV = (
    "PATH",
    "HOME",
    "LANG",
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
    "TMPDIR",
    "CUDA_HOME",
    "GLIBC_TUNABLES",  # large pages: docs/adr/0027
)
KEEP_PREFIXES = ("VLLM_", "CUDA_", "NCCL_", "OMP_", "RAY_", "HF_HOME", "HF_HUB_OFFLINE", "TORCH")


class ProcessEngine:
    """See interfaces.GenerationEngine. What all engines in processes have in common.

    Args:
        command: starts the process; the socket's number is put behind it.
        environment: variables beside those that it keeps.
        name: of the engine, for messages.
    """

    def __init__(
        self,
        spec: GenerationSpec,
        capabilities: Capabilities,
        command: Sequence[str],
        environment: Mapping[str, str],
        name: str,
    ) -> None:
        self._spec = spec
        self.capabilities = capabilities
        self._command = list(command)
        self._extra = dict(environment)
        self._name = name
        self._process: subprocess.Popen[bytes] | None = None
        self._sock: socket.socket | None = None
        self._connection: Connection | None = None
        self._restarting: asyncio.Task[None] | None = None
        self._closed = False
        self.restarts = 0

    # Life of the process. `load` runs in a thread.

    def load(self) -> None:
        """See GenerationEngine."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [*self._command, str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    env=self._environment(),
                    start_new_session=True,  # a group of its own, which is ended as a whole
                )
            except OSError as e:
                ours.close()
                raise FailedPrecondition(
                    f"{self._name}: {self._command[0]} cannot be run: {e.strerror}",
                    reason="MODEL_REJECTED",
                ) from None
        ours.settimeout(LOAD_TIMEOUT_S)
        try:
            ours.sendall(pack({"spec": asdict(self._spec)}))
            facts = receive(ours)
        except (OSError, EOFError) as e:
            self._end_process()
            ours.close()
            raise FailedPrecondition(
                f"{self._name} did not start ({e or 'its process ended'}); the log has its words",
                reason="MODEL_REJECTED",
            ) from None
        if facts["op"] == "failed":
            self._end_process()
            ours.close()
            raise FailedPrecondition(
                f"{self._name} refuses the model: {facts['message'][:500]}", reason="MODEL_REJECTED"
            )
        ours.setblocking(False)
        self._sock = ours

    def _environment(self) -> dict[str, str]:
        env = {k: v for k, v in os.environ.items() if k in KEEP_ENV or k.startswith(KEEP_PREFIXES)}
        env.update(self._extra)
        return env

    def _end_process(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        try:
            process.wait(5.0)
        except subprocess.TimeoutExpired:
            log.warning("%s of %s does not end; it is killed", self._name, self._spec.model)
        # Its own children are in its group: none may outlive it, they hold the memory.
        # Not there, or not ours: all have ended.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def close(self) -> None:
        """See GenerationEngine."""
        self._closed = True
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, the connection with it
                connection.loop.call_soon_threadsafe(connection.stop)
        sock, self._sock = self._sock, None
        if sock is not None and connection is None:
            sock.close()
        self._end_process()

    def check_health(self) -> None:
        """See GenerationEngine."""
        if self._closed or self._process is None or self._process.poll() is not None:
            raise died()

    # Requests, on the server's loop.

    async def _connected(self) -> Connection:
        """The connection; waits while the process is started anew."""
        if self._connection is not None and not self._connection.lost:
            return self._connection
        if self._restarting is not None:
            try:
                await asyncio.wait_for(asyncio.shield(self._restarting), RESTART_WAIT_S)
            except TimeoutError:
                raise died() from None
        if self._closed or self._sock is None:
            raise died()
        if self._connection is None or self._connection.lost:
            self._connection = Connection(self._sock, self._lost, self._spec.stream_interval_s)
            self._watch()
        return self._connection

    def _watch(self) -> None:
        """End the connection when the process ends: a child of it may hold the socket open."""
        process, connection = self._process, self._connection
        if process is None or connection is None:
            return
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):  # it has ended already: the socket says so too
            pidfd = os.pidfd_open(process.pid)

            def ended() -> None:
                loop.remove_reader(pidfd)
                os.close(pidfd)
                connection.stop()

            loop.add_reader(pidfd, ended)

    def _lost(self) -> None:
        """The process is gone: start another, unless this is the end."""
        self._sock = None
        if self._closed or self._restarting is not None:
            return
        log.error(
            "%s of %s@%d is gone; it is started anew",
            self._name,
            self._spec.model,
            self._spec.version,
        )
        self._restarting = asyncio.create_task(self._restart())

    async def _restart(self) -> None:
        wait = BACKOFF_S[0]
        while not self._closed:
            self.restarts += 1
            await asyncio.to_thread(self._end_process)
            await asyncio.sleep(wait)
            try:
                await asyncio.to_thread(self.load)
                break
            except FailedPrecondition as e:
                log.error("%s of %s does not start: %s", self._name, self._spec.model, e.message)
                wait = min(wait * 2, BACKOFF_S[1])
        self._restarting = None

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationDelta, None]:
        """See GenerationEngine."""
        connection = await self._connected()
        run = connection.start(request)
        try:
            async for delta in run.channel.read():
                yield delta
        finally:
            if not run.ended:
                await connection.abort(run)

    def info(self) -> Mapping[str, Any]:
        """See GenerationEngine."""
        pid = self._process.pid if self._process else 0
        out: dict[str, Any] = {
            "providers": [self._spec.engine],
            "pid": pid,
            "restarts": self.restarts,
        }
        out["memory_bytes"] = _group_memory(pid) if pid else 0
        if self._connection is not None:
            out.update(self._connection.stats)
        return out


_memory: dict[int, tuple[float, int]] = {}


def _group_memory(pid: int) -> int:
    """Resident bytes of a process and its children; read at most once a second."""
    at, value = _memory.get(pid, (0.0, 0))
    if time.monotonic() - at < 1:
        return value
    total, queue = 0, [pid]
    while queue:
        one = queue.pop()
        with contextlib.suppress(OSError, ValueError, IndexError):  # ended meanwhile
            status = Path(f"/proc/{one}/statm").read_text().split()
            total += int(status[1]) * os.sysconf("SC_PAGESIZE")
            for task in Path(f"/proc/{one}/task").iterdir():
                queue += [int(c) for c in (task / "children").read_text().split()]
    _memory[pid] = (time.monotonic(), total)
    return total
