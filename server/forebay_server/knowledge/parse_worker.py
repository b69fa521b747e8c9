"""The process that reads documents: `python -m forebay_server.knowledge.parse_worker`.

It has the parsers loaded and forks for every document, so a document costs a fork, not the start of
an interpreter, and is alone in its process all the same. stdin is a Unix socket. An order is one line
of JSON (path, name, password, limits) with a pipe's descriptor; the pipe gets three lines: the
child's pid, the child's answer, and what the child ended with. A line that the child could not write
is missing.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import logging
import os
import resource
import select
import signal
import socket
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from forebay_server.knowledge.parsers import ParseError, parse

_PR_SET_PDEATHSIG = 1
#: Libraries by a name's ending. Loaded before the fork, so that the next document has them too.
_LIBRARIES = {"pdf": "pypdfium2", "docx": "docx", "html": "selectolax.lexbor", "htm": "selectolax.lexbor"}  # fmt: skip


def main() -> int:
    """Take orders until the server is gone."""
    logging.disable(logging.CRITICAL)  # parsers talk about broken files
    _die_with_parent()
    orders = socket.socket(fileno=0)
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    running: dict[int, int] = {}  # pid -> pipe
    while True:
        ready, _, _ = select.select([orders, woken], [], [])
        if woken in ready:
            os.read(woken, 512)
            _reap(running)
        if orders in ready:
            line, pipes, _, _ = socket.recv_fds(orders, 1 << 16, 1)
            if not line:
                return 0
            _start(json.loads(line), pipes[0], running, (0, woken, wake))


def _start(order: dict[str, Any], pipe: int, running: dict[int, int], own: tuple[int, ...]) -> None:
    # What is not there, the child misses too, and says so.
    with contextlib.suppress(KeyError, ImportError):
        importlib.import_module(_LIBRARIES[order["name"].lower().rpartition(".")[2]])
    gc.freeze()  # the child shares these pages
    pid = os.fork()
    if pid:
        running[pid] = pipe
        return
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for other in (*own, *running.values()):
            os.close(other)
        with os.fdopen(pipe, "wb") as out:
            out.write(b"%d\n" % os.getpid())
            out.flush()
            out.write(json.dumps(_read(order)).encode() + b"\n")
        code = 0
    finally:
        os._exit(code)


def _read(order: dict[str, Any]) -> dict[str, Any]:
    """The answer to an order, in its child."""
    _die_with_parent()
    memory, seconds = int(order["memory_bytes"]), int(order["cpu_s"])
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # it writes no file
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends it, whatever it does
    signal.setitimer(signal.ITIMER_REAL, float(order["wall_s"]))
    try:
        data = Path(order["path"]).read_bytes()
        return asdict(parse(order["name"], data, order.get("password", "")))
    except ParseError as e:
        return {"error": e.reason, "message": str(e)}
    except MemoryError:
        return {"error": "MEMORY", "message": f"it needs more than {memory >> 20} MiB to read"}
    except RecursionError:
        return {"error": "BROKEN", "message": "it is nested too deeply"}


def _reap(running: dict[int, int]) -> None:
    for pid in list(running):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            pipe = running.pop(pid)
            with contextlib.suppress(OSError):  # nobody listens any more
                os.write(pipe, b"\n%d\n" % os.waitstatus_to_exitcode(status))
            os.close(pipe)


def _die_with_parent() -> None:
    with contextlib.suppress(OSError, AttributeError):  # Linux only
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
