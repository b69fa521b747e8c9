"""The way to an engine in a process of its own and, often, in another environment.

One message per engine step comes over a Unix socket. When the process dies, its requests fail as
Unavailable (ENGINE_DIED), and a new one is started with back-off; calls that come meanwhile wait
for it as long as their deadline and RESTART_WAIT_S allow.

Frames are a 4-byte length and a MessagePack object. To the process: first `spec`, then `generate`,
`abort`, `stats`. From it: `ready` or `failed`, then `step` with rows:

    [id, "prompt", cached tokens, tokens]     the prompt was worked on
    [id, "delta", index, text, tokens, reasoning, calls, logprobs, finish, stop, reasoning tokens]
    [id, "more", 0, tokens]                   tokens that an abort cut off on their way
    [id, "aborted"]
    [id, "error", kind, message, path]
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import struct
import subprocess
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
from forebay.errors import FailedPrecondition, Internal, InvalidArgument, Unavailable

from forebay_server.core.generation import (
    Capabilities,
    GenerationDelta,
    GenerationRequest,
    GenerationSpec,
    Structure,
    TokenProbability,
    ToolCallPiece,
    ToolSpec,
)
from forebay_server.generation.channel import Channel
from forebay_server.generation.json_regex import regex_of

log = logging.getLogger("forebay.generation")

#: Seconds for an engine to start: vLLM compiles and warms up.
LOAD_TIMEOUT_S = 900.0
#: Seconds that a call waits for a process that is being started anew.
RESTART_WAIT_S = 180.0
BACKOFF_S = (0.5, 30.0)
#: Seconds for an abort to be acknowledged.
ABORT_S = 5.0
STATS_EVERY_S = 1.0
#: Environment that the process keeps; keys and tokens of the server are none of its business.
KEEP_ENV = ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "LD_PRELOAD", "TMPDIR", "CUDA_HOME")
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
        self._connection: _Connection | None = None
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
            data = msgspec.msgpack.encode({"spec": asdict(self._spec)})
            ours.sendall(struct.pack("<I", len(data)) + data)
            facts = msgspec.msgpack.decode(_receive(ours))
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
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def close(self) -> None:
        """See GenerationEngine."""
        self._closed = True
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(RuntimeError):
                connection.loop.call_soon_threadsafe(connection.stop)
        sock, self._sock = self._sock, None
        if sock is not None and connection is None:
            sock.close()
        self._end_process()

    def check_health(self) -> None:
        """See GenerationEngine."""
        if self._closed or self._process is None or self._process.poll() is not None:
            raise _died()

    # Requests, on the server's loop.

    async def _connected(self) -> _Connection:
        """The connection; waits while the process is started anew."""
        if self._connection is not None and not self._connection.lost:
            return self._connection
        if self._restarting is not None:
            try:
                await asyncio.wait_for(asyncio.shield(self._restarting), RESTART_WAIT_S)
            except TimeoutError:
                raise _died() from None
        if self._closed or self._sock is None:
            raise _died()
        if self._connection is None or self._connection.lost:
            self._connection = _Connection(self._sock, self._lost, self._spec.stream_interval_s)
            self._watch()
        return self._connection

    def _watch(self) -> None:
        """End the connection when the process ends: a child of it may hold the socket open."""
        process, connection = self._process, self._connection
        if process is None or connection is None:
            return
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):
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


class _Run:
    """One request that the process works on."""

    def __init__(self, request: GenerationRequest, interval_s: float) -> None:
        self.request = request
        self.channel = Channel(request.sampling.n, interval_s)
        self.open = request.sampling.n
        self.aborted: asyncio.Future[None] | None = None

    @property
    def ended(self) -> bool:
        """Whether the process has no part of it any more."""
        return self.open <= 0


class _Connection:
    """One life of the process, on one loop."""

    def __init__(self, sock: socket.socket, lost: Any, interval_s: float) -> None:
        self._interval_s = interval_s
        self.loop = asyncio.get_running_loop()
        self.lost = False
        self.stats: dict[str, Any] = {}
        self._tell = lost
        self._runs: dict[str, _Run] = {}
        self._outbox: list[bytes] = []
        self._encoder = msgspec.msgpack.Encoder()
        self._ready: asyncio.Future[asyncio.StreamWriter] = self.loop.create_future()
        self._task = asyncio.create_task(self._serve(sock))
        self._poll = asyncio.create_task(self._poll_stats())

    def stop(self) -> None:
        """End the connection; the process ends with it."""
        self._task.cancel()

    def start(self, request: GenerationRequest) -> _Run:
        """Send a request."""
        run = self._runs[request.id] = _Run(request, self._interval_s)
        self._send({"op": "generate", "request": _plain(request)})
        return run

    async def abort(self, run: _Run) -> None:
        """Take a request back; its tally is exact afterwards."""
        run.aborted = self.loop.create_future()
        self._send({"op": "abort", "id": run.request.id})
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(run.aborted, ABORT_S)
        self._runs.pop(run.request.id, None)

    def _send(self, message: dict[str, Any]) -> None:
        data = self._encoder.encode(message)
        frame = struct.pack("<I", len(data)) + data
        if self._ready.done() and not self.lost:
            self._ready.result().write(frame)
        else:
            self._outbox.append(frame)

    async def _serve(self, sock: socket.socket) -> None:
        try:
            reader, writer = await asyncio.open_connection(sock=sock, limit=1 << 20)
            for frame in self._outbox:
                writer.write(frame)
            self._outbox.clear()
            self._ready.set_result(writer)
            decode = msgspec.msgpack.Decoder().decode
            while True:
                (size,) = struct.unpack("<I", await reader.readexactly(4))
                message = decode(await reader.readexactly(size))
                if message["op"] == "step":
                    for row in message["deltas"]:
                        self._deliver(row)
                elif message["op"] == "stats":
                    self.stats = message["stats"]
        except (asyncio.IncompleteReadError, OSError, asyncio.CancelledError):
            pass
        except Exception:
            log.exception("reading from an engine failed")
        finally:
            self.lost = True
            self._poll.cancel()
            if self._ready.done():
                self._ready.result().close()
            for run in self._runs.values():
                run.open = 0
                run.channel.fail(_died())
                if run.aborted is not None and not run.aborted.done():
                    run.aborted.set_result(None)
            self._runs.clear()
            self._tell()

    async def _poll_stats(self) -> None:
        while True:
            await asyncio.sleep(STATS_EVERY_S)
            self._send({"op": "stats"})

    def _deliver(self, row: list[Any]) -> None:
        """One row of a step frame."""
        run = self._runs.get(row[0])
        if run is None:
            return
        kind = row[1]
        if kind == "delta":
            row = row + [None] * (11 - len(row))
            delta = _delta(row)
            run.request.tally.completion += delta.tokens
            run.request.tally.reasoning += row[10] or 0
            if delta.finish_reason is not None:
                run.open -= 1
                if run.ended:
                    self._runs.pop(row[0], None)
            run.channel.put(delta)
        elif kind in ("prompt", "more"):
            if kind == "prompt":
                run.request.tally.prompt = len(run.request.prompt_ids)
                run.request.tally.cached = row[2]
            run.request.tally.completion += row[3] if len(row) > 3 else 0
        elif kind == "aborted":
            run.open = 0
            self._runs.pop(row[0], None)
            if run.aborted is not None and not run.aborted.done():
                run.aborted.set_result(None)
        elif kind == "error":
            run.open = 0
            self._runs.pop(row[0], None)
            run.channel.fail(_error(*row[2:]))


def _error(kind: str, message: str, path: str = "request") -> Exception:
    if kind == "invalid":
        return InvalidArgument.at(path, f"the engine refuses it: {message}")
    if kind == "broken":
        return Internal(message, reason="OUTPUT_INVALID")
    if kind == "dead":
        return _died()
    log.error("an engine failed on a request: %s", message)
    return Internal("the engine failed on this request", reason="ITEM_FAILED")


def _delta(row: list[Any]) -> GenerationDelta:
    _, _, index, text, tokens, reasoning, calls, logprobs, finish, stop, _ = row
    return GenerationDelta(
        index or 0,
        text or "",
        reasoning or "",
        [ToolCallPiece(*c) for c in calls or ()],
        tokens or 0,
        [_probability(p, top) for p, top in logprobs or ()],
        finish,
        stop or "",
    )


def _probability(row: list[Any], top: list[Any] | None = None) -> TokenProbability:
    token, text, logprob = row
    return TokenProbability(
        token, text, logprob, text.encode(), tuple(_probability(t) for t in top or ())
    )


def _plain(request: GenerationRequest) -> dict[str, Any]:
    """The request as the process reads it."""
    chat = request.chat
    return {
        "id": request.id,
        "prompt_ids": list(request.prompt_ids),
        "sampling": {
            **{
                name: getattr(request.sampling, name)
                for name in request.sampling.__dataclass_fields__
                if name != "logit_bias"
            },
            "logit_bias": {str(k): v for k, v in request.sampling.logit_bias.items()},
        },
        "structure": _structure(request.structure),
        "adapter": request.adapter,
        "priority": request.priority,
        "chat": None
        if chat is None
        else {
            "messages": list(chat.messages),
            "tools": [_tool(t) for t in chat.tools],
            "tool_mode": chat.tool_mode,
            "tool_name": chat.tool_name,
            "parallel_tool_calls": chat.parallel_tool_calls,
        },
    }


def _tool(tool: ToolSpec) -> dict[str, Any]:
    out = tool.as_openai()
    if tool.strict:
        out["function"]["strict"] = True
    return out


def _structure(structure: Structure | None) -> list[Any] | None:
    """Schemas as expressions where those cover them: xgrammar's JSON grammar lets control characters
    into strings, which no JSON parser takes, and white space without end between parts."""
    if structure is None:
        return None
    if structure.kind == "json_schema":
        regex = regex_of(msgspec.json.decode(str(structure.value)))
        if regex is not None:
            return ["regex", regex]
    return [structure.kind, structure.value]


def _receive(sock: socket.socket) -> bytes:
    (size,) = struct.unpack("<I", _exactly(sock, 4))
    return _exactly(sock, size)


def _exactly(sock: socket.socket, size: int) -> bytes:
    parts = b""
    while len(parts) < size:
        part = sock.recv(size - len(parts))
        if not part:
            raise EOFError
        parts += part
    return parts


def _died() -> Unavailable:
    return Unavailable(
        "the model's engine died; it is started anew", reason="ENGINE_DIED", retry_after_s=5.0
    )


_memory: dict[int, tuple[float, int]] = {}


def _group_memory(pid: int) -> int:
    """Resident bytes of a process and its children; read at most once a second."""
    at, value = _memory.get(pid, (0.0, 0))
    if time.monotonic() - at < 1:
        return value
    total, queue = 0, [pid]
    while queue:
        one = queue.pop()
        with contextlib.suppress(OSError, ValueError, IndexError):
            status = Path(f"/proc/{one}/statm").read_text().split()
            total += int(status[1]) * os.sysconf("SC_PAGESIZE")
            for task in Path(f"/proc/{one}/task").iterdir():
                queue += [int(c) for c in (task / "children").read_text().split()]
    _memory[pid] = (time.monotonic(), total)
    return total
