"""From an engine's steps to the caller of one request: what a slow reader has not taken is merged."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from forebay_server.core.generation import GenerationDelta


class Channel:
    """Deltas of one request. Lives on one loop; `answers` finish reasons end it.

    Args:
        interval_s: least time between two reads after the first: what comes meanwhile is merged.
    """

    def __init__(self, answers: int, interval_s: float = 0.0) -> None:
        self._interval = interval_s
        self._pending: list[GenerationDelta] = []
        self._open = answers
        self._error: BaseException | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def done(self) -> bool:
        """Whether nothing more will come."""
        return self._open <= 0 or self._error is not None

    def put(self, delta: GenerationDelta) -> None:
        """Add a delta; ignored after the end."""
        if self.done:
            return
        last = self._pending[-1] if self._pending else None
        if last is None or not merge(last, delta):
            self._pending.append(delta)
        if delta.finish_reason is not None:
            self._open -= 1
        self._wake()

    def fail(self, error: BaseException) -> None:
        """End with an error; what came before it is still read."""
        if not self.done:
            self._error = error
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def read(self) -> AsyncGenerator[GenerationDelta, None]:
        """All deltas to the end; then the error, if there was one."""
        last = 0.0
        while True:
            while self._pending:
                if self._interval:
                    now = asyncio.get_running_loop().time()
                    if last and not self.done and now - last < self._interval:
                        await asyncio.sleep(self._interval - (now - last))
                    last = asyncio.get_running_loop().time()
                yield self._pending.pop(0)
            if self._error is not None:
                raise self._error
            if self._open <= 0:
                return
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter


def merge(into: GenerationDelta, delta: GenerationDelta) -> bool:
    """Add a delta to the one before it, when both are plain text of one answer."""
    if into.index != delta.index or into.finish_reason is not None:
        return False
    if into.tool_calls or delta.tool_calls or into.refusal or delta.refusal:
        return False
    if (into.reasoning and delta.text) or (into.text and delta.reasoning):
        return False
    into.text += delta.text
    into.reasoning += delta.reasoning
    into.tokens += delta.tokens
    into.logprobs = [*into.logprobs, *delta.logprobs]
    into.finish_reason = delta.finish_reason
    into.stop_reason = delta.stop_reason
    return True
