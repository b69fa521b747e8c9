"""The loop of an engine's process: commands in, the rows of one engine step out as one frame.

One thread does all of it: it takes what commands have come, steps the engine, writes. A thread of
its own for reading would fight with the engine for Python's lock in every step.

Frames are a 4-byte length and a MessagePack object; what they say is in generation/frames.py.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import msgspec

MAX_FRAME = 256 << 20
#: Bytes that a server which does not read may leave unsent before the engine waits for it.
MAX_BACKLOG = 64 << 20
#: The engine's threads fill all cores; those that hand its tokens on need little, and go first.
NICENESS = 5
#: The first step of an engine that was idle waits while requests come with gaps of at most GAP_MS, and
#: GATHER_S in all.
GAP_MS, GATHER_S = 1, 0.015

Row = list[Any]


class Refused(ValueError):
    """A request that cannot run; `path` is the field that is to blame."""

    def __init__(self, message: str, path: str = "request") -> None:
        super().__init__(message)
        self.path = path


class Stepper(Protocol):
    """An engine that works on all its requests by steps."""

    @property
    def busy(self) -> bool:
        """Whether a step has something to do."""
        ...

    def facts(self) -> Mapping[str, Any]:
        """What the server may want to know, once."""
        ...

    def add(self, request: dict[str, Any]) -> list[Row]:
        """Begin a request; rows that say why it cannot. Raises Refused."""
        ...

    def abort(self, identifier: str) -> list[Row]:
        """Stop a request. The last of its rows is `aborted`."""
        ...

    def step(self) -> list[Row]:
        """One step, and the rows that it brought."""
        ...

    def stats(self) -> Mapping[str, Any]:
        """Numbers of now."""
        ...


class Link:
    """The socket to the server, which is never waited for while the engine has work."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        sock.setblocking(False)
        self._in = bytearray()
        self._out = bytearray()
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder().decode
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)

    def send(self, message: Mapping[str, Any]) -> None:
        """Write one frame, or keep what the socket does not take."""
        data = self._encode(message)
        self._out += struct.pack("<I", len(data)) + data
        self.flush()
        while len(self._out) > MAX_BACKLOG:
            self._wait(select.POLLOUT, None)
            self.flush()

    def flush(self) -> None:
        """Write what was kept, as far as the socket takes it."""
        while self._out:
            try:
                sent = self._sock.send(self._out)
            except BlockingIOError:
                return
            del self._out[:sent]

    def take(self, wait: bool, within_ms: int = 0) -> list[dict[str, Any]]:
        """All commands that have come, or that come within so many milliseconds. With `wait` there is
        at least one, however long it takes. Raises EOFError."""
        self.flush()
        while True:
            if self._out and wait:
                self._wait(select.POLLIN | select.POLLOUT, None)
                self.flush()
            elif not self._wait(select.POLLIN, None if wait else within_ms):
                return []
            self._fill()
            found = self._whole()
            if found or not wait:
                return found

    def _wait(self, events: int, timeout: int | None) -> bool:
        if events != select.POLLIN:
            self._poll.modify(self._sock, events)
        try:
            return bool(self._poll.poll(timeout))
        finally:
            if events != select.POLLIN:
                self._poll.modify(self._sock, select.POLLIN)

    def _fill(self) -> None:
        while True:
            try:
                data = self._sock.recv(1 << 18)
            except BlockingIOError:
                return
            if not data:
                raise EOFError
            self._in += data

    def _whole(self) -> list[dict[str, Any]]:
        found, at = [], 0
        while len(self._in) - at >= 4:
            (size,) = struct.unpack_from("<I", self._in, at)
            if size > MAX_FRAME:
                raise EOFError
            if len(self._in) - at - 4 < size:
                break
            found.append(self._decode(bytes(self._in[at + 4 : at + 4 + size])))
            at += 4 + size
        del self._in[:at]
        return found


def run(link: Link, build: Callable[[dict[str, Any]], Stepper]) -> None:
    """Build the engine, and serve until the server closes the socket."""
    spec = link.take(wait=True)[0]["spec"]
    try:
        stepper = build(spec)
    except BaseException as e:
        name = "" if isinstance(e, Refused) else f"{type(e).__name__}: "
        link.send({"op": "failed", "message": f"{name}{e}"[:2000]})
        raise
    link.send({"op": "ready", "pid": os.getpid(), **stepper.facts()})
    while True:
        rows: list[Row] = []
        for command in link.take(wait=False) if stepper.busy else together(link):
            op = command["op"]
            if op == "generate":
                request = command["request"]
                try:
                    rows += stepper.add(request)
                except Refused as e:
                    rows.append([request["id"], "error", "invalid", str(e)[:500], e.path])
                except Exception as e:
                    rows.append(failure(request["id"], e))
            elif op == "abort":
                rows += stepper.abort(command["id"])
            elif op == "stats":
                link.send({"op": "stats", "stats": stepper.stats()})
        if stepper.busy:
            rows += stepper.step()
        if rows:
            link.send({"op": "step", "deltas": rows})


def together(link: Link) -> list[dict[str, Any]]:
    """What comes to an engine that has nothing to do. Requests that come one after the other begin in
    one step: a step for the first alone would hold up all others for its whole length."""
    commands = link.take(wait=True)
    until = time.monotonic() + GATHER_S
    last = commands
    while any(c["op"] == "generate" for c in last) and time.monotonic() < until:
        last = link.take(wait=False, within_ms=GAP_MS)
        commands += last
    return commands


def failure(identifier: str, error: Exception) -> Row:
    """The row of a request that failed by the engine's fault."""
    return [identifier, "error", "internal", f"{type(error).__name__}: {error}"[:500]]


def trimmed(row: Row) -> Row:
    """The row without its trailing empty columns."""
    while not row[-1]:
        row.pop()
    return row


def yield_to_front() -> None:
    """Let the engine's threads, and those of its children, give way to those that pass tokens on.

    On a CPU they fill all cores, and who has 32 tokens to pass on would wait for a whole slice of
    each core. It needs a hundredth of the time: giving way costs the engine next to nothing.
    """
    queue = [os.getpid()]
    while queue:
        pid = queue.pop()
        with contextlib.suppress(OSError, ValueError):  # ended meanwhile
            for task in os.listdir(f"/proc/{pid}/task"):
                own = os.getpriority(os.PRIO_PROCESS, int(task))
                os.setpriority(os.PRIO_PROCESS, int(task), own + NICENESS)
                with open(f"/proc/{pid}/task/{task}/children") as file:
                    queue += [int(c) for c in file.read().split()]


def main(descriptor: int, build: Callable[[dict[str, Any]], Stepper]) -> None:
    """The process, from the socket's number to its end. Takes its children along."""
    status = 0
    try:
        run(Link(socket.socket(fileno=descriptor)), build)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the server has closed, or is gone
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 70  # the server starts a new process
    # Nothing is left to do, and interpreters with torch take seconds to say goodbye.
    with contextlib.suppress(OSError):  # the end comes anyway
        if os.getpgid(0) == os.getpid():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            os.killpg(os.getpid(), signal.SIGTERM)
    os._exit(status)
