"""The way to an engine's process: what it brings, to the channels of the requests."""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections.abc import Callable, Mapping
from typing import Any, cast

import msgspec

from forebay_server.core.generation import GenerationRequest
from forebay_server.generation.channel import Channel
from forebay_server.generation.frames import delta_of, died, error_of, pack, plain

log = logging.getLogger("forebay.generation")

#: Seconds for an abort to be acknowledged. It waits for the step that runs, which on a busy CPU, with
#: long prompts, takes seconds; what that step brings counts.
ABORT_S = 60.0
STATS_EVERY_S = 1.0


class Run:
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


class Connection(asyncio.Protocol):
    """One life of the process, on one loop.

    Args:
        lost: called once, when it has ended.
        interval_s: least time between two messages of a stream.
    """

    def __init__(self, sock: socket.socket, lost: Callable[[], None], interval_s: float) -> None:
        self._interval_s = interval_s
        self.loop = asyncio.get_running_loop()
        self.lost = False
        self.stats: Mapping[str, Any] = {}
        self._tell = lost
        self._sock = sock
        self._runs: dict[str, Run] = {}
        self._early: list[bytes] = []
        self._buffer = bytearray()
        self._decode = msgspec.msgpack.Decoder().decode
        self._transport: asyncio.Transport | None = None
        self._opening = asyncio.create_task(self._open())
        self._poll = asyncio.create_task(self._poll_stats())

    def stop(self) -> None:
        """End the connection; the process ends with it."""
        if self._transport is not None:
            self._transport.abort()
        else:
            self._opening.cancel()
            self.connection_lost(None)

    def start(self, request: GenerationRequest) -> Run:
        """Send a request."""
        run = self._runs[request.id] = Run(request, self._interval_s)
        self._send({"op": "generate", "request": plain(request)})
        return run

    async def abort(self, run: Run) -> None:
        """Take a request back; its tally is exact afterwards."""
        run.aborted = self.loop.create_future()
        self._send({"op": "abort", "id": run.request.id})
        try:
            await asyncio.wait_for(run.aborted, ABORT_S)
        except TimeoutError:
            log.error("an engine does not acknowledge that %s ends", run.request.id)
        self._runs.pop(run.request.id, None)

    def _send(self, message: Mapping[str, Any]) -> None:
        frame = pack(message)
        if self._transport is None:
            self._early.append(frame)
        elif not self.lost:
            self._transport.write(frame)

    async def _open(self) -> None:
        try:
            await self.loop.create_connection(lambda: self, sock=self._sock)
        except OSError:
            self.connection_lost(None)

    async def _poll_stats(self) -> None:
        while True:
            await asyncio.sleep(STATS_EVERY_S)
            self._send({"op": "stats"})

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        self._transport = cast(asyncio.Transport, transport)
        for frame in self._early:
            self._transport.write(frame)
        self._early.clear()

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        buffer = self._buffer
        buffer += data
        at = 0
        try:
            while len(buffer) - at >= 4:
                (size,) = struct.unpack_from("<I", buffer, at)
                if len(buffer) - at - 4 < size:
                    break
                self._message(self._decode(memoryview(buffer)[at + 4 : at + 4 + size]))
                at += 4 + size
        except Exception:
            log.exception("reading from an engine failed")
            self.stop()
        del buffer[:at]

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        if self.lost:
            return
        self.lost = True
        self._poll.cancel()
        for run in list(self._runs.values()):
            self._ended(run)
            run.channel.fail(died())
        self._tell()

    def _message(self, message: Any) -> None:
        if message["op"] == "step":
            for row in message["deltas"]:
                run = self._runs.get(row[0])
                if run is not None:
                    self._deliver(run, row)
        elif message["op"] == "stats":
            self.stats = message["stats"]

    def _deliver(self, run: Run, row: list[Any]) -> None:
        """One row of a step frame."""
        kind = row[1]
        tally = run.request.tally
        if kind == "delta":
            delta, reasoned = delta_of(row)
            tally.completion += delta.tokens
            tally.reasoning += reasoned
            if delta.finish_reason is not None:
                run.open -= 1
                if run.ended:
                    self._ended(run)
            run.channel.put(delta)
        elif kind == "prompt":
            tally.prompt = len(run.request.prompt_ids)
            tally.cached = row[2]
        elif kind == "aborted":
            self._ended(run)
        elif kind == "error":
            self._ended(run)
            run.channel.fail(error_of(*row[2:]))

    def _ended(self, run: Run) -> None:
        """The process has no part of it any more. An abort that is under way need not be heard: of a
        request that ended by itself meanwhile, nobody would hear it."""
        run.open = 0
        self._runs.pop(run.request.id, None)
        if run.aborted is not None and not run.aborted.done():
            run.aborted.set_result(None)
