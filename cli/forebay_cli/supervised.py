"""What a process of `forebay up` hears from the one that started it, through its standard input.

The other end of that pipe is the supervisor's alone (see supervise): it ends when the supervisor does,
however that was. A signal would not tell of kill -9, and to ask the system for one is Linux's alone.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable


def listen(leave: Callable[[], object], end: Callable[[], object]) -> None:
    """Call `leave` when this process is to say that it leaves, and `end` when nobody is there to end
    it. Both are called on a thread of their own, which waits in a read and costs nothing else."""
    # Whatever this process starts must not read the supervisor's words.
    pipe = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)

    def run() -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended: so will the process
            with contextlib.suppress(OSError):
                while os.read(pipe, 64):
                    leave()
            end()

    threading.Thread(target=run, name="supervisor", daemon=True).start()
