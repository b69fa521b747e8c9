"""What every call passes, whatever its lane and its kind, outermost first:

tracing, metrics, access log, errors, authentication, admission, then the service.

A stage sees lists of calls, so that the fast lane pays for it once a batch. Ends run in the
opposite order of begins, and only for stages that a call has passed: a stage that opened something
(a span, a permit) closes it exactly once, however the call ended.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Sequence
from math import inf
from typing import Protocol

from forebay.errors import DeadlineExceeded, ForebayError, Internal, QueueFull

from forebay_server.core.call import Call, runs_of

log = logging.getLogger("forebay.transport")

#: The trailer that every call ends with.
REQUEST_ID = "x-request-id"
#: The trailer that tells a client's retry policy after how many milliseconds to try again; -1: never.
#: Clients do not look at RetryInfo by themselves. https://github.com/grpc/proposal/blob/master/A6-client-retries.md
PUSHBACK = "grpc-retry-pushback-ms"
#: Seconds; a client's library should not stand still for longer than this: whoever calls may decide.
MAX_PUSHBACK_S = 10.0
#: Seconds after which to come again where too much waits for a number to be known.
TOO_MANY_RETRY_S = 0.1
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Stage(Protocol):
    """One cross-cutting concern."""

    def begin(self, calls: Sequence[Call]) -> None:
        """Look at calls that start. May `fail` some of them; those go no further."""
        ...

    def end(self, runs: Sequence[Sequence[Call]]) -> None:
        """Look at calls that have their status; see `runs_of`. Never raises for a good reason."""
        ...


class Pipeline:
    """The stages in order."""

    def __init__(self, stages: Sequence[Stage], outer: int = 0, waits: bool = False) -> None:
        """`outer`: so many of the first stages only watch: an answer need not wait for them.
        `waits`: a stage asks others over the network, so `begin` is not for an event loop."""
        self.stages = tuple(stages)
        self.waits = waits
        self._outer = outer

    def begin(self, calls: Sequence[Call]) -> list[Call]:
        """Pass all stages; returns the calls that may go on to their service."""
        live = list(calls)
        progress = [0]
        for call in live:
            call.progress = progress
        for stage in self.stages:
            progress[0] += 1
            try:
                stage.begin(live)
            except ForebayError as e:
                for call in live:
                    call.fail(e)
            except Exception as e:
                log.exception("stage %s failed", type(stage).__name__)
                for call in live:
                    call.fail(Internal("the call could not be admitted"), cause=e)
            live = [c for c in live if c.code is None]
            if not live:
                break
        return live

    def end(self, calls: Sequence[Call]) -> None:
        """Tell the stages that the calls have passed, innermost first."""
        self.end_first(calls)()

    def end_first(self, calls: Sequence[Call]) -> Callable[[], None]:
        """As `end`, but only for the stages whose word must stand before an answer is sent; gives
        what tells the others, for when the answers are on their way."""
        runs = runs_of(calls)
        for depth in range(len(self.stages), self._outer, -1):
            self._end(depth, runs)

        def rest() -> None:
            for depth in range(self._outer, 0, -1):
                self._end(depth, runs)

        return rest

    def _end(self, depth: int, runs: Sequence[Sequence[Call]]) -> None:
        through = [run for run in runs if run[0].passed >= depth]
        if not through:
            return
        stage = self.stages[depth - 1]
        try:
            stage.end(through)
        except Exception:
            log.exception("stage %s failed at the end of calls", type(stage).__name__)


def guard(run: Callable[[], None], calls: Sequence[Call]) -> None:
    """Run a service's handler; what it raises ends the calls that have no status yet."""
    try:
        run()
    except ForebayError as e:
        for call in calls:
            call.fail(e)
    except Exception as e:
        log.exception("handler of %s failed", calls[0].method.path if calls else "?")
        for call in calls:
            call.fail(internal(call), cause=e)


def internal(call: Call) -> Internal:
    """The error that strangers see for our own faults: the request id, no internals."""
    return Internal(
        f"internal error; the log has more under request id {call.request_id}",
        metadata={"request_id": call.request_id},
    )


def given_id(call: Call) -> str:
    """The id that the caller gives this call, if it is one that can be taken, else nothing."""
    given = call.metadata.get(REQUEST_ID, "")
    return given if _REQUEST_ID.fullmatch(given) else ""


def too_late(call: Call) -> DeadlineExceeded | None:
    """The error of a call that nobody waits for any more, if that is because of its deadline: clients
    reset calls that are late, often before the server's own clock says so."""
    if call.deadline is None or time.monotonic() < call.deadline - 0.001:
        return None
    return DeadlineExceeded.during_call()


def too_many() -> QueueFull:
    """The error of calls that are refused before any stage, because too much waits."""
    return QueueFull("too many calls wait; try again soon", retry_after_s=TOO_MANY_RETRY_S)


def trailers_of(call: Call) -> list[tuple[str, str]]:
    """All metadata for the end of a call."""
    own = [(REQUEST_ID, call.request_id)] if call.request_id else []
    if call.error is not None:
        own += _pushback(call.error, call.deadline)
    return [*own, *call.trailers]


def pushback_s(error: ForebayError) -> float:
    """Seconds after which a client's retry policy should try again; infinite: never."""
    wait = error.retry_after_s
    return wait if wait is not None and wait < MAX_PUSHBACK_S else inf


def _pushback(error: ForebayError, deadline: float | None) -> list[tuple[str, str]]:
    """What a client's retry policy hears, where it would not know better."""
    if error.retry_after_s is None and error.code != "RESOURCE_EXHAUSTED":
        return []  # UNAVAILABLE may pass at any time, what is spent or too large stays so
    wait = pushback_s(error)
    left = inf if deadline is None else deadline - time.monotonic()
    return [(PUSHBACK, str(max(1, round(wait * 1000))) if wait < left else "-1")]
