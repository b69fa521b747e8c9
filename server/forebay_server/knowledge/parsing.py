"""Parsing in a process of its own, with limits: a hostile document costs only itself."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from forebay_server.knowledge.parsers import Parsed, ParseError

#: Seconds without documents after which the process of the parsers ends: it gives its memory back.
IDLE_S = 60.0
#: Seconds beyond its wall limit after which a child that did not end by itself is killed.
GRACE_S = 5.0


@dataclass(frozen=True, slots=True)
class ParseLimits:
    """Of one document. `wall_s` is real time, `cpu_s` the process's own."""

    wall_s: float = 120.0
    cpu_s: int = 60
    memory_bytes: int = 2 << 30


class DocumentParser:
    """Reads files, each in a process of its own that is forked from one with the parsers loaded
    (parse_worker.py); that one is started when a document comes. Lives on one event loop."""

    def __init__(self, limits: ParseLimits | None = None) -> None:
        self._limits = limits or ParseLimits()
        self._process: asyncio.subprocess.Process | None = None
        self._orders: socket.socket | None = None
        self._lock = asyncio.Lock()
        self._running = 0
        self._idle: asyncio.TimerHandle | None = None

    async def parse(self, path: Path, name: str, password: str = "") -> Parsed:
        """The text of a stored file.

        Raises:
            ParseError: with the reason that the caller sees; TIMEOUT, MEMORY and CRASHED among
                them.
        """
        order = {"path": str(path), "name": name, "password": password, **asdict(self._limits)}
        self._running += 1
        try:
            lines = await self._ask(order)
            if lines is None:  # the process that forks was gone, not the document's
                lines = await self._ask(order)
        finally:
            self._running -= 1
            self._rest()
        return self._outcome(lines or [])

    async def close(self) -> None:
        """End the process. Idempotent."""
        if self._idle is not None:
            self._idle.cancel()
        process, self._process = self._process, None
        if self._orders is not None:
            self._orders.close()
            self._orders = None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()  # its children end with it
            await process.wait()

    async def _ask(self, order: dict[str, Any]) -> list[bytes] | None:
        """The lines that came back; None when the process that forks is gone."""
        loop = asyncio.get_running_loop()
        begun: asyncio.Future[int] = loop.create_future()

        def tell(pid: int) -> None:
            loop.call_soon_threadsafe(lambda: begun.done() or begun.set_result(pid))

        # One order is on its way at a time: orders have no bounds on a stream socket but these.
        async with self._lock:
            orders = await self._started()
            read, write = os.pipe()
            try:
                socket.send_fds(orders, [json.dumps(order).encode() + b"\n"], [write])
            except OSError:
                os.close(read)
                await self.close()
                return None
            finally:
                os.close(write)
            seconds = self._limits.wall_s + GRACE_S
            reading = loop.run_in_executor(None, _read_reply, read, seconds, tell)
            pid = await begun
            if not pid:
                await self.close()
                return None
        try:
            return await asyncio.shield(reading)
        except asyncio.CancelledError:
            _kill(pid)
            raise

    async def _started(self) -> socket.socket:
        if self._orders is not None and self._process and self._process.returncode is None:
            return self._orders
        await self.close()
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "forebay_server.knowledge.parse_worker",
                stdin=theirs.fileno(),
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.DEVNULL,
            )
        self._orders = ours
        return ours

    def _rest(self) -> None:
        """End the process when nothing has come for a while."""
        if self._idle is not None:
            self._idle.cancel()

        def end() -> None:
            if self._running == 0 and self._orders is not None:
                self._orders.close()  # it sees the end, and ends
                self._orders = None

        self._idle = asyncio.get_running_loop().call_later(IDLE_S, end)

    def _outcome(self, lines: list[bytes]) -> Parsed:
        reply: dict[str, Any] | None = None
        code = 0
        for line in lines:
            if line.startswith(b"{") and line.endswith(b"}"):
                reply = json.loads(line)
            elif line.lstrip(b"-").isdigit():
                code = int(line)
        if reply is None:
            limits = self._limits
            if code == -signal.SIGALRM:
                raise ParseError("TIMEOUT", f"it took longer than {limits.wall_s:g} s to read")
            if code == -signal.SIGXCPU or code == -signal.SIGKILL:
                raise ParseError("TIMEOUT", f"it took more than {limits.cpu_s} s of CPU")
            raise ParseError("CRASHED", "the parser ended on it")
        if "error" in reply:
            raise ParseError(reply["error"], reply["message"])
        reply["headings"] = [(a, b, c) for a, b, c in reply["headings"]]
        return Parsed(**reply)


def _read_reply(pipe: int, seconds: float, tell: Callable[[int], None]) -> list[bytes]:
    """All lines of a reply; closes the pipe. `tell` gets the child's pid, 0 when there is none. A
    child that is not done in time is killed. (No pipe of the event loop's: uvloop closes those twice,
    and the second time it may be another thread's new file.)"""
    data = bytearray()
    pid = 0
    end = time.monotonic() + seconds
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    try:
        while True:
            if not poll.poll(max(0.0, end - time.monotonic()) * 1e3):
                _kill(pid)
                return [str(-signal.SIGALRM).encode()]
            piece = os.read(pipe, 1 << 20)
            if not piece:
                return [line for line in bytes(data).split(b"\n") if line]
            data += piece
            first, ended, _ = data.partition(b"\n")
            if not pid and ended and first:
                pid = int(first)
                tell(pid)
    finally:
        os.close(pipe)
        tell(pid)


def _kill(pid: int) -> None:
    if pid:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
