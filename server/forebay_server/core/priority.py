"""Lower priority for threads that compute.

A model keeps all cores busy for tens of milliseconds. Threads that take calls, refuse some and send
answers need a core for microseconds, and must not wait for it that long: they keep the priority that
the process has, and engines give way.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def lower(by: int) -> None:
    """Lower this thread's priority for good. Does nothing where threads have none of their own."""
    if not hasattr(os, "setpriority") or not os.path.isdir("/proc/self/task"):
        return
    thread = threading.get_native_id()
    with contextlib.suppress(OSError):  # a sandbox may forbid it
        now = os.getpriority(os.PRIO_PROCESS, thread)
        os.setpriority(os.PRIO_PROCESS, thread, min(19, now + by))


def lowered(run: Callable[[], T], by: int) -> T:
    """Run on a thread of lower priority, which threads that it starts inherit; wait for it."""
    done: list[T] = []
    failed: list[BaseException] = []

    def body() -> None:
        lower(by)
        try:
            done.append(run())
        except BaseException as e:
            failed.append(e)

    thread = threading.Thread(target=body, name="load", daemon=True)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return done[0]
