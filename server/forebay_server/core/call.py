"""One call, free of any protocol: what services and the data plane know of their caller.

A transport makes the call and gets its end by `on_end`; nobody else touches a gRPC context. A call
ends exactly once, whoever is first: an answer, an error, or the client's cancellation.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
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
_NOTHING: Mapping[str, object] = MappingProxyType({})
#: Decides who ends a call. One for all calls: it is held for less time than a lock of each call's
#: own takes to make.
_ENDING = threading.Lock()


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
        message: the bytes of a batched call's request.
        request: the parsed message of a unary call.
        background: nobody waits for it; its work goes behind that of all other calls.
        facts: what becomes known of it; calls that share a block of rows share these too.
        trailers: metadata for the end of the call, beside its request id; see `trail`.
        context: what stages and services keep with a few calls; see `note`.
        permit: what admission gave; nobody else's.
        origin: room for the transport; nobody else's.
        recipe: how the transport may answer such calls by itself; see dataplane/recipes.py.
        progress: number of stages begun, shared by the calls that began together.
        passed: the progress when the call ended; only those stages hear of its end.
    """

    __slots__ = (
        "_cancel_hooks",
        "_facts",
        "_gone",
        "_on_end",
        "background",
        "cancelled",
        "code",
        "context",
        "deadline",
        "error",
        "message",
        "metadata",
        "method",
        "origin",
        "passed",
        "payload",
        "peer",
        "permit",
        "principal",
        "progress",
        "recipe",
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
        self.message = b""
        self.request: object = None
        self.request_id = ""
        self.trailers: Sequence[tuple[str, str]] = ()
        self.context: Mapping[str, object] = _NOTHING
        self.permit: object = None
        self.origin: object = None
        self.recipe: object = None
        self.progress: list[int] = _NOT_BEGUN
        self.passed = 0
        self.background = False
        self.cancelled = False
        self.code: str | None = None
        self.error: ForebayError | None = None
        self.payload: bytes = b""
        self._on_end = on_end
        self._facts: CallFacts | None = None
        self._cancel_hooks: list[Callable[[], None]] | None = None
        self._gone: ForebayError | None = None

    @property
    def facts(self) -> CallFacts:
        """See the class."""
        facts = self._facts
        if facts is None:
            facts = self._facts = CallFacts()
        return facts

    @facts.setter
    def facts(self, facts: CallFacts) -> None:
        self._facts = facts

    def note(self, name: str, value: object) -> None:
        """Keep something in the call's context."""
        self.context = {**self.context, name: value}

    def trail(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Add metadata for the end of the call."""
        self.trailers = (*self.trailers, *pairs)

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
        hooks, self._cancel_hooks = self._cancel_hooks, None
        for hook in hooks or ():
            hook()
        self.fail(error or Cancelled("the client took the call back"))

    def on_cancel(self, hook: Callable[[], None]) -> None:
        """Run `hook` when the client is gone; at once when it is gone already."""
        hooks = self._cancel_hooks  # another thread that ends the call takes them away meanwhile
        if hooks is None:
            hooks = self._cancel_hooks = []
        hooks.append(hook)
        if self.cancelled:
            hook()

    def _end(self, code: str, error: ForebayError | None, payload: bytes) -> None:
        with _ENDING:
            if self.code is not None:
                return
            self.code = code
        self.error = error
        self.payload = payload
        self._tell()

    def _tell(self) -> None:
        self.passed = self.progress[0]
        self._cancel_hooks = None
        self._on_end(self)


def reply_all(calls: Sequence[Call], payloads: Iterable[bytes]) -> None:
    """End calls well, each with its serialised answer. Those that have ended are passed over."""
    live = []
    with _ENDING:
        for call, payload in zip(calls, payloads, strict=True):
            if call.code is None:
                call.code = "OK"
                call.payload = payload
                live.append(call)
    for call in live:
        call._tell()


def runs_of(calls: Sequence[Call]) -> list[list[Call]]:
    """Ended calls, by neighbours that ended alike: same method, key, status, facts and context, at
    the same stage. What is said of the first holds for all; only times, ids and peers differ."""
    out: list[list[Call]] = []
    last: Call | None = None
    for call in calls:
        if (
            last is not None
            and call._facts is last._facts
            and call.code == last.code
            and call.error is last.error
            and call.method is last.method
            and call.principal is last.principal
            and call.context is last.context
            and call.passed == last.passed
        ):
            out[-1].append(call)
        else:
            out.append([call])
            last = call
    return out
