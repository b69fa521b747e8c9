"""What many calls leave behind at once, handled once.

Calls that ride in one batch end one after the other on one thread. Within `together()` their ends
are collected, and passed on as one list when it is left: one look at a lock, one line of the usage
journal, one hand-over to the transport, instead of one each.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class _Local(threading.local):
    pending: dict[Collector[Any], list[Any]] | None = None
    engine_s: float = 0.0
    only_answers: bool = False


_local = _Local()


class Collector(Generic[T]):
    """Gives `flush` all that was added on this thread within `together()`; outside of it, at once.

    `flush` must not raise.
    """

    __slots__ = ("_flush",)

    def __init__(self, flush: Callable[[list[T]], None]) -> None:
        self._flush = flush

    def add(self, value: T) -> None:
        """Pass on, now or with others."""
        pending = _local.pending
        if pending is None:
            self._flush([value])
        else:
            pending.setdefault(self, []).append(value)


def pass_on() -> None:
    """Pass on what has been collected on this thread so far, where others will take a while yet."""
    if _local.pending:
        pending, _local.pending = _local.pending, {}
        for collector, values in pending.items():
            collector._flush(values)


def engine_time() -> float | None:
    """Seconds that engines took on this thread within the present `together()`; None outside of it
    (the thread does not work through a batch of calls), and where it is to run none."""
    return None if _local.pending is None or _local.only_answers else _local.engine_s


def only_answer() -> None:
    """This thread passes answers on, and runs no engine: an engine's next batch waits for them, and
    would wait for itself."""
    _local.only_answers = True


def add_engine_time(seconds: float) -> None:
    """An engine was run on this thread."""
    _local.engine_s += seconds


class together:
    """Context manager, named as it is used; the outermost one on a thread counts."""

    __slots__ = ("_outermost",)

    def __enter__(self) -> None:
        self._outermost = _local.pending is None
        if self._outermost:
            _local.pending = {}
            _local.engine_s = 0.0

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._outermost:
            pending, _local.pending = _local.pending, None
            for collector, values in (pending or {}).items():
                collector._flush(values)
