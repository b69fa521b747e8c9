"""The open-loop load generator, from Python: build it, run a spec, make workloads with checks.

python -m benchmarks.openloop          # builds it (needs go); README.md has the input
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message
from numpy.typing import NDArray

SOURCES = Path(__file__).resolve().parent
BINARY = SOURCES.parent.parent / "build" / "openloop"


def build() -> Path:
    """The binary, built when its sources are newer. Says what is needed where go is not."""
    newest = max(p.stat().st_mtime for p in [*SOURCES.glob("*.go"), SOURCES / "go.mod"])
    if BINARY.exists() and BINARY.stat().st_mtime > newest:
        return BINARY
    go = shutil.which("go") or "/usr/local/go/bin/go"
    if not Path(go).exists():
        raise SystemExit("go is needed to build the load generator, 1.24 or newer")
    env = {**os.environ, "GOFLAGS": "-mod=mod"}  # go.sum is made here, not kept
    subprocess.run([go, "build", "-o", str(BINARY), "."], cwd=SOURCES, env=env, check=True)
    return BINARY


def run(spec: Mapping[str, Any], first: bool = False) -> dict[str, Any]:
    """The figures of a run (README.md has both sides).

    Args:
        first: it goes before all others on the cores that it shares with a server in overload, where
            the system lets it: its own waiting for a core is none of the server's.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(spec, file)
        file.flush()
        command = [str(build()), "-spec", file.name]
        # All is one loop (see loop.go), which the garbage collector would hold up for milliseconds.
        env = {**os.environ, "GOMAXPROCS": "1", "GOGC": "off", "GOMEMLIMIT": "512MiB"}
        if first and _may_be_first():
            command = ["chrt", "--rr", "1", *command]
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip())
    return json.loads(done.stdout)


def _may_be_first() -> bool:
    if shutil.which("chrt") is None:
        return False
    return subprocess.run(["chrt", "--rr", "1", "true"], capture_output=True).returncode == 0


@dataclass
class Workload:
    """One kind of call: messages, each with the checks of its answer."""

    name: str
    method: str
    requests: list[tuple[bytes, list[dict[str, Any]]]] = field(default_factory=list)

    def add(self, message: Message, checks: Sequence[dict[str, Any]] = ()) -> None:
        """A message with the checks of its answer."""
        self.requests.append((message.SerializeToString(), list(checks)))

    def spec(self, **more: Any) -> dict[str, Any]:
        """Its part of a spec: weight, deadline_ms, connection, cancel_share, ... in `more`."""
        return {
            "name": self.name,
            "method": f"/{self.method}",
            "requests": [
                {"message": base64.b64encode(m).decode(), "expect": checks}
                for m, checks in self.requests
            ],
            **more,
        }


def path(answer: type[Message], dotted: str) -> list[int]:
    """The field numbers of a dotted name, as checks take them."""
    out = []
    at: Descriptor | None = answer.DESCRIPTOR
    for name in dotted.split("."):
        assert at is not None, dotted
        found = at.fields_by_name[name]
        out.append(found.number)
        at = found.message_type
    return out


def double(at: Sequence[int], value: float, tolerance: float, index: int = 0) -> dict[str, Any]:
    """A check: field `at` (of the index-th element of a repeated first field) is this double."""
    return {
        "path": list(at),
        "index": index,
        "as": "double",
        "value": value,
        "tolerance": tolerance,
    }


def single(at: Sequence[int], value: float, tolerance: float, index: int = 0) -> dict[str, Any]:
    """The same for a float."""
    return {**double(at, value, tolerance, index), "as": "float"}


def floats(
    at: Sequence[int], values: NDArray[Any], tolerance: float, index: int = 0
) -> dict[str, Any]:
    """A check: packed floats begin with these values."""
    return {
        "path": list(at),
        "index": index,
        "as": "floats",
        "values": [float(v) for v in values],
        "tolerance": tolerance,
    }


def text(at: Sequence[int], value: str, index: int = 0) -> dict[str, Any]:
    """A check: the field is this string."""
    return {"path": list(at), "index": index, "as": "string", "text": value}


def raw_floats(
    at: Sequence[int], values: NDArray[np.float32], tolerance: float, index: int = 0
) -> dict[str, Any]:
    """A check: bytes that are float32 values, such as raw_output_contents."""
    return floats(at, values, tolerance, index)
