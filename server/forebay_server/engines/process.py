"""An engine in a process of its own, behind the same interface: one message a batch.

The process gives its memory back when it ends, and its crash is Unavailable (ENGINE_DIED) for the
batch that was running, nothing more: `load` starts a new one.
"""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import msgspec
from forebay.errors import FailedPrecondition, Unavailable
from numpy.typing import NDArray

from forebay_server.core.interfaces import Batch, EngineSpec, Result, TensorInput, TokenInput
from forebay_server.engines import wire

log = logging.getLogger("forebay.engines")

#: Seconds for a process to load its model.
LOAD_TIMEOUT_S = 300.0
#: Environment that the process keeps; keys and tokens of the server are none of its business.
KEEP_ENV = (
    "PATH",
    "HOME",
    "LANG",
    "LD_LIBRARY_PATH",
    "CUDA_VISIBLE_DEVICES",
    "PYTHONPATH",
    "TMPDIR",
    "GLIBC_TUNABLES",  # large pages: docs/adr/0027
)


@dataclass(slots=True)
class _Frame:
    header: dict[str, Any]
    arrays: dict[str, NDArray[Any]]


class ProcessEngine:
    """See interfaces.Engine. Calls are serialised: the engine's thread is the only caller of execute."""

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()
        self._info: dict[str, Any] = {}

    def load(self) -> None:
        """Start the process and load the model there. The errors are those of the engine inside."""
        self.close()
        import os

        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        env = {k: v for k, v in os.environ.items() if k in KEEP_ENV}
        env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "forebay_server.engines.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=env,
                start_new_session=True,  # the terminal's Ctrl-C is for the server, which drains
            )
        self._socket = ours
        ours.settimeout(LOAD_TIMEOUT_S)
        spec = self.spec.to_json()
        try:
            reply = self._ask({"op": "load", "spec": spec}, {})
        except TimeoutError:
            self.close()
            raise FailedPrecondition(
                f"loading took longer than {LOAD_TIMEOUT_S:g} s", reason="MODEL_REJECTED"
            ) from None
        except Unavailable:
            code = self._process.wait(5) if self._process else None
            self.close()
            raise FailedPrecondition(
                f"{Path(self.spec.path).name} killed its process while it was loaded "
                f"(exit status {code})",
                reason="MODEL_REJECTED",
            ) from None
        except FailedPrecondition:
            self.close()
            raise
        ours.settimeout(None)
        self._info = reply.header["info"]

    def warmup(self, shapes: Sequence[tuple[int, int]]) -> None:
        """Run each (rows, length) once."""
        self._ask({"op": "warmup", "shapes": [list(s) for s in shapes]}, {})

    def prepare(self, batch: Batch) -> _Frame:
        """The items' arrays; padding happens in the process."""
        arrays: dict[str, NDArray[Any]] = {}
        items = []
        for i, item in enumerate(batch.items):
            if isinstance(item.inputs, TokenInput):
                arrays[f"{i}.ids"] = item.inputs.ids
                if item.inputs.type_ids is not None:
                    arrays[f"{i}.types"] = item.inputs.type_ids
            else:
                for name, array in cast(TensorInput, item.inputs).items():
                    arrays[f"{i}.{name}"] = array
            items.append((item.length, item.rows))
        header = {"op": "run", "items": items, "length": batch.length, "rows": batch.rows}
        return _Frame(header, arrays)

    def execute(self, inputs: _Frame) -> _Frame:
        """One round trip; the GIL is released in the socket."""
        return self._ask(inputs.header, inputs.arrays)

    def finish(self, outputs: _Frame, batch: Batch) -> Sequence[Result]:
        """Each item's arrays."""
        if outputs.header["kind"] == "tokens":
            return list(outputs.arrays["rows"])
        out: list[Result] = []
        at = 0
        for item in batch.items:
            rows = item.rows if len(batch.items) > 1 else None
            out.append(
                {n: a if rows is None else a[at : at + rows] for n, a in outputs.arrays.items()}
            )
            at += item.rows
        return out

    def check_health(self) -> None:
        """Raise Unavailable when the process is gone."""
        if self._process is None or self._process.poll() is not None:
            raise _gone()

    def close(self) -> None:
        """End the process and reap it. Idempotent."""
        sock, self._socket = self._socket, None
        process, self._process = self._process, None
        if sock is not None:
            sock.close()  # the worker ends at end-of-file
        if process is None:
            return
        try:
            process.wait(2.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def info(self) -> Mapping[str, Any]:
        """The inner engine's facts, with the process's id and resident bytes."""
        process = self._process
        if process is None:
            return {"providers": [], "memory_bytes": 0, "pid": 0}
        return {**self._info, "pid": process.pid, "memory_bytes": resident_bytes(process.pid)}

    def _ask(self, header: Mapping[str, Any], arrays: wire.Arrays) -> _Frame:
        with self._lock:
            sock = self._socket
            if sock is None:
                raise _gone()
            try:
                wire.send(sock, header, arrays)
                answer, got = wire.receive(sock)
            except TimeoutError:
                raise
            except (OSError, EOFError, msgspec.DecodeError):
                raise _gone() from None
        error = answer.get("error")
        if error is None:
            return _Frame(answer, got)
        if error["reason"] == "MODEL_REJECTED":
            raise FailedPrecondition(error["message"], reason="MODEL_REJECTED")
        raise RuntimeError(error["message"])


def _gone() -> Unavailable:
    return Unavailable("the model's process died", reason="ENGINE_DIED", retry_after_s=0.5)


def resident_bytes(pid: int) -> int:
    """Resident memory of a process; 0 when it is gone."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
