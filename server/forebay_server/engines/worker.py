"""The process of one engine: `python -m forebay_server.engines.worker FD`.

Serves frames on an inherited socket until its peer closes it. Ends with its parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import socket
import sys
from typing import Any

import numpy as np
from forebay.errors import ForebayError
from numpy.typing import NDArray

from forebay_server.core.interfaces import Batch, Engine, EngineSpec, Item, TokenInput
from forebay_server.engines import wire
from forebay_server.engines.factory import create_in_process

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serve until end-of-file."""
    logging.basicConfig(level=logging.WARNING)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError, AttributeError):  # Linux only; elsewhere end-of-file does it
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    sock = socket.socket(fileno=int(sys.argv[1]))
    engine: Engine | None = None
    while True:
        try:
            header, arrays = wire.receive(sock)
        except (EOFError, OSError):
            break
        out: dict[str, NDArray[Any]] = {}
        try:
            if header["op"] == "load":
                engine = create_in_process(EngineSpec.from_json(header["spec"]))
                engine.load()
                reply: dict[str, Any] = {"info": dict(engine.info())}
            elif engine is None:
                raise RuntimeError("no model is loaded")
            elif header["op"] == "warmup":
                engine.warmup([tuple(s) for s in header["shapes"]])
                reply = {}
            else:
                reply, out = run(engine, header, arrays)
        except ForebayError as e:
            reply = {"error": {"reason": e.reason, "message": e.message}}
        except Exception as e:
            reply = {"error": {"reason": "FAILED", "message": f"{type(e).__name__}: {e}"[:2000]}}
        wire.send(sock, reply, out)
    if engine is not None:
        engine.close()
    # Interpreter shutdown of native runtimes can hang or crash; there is nothing left to save.
    os._exit(0)


def run(
    engine: Engine, header: dict[str, Any], arrays: dict[str, NDArray[Any]]
) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """One batch: rebuild its items, run them, give the results as arrays."""
    tokens = engine.spec.kind == "tokens"
    items = []
    for i, (length, rows) in enumerate(header["items"]):
        if tokens:
            types = arrays.get(f"{i}.types")
            items.append(Item(TokenInput(arrays[f"{i}.ids"], types), length, rows))
        else:
            prefix = f"{i}."
            mine = {n[len(prefix) :]: a for n, a in arrays.items() if n.startswith(prefix)}
            items.append(Item(mine, length, rows))
    batch = Batch(items, header["length"], header["rows"])
    results = engine.finish(engine.execute(engine.prepare(batch)), batch)
    if tokens:
        return {"kind": "tokens"}, {"rows": np.stack([np.asarray(r) for r in results])}
    names = list(results[0])
    joined = {
        n: results[0][n] if len(results) == 1 else np.concatenate([r[n] for r in results])
        for n in names
    }
    return {"kind": "tensors"}, joined


if __name__ == "__main__":
    main()
