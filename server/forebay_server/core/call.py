"""One call, free of any protocol: what services and the data plane know of their caller.

A transport makes the call and gets its end by `on_end`; nobody else touches a gRPC context. A call
ends exactly once, whoever is first: an answer, an error, or the client's cancellation.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from forebay.errors import Cancelled, ForebayError, Internal
from forebay.methods import Method


@dataclass(frozen=True, slots=True)
class Principal:
    """Who calls: a key's id with its scopes, or `anonymous` where no key is needed."""

    key_id: str = "anonymous"
    scopes: frozenset[str] = frozenset()
    models: frozenset[str] = frozenset()

    def may_use(self, model: str) -> bool:
        """Whether the key is not limited to other models."""
        return not self.models or model in self.models


ANONYMOUS = Principal(scopes=frozenset({"infer", "read", "admin"}))


_NOT_BEGUN = [0]


class Serializable(Protocol):
    """A protobuf message, or a twin of one."""

    def SerializeToString(self) -> bytes: ...


@dataclass(slots=True)
class CallFacts:
    """What the access log, metrics and usage say of a call. Filled in as it goes."""

    model: str = ""
    version: int = 0
    items: int = 0
    tokens: int = 0
    truncated: int = 0
    cached: int = 0
    queue_s: float = 0.0
    compute_s: float = 0.0
    engine_s: float = 0.0
    batch_rows: int = 0


class Call:
    """One call, from its first message to its status.

    Attributes:
        method: the contract's facts about the method.
        metadata: lower-case keys; the last value of a repeated key.
        deadline: on the server's monotonic clock; None = none.
        principal: set by authentication.
        request: the parsed message of a unary call.
        background: nobody waits for it; its work goes behind that of all other calls.
        trailers: metadata for the end of the call.
        context: room for the pipeline's stages; nobody else's.
        origin: room for the transport; nobody else's.
        progress: number of stages begun, shared by the calls that began together.
        passed: the progress when the call ended; only those stages hear of its end.
    """

    __slots__ = (
        "_cancel_hooks",
        "_gone",
        "_lock",
        "_on_end",
        "background",
        "cancelled",
        "code",
        "context",
        "deadline",
        "error",
        "facts",
        "metadata",
        "method",
        "origin",
        "passed",
        "payload",
        "peer",
        "principal",
        "progress",
        "request",
        "request_id",
        "started",
        "trailers",
    )

    def __init__(
        self,
        method: Method,
        metadata: Mapping[str, str],
        *,
        started: float,
        deadline: float | None = None,
        peer: str = "",
        on_end: Callable[[Call], None],
    ) -> None:
        self.method = method
        self.metadata = metadata
        self.started = started
        self.deadline = deadline
        self.peer = peer
        self.principal = ANONYMOUS
        self.request: object = None
        self.request_id = ""
        self.facts = CallFacts()
        self.trailers: list[tuple[str, str]] = []
        self.context: dict[str, object] = {}
        self.origin: object = None
        self.progress: list[int] = _NOT_BEGUN
        self.passed = 0
        self.background = False
        self.cancelled = False
        self.code: str | None = None
        self.error: ForebayError | None = None
        self.payload: bytes = b""
        self._on_end = on_end
        self._cancel_hooks: list[Callable[[], None]] = []
        self._gone: ForebayError | None = None
        self._lock = threading.Lock()

    @property
    def ended(self) -> bool:
        """Whether the call has its status."""
        return self.code is not None

    def reply(self, message: Serializable) -> None:
        """End the call well. Serialises on the calling thread; ignored when it has ended."""
        if self.code is None:
            try:
                payload = message.SerializeToString()
            except Exception as e:
                self.fail(Internal("the answer could not be written"), cause=e)
                return
            self._end("OK", None, payload)

    def fail(self, error: ForebayError, cause: BaseException | None = None) -> None:
        """End the call with an error. `cause` goes to the log alone."""
        if cause is not None:
            error.__cause__ = cause
        if self._gone is not None and isinstance(error, Cancelled):
            error = self._gone  # work that was stopped says CANCELLED, whatever stopped it
        self._end(error.code, error, b"")

    def finish(self) -> None:
        """End a stream well: every message has been sent."""
        self._end("OK", None, b"")

    def cancel(self, error: ForebayError | None = None) -> None:
        """The client is gone: stop the work, then end the call with `error`, else as CANCELLED."""
        self._gone = error
        self.cancelled = True
        hooks, self._cancel_hooks = self._cancel_hooks, []
        for hook in hooks:
            hook()
        self.fail(error or Cancelled("the client took the call back"))

    def on_cancel(self, hook: Callable[[], None]) -> None:
        """Run `hook` when the client is gone; at once when it is gone already."""
        self._cancel_hooks.append(hook)
        if self.cancelled:
            hook()

    def _end(self, code: str, error: ForebayError | None, payload: bytes) -> None:
        with self._lock:
            if self.code is not None:
                return
            self.code = code
        self.error = error
        self.payload = payload
        self.passed = self.progress[0]
        self._cancel_hooks.clear()
        self._on_end(self)
