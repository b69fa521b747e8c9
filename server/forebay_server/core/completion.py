"""The answer to one request: thread-safe, done exactly once, in the order of its items."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from forebay.errors import Cancelled

from forebay_server.core.interfaces import EngineRequest, Result, Timing

if TYPE_CHECKING:
    from forebay_server.core.interfaces import Completion

log = logging.getLogger("forebay.batcher")


class RequestCompletion:
    """A request on its way through queue and batches. See interfaces.Completion.

    Items may ride in several batches and in any order. The first item that fails decides.

    Args:
        enqueued: when it was submitted, on the client's clock.
        on_end: called once when done, before the callbacks, on the thread that completes.
    """

    __slots__ = (
        "_callbacks",
        "_done",
        "_error",
        "_failed_item",
        "_left",
        "_lock",
        "_on_end",
        "_results",
        "enqueued",
        "request",
        "timing",
        "waiting_rows",
        "waiting_tokens",
    )

    def __init__(
        self,
        request: EngineRequest,
        enqueued: float,
        on_end: Callable[[RequestCompletion], None] | None = None,
    ) -> None:
        self.request = request
        self.enqueued = enqueued
        self.timing = Timing()
        #: Rows and tokens of this request that wait in the queue; kept by the queue.
        self.waiting_rows = 0
        self.waiting_tokens = 0
        self._results: list[Result | None] = [None] * len(request.items)
        self._left = len(request.items)
        self._done = False
        self._error: BaseException | None = None
        self._failed_item: int | None = None
        self._callbacks: list[Callable[[Completion], None]] = []
        self._on_end = on_end
        self._lock = threading.Lock()

    def done(self) -> bool:
        """Whether it has its answer."""
        return self._done

    def result(self) -> Sequence[Result]:
        """The results in order; raises the error."""
        if self._error is not None:
            raise self._error
        if not self._done:
            raise RuntimeError("the request is not done")
        return self._results  # type: ignore[return-value]

    def error(self) -> BaseException | None:
        """The error, None when it succeeded."""
        return self._error

    @property
    def failed_item(self) -> int | None:
        """The item that failed, when one item is to blame."""
        return self._failed_item

    def cancel(self) -> None:
        """Take the request back. Nothing happens when it is done already."""
        self.fail(Cancelled("the request was taken back"))

    def add_done_callback(self, callback: Callable[[Completion], None]) -> None:
        """Call `callback` once, when done. What it raises is logged and hurts nobody else."""
        with self._lock:
            if not self._done:
                self._callbacks.append(callback)
                return
        self._call(callback)

    def set_result(self, index: int, result: Result) -> None:
        """One item's result. Ignored when the request is done, or the item has one."""
        with self._lock:
            if self._done or self._results[index] is not None:
                return
            self._results[index] = result
            self._left -= 1
            if self._left:
                return
            self._done = True
        self._end()

    def fail(self, error: BaseException, item: int | None = None) -> bool:
        """End with an error; False when it is done already."""
        with self._lock:
            if self._done:
                return False
            # The error first: a reader who sees done without the lock must find it.
            self._error = error
            self._failed_item = item
            self._results = []
            self._done = True
        self._end()
        return True

    def _end(self) -> None:
        if self._on_end is not None:
            self._on_end(self)
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            self._call(callback)

    def _call(self, callback: Callable[[Completion], None]) -> None:
        try:
            callback(self)
        except Exception:
            log.exception("a done callback raised (request %s)", self.request.request_id)
