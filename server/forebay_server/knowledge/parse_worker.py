"""The process that reads one document: `python -m forebay_server.knowledge.parse_worker`.

Takes one line of JSON on stdin (path, name, password, limits) and writes one JSON object to stdout.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import resource
import signal
import sys
from dataclasses import asdict
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def main() -> int:
    """Read, parse, write."""
    logging.disable(logging.CRITICAL)  # parsers talk about broken files
    order = json.loads(sys.stdin.buffer.readline())
    memory, seconds = int(order["memory_bytes"]), int(order["cpu_s"])
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # it writes no file
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from forebay_server.knowledge.parsers import ParseError, parse

    try:
        data = Path(order["path"]).read_bytes()
        reply = asdict(parse(order["name"], data, order.get("password", "")))
    except ParseError as e:
        reply = {"error": e.reason, "message": str(e)}
    except MemoryError:
        reply = {"error": "MEMORY", "message": f"it needs more than {memory >> 20} MiB to read"}
    except RecursionError:
        reply = {"error": "BROKEN", "message": "it is nested too deeply"}
    sys.stdout.buffer.write(json.dumps(reply).encode())
    sys.stdout.buffer.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
