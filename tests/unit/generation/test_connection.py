"""The way to an engine's process, with a test as the process."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from forebay_server.core.generation import GenerationRequest, SamplingParameters
from forebay_server.generation.connection import Connection
from forebay_server.generation.frames import pack, receive


class Process:
    """The other end of the socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    async def command(self, op: str) -> dict[str, Any]:
        """The next command of a kind."""
        while True:
            found = await asyncio.to_thread(receive, self._sock)
            if found["op"] == op:
                return found

    def step(self, *rows: Sequence[Any]) -> None:
        """What one step brought."""
        self._sock.sendall(pack({"op": "step", "deltas": rows}))

    def end(self) -> None:
        """Die."""
        self._sock.close()


@contextlib.asynccontextmanager
async def connected() -> AsyncIterator[tuple[Connection, Process]]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.settimeout(5)
    connection = Connection(ours, lambda: None, 0.0)
    try:
        yield connection, Process(theirs)
    finally:
        connection.stop()
        theirs.close()


#: How a request may end by itself while it is taken back.
LAST = {
    "finished": ["a", "delta", 0, "end", 1, "", None, None, "stop"],
    "failed": ["a", "error", "internal", "no memory", "request"],
}


@pytest.mark.parametrize("end", ["finished", "failed", "aborted", "died"])
async def test_an_abort_ends_however_the_request_does(end: str) -> None:
    async with connected() as (connection, process):
        run = connection.start(GenerationRequest("a", SamplingParameters(max_tokens=3)))
        await process.command("generate")
        process.step(["a", "delta", 0, "one", 2])
        abort = asyncio.create_task(connection.abort(run))
        await process.command("abort")
        if end == "died":
            process.end()
        else:
            process.step(*([LAST[end]] if end in LAST else []), ["a", "aborted"])
        await asyncio.wait_for(abort, 2)
        assert run.ended
        assert run.request.tally.completion == (3 if end == "finished" else 2)
