"""What benchmarks share: texts of known length, a server of its own, the machine's facts."""

from __future__ import annotations

import os
import platform
import random
import shutil
import socket
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.processes import Processes

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / ".forebay"
RESULTS = ROOT / "benchmarks" / "results"
WORDS = [
    "the",
    "of",
    "a",
    "time",
    "river",
    "water",
    "power",
    "house",
    "light",
    "stone",
    "field",
    "wind",
    "city",
    "paper",
]


def starters() -> Path:
    """The repository with the starter models."""
    from forebay_exporters.starters import make_starters

    data = ROOT.parent / "shared" / "data"
    make_starters(KEPT / "models", KEPT / "cache", data if data.is_dir() else None)
    return KEPT / "models"


@contextmanager
def repository(name: str, model_yaml: str) -> Iterator[Path]:
    """The starter models with another model.yaml for one of them."""
    models = starters()  # first: it makes the folder, which the links must share a file system with
    with tempfile.TemporaryDirectory(dir=KEPT) as folder:
        root = Path(folder) / "models"
        shutil.copytree(models, root, copy_function=os.link)
        (root / name / "model.yaml").unlink(missing_ok=True)
        (root / name / "model.yaml").write_text(model_yaml)
        yield root


@contextmanager
def exact_starters() -> Iterator[Path]:
    """The starter models with MiniLM in fp32, for runs that check every answer.

    In int8, the starter's own precision, a vector's third digit goes by the batch that it rides in: a
    wrong answer could hide in what had to be allowed for that.
    """
    fp32 = "default_for: [embedding]\nengine: onnxruntime\n"
    with repository("minilm", fp32) as root:
        yield root


def text_of(tokens: int, seed: int) -> str:
    """A text of exactly so many tokens with MiniLM's tokenizer, special tokens included."""
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(tokens - 2))


def mixed_lengths(n: int, seed: int = 7) -> list[int]:
    """Lengths from 5 to 256 tokens, uniform."""
    rng = random.Random(seed)
    return [rng.randint(5, 256) for _ in range(n)]


def machine() -> dict[str, Any]:
    """Facts that a figure means nothing without."""
    model = ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(": ")[2]
            break
    import onnxruntime

    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "onnxruntime": onnxruntime.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def free_port() -> int:
    """A loopback port that is free now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextmanager
def serving(**environment: str) -> Iterator[tuple[int, int]]:
    """`forebay up` on the starter models; gives the gRPC and the HTTP port."""
    grpc_port, http_port = free_port(), free_port()
    with tempfile.TemporaryDirectory() as home:
        env = {
            "FOREBAY_HOME": home,
            "FOREBAY_GRPC_PORT": str(grpc_port),
            "FOREBAY_HTTP_PORT": str(http_port),
            "FOREBAY_MODELS__ROOT": str(starters()),
            "FOREBAY_MODELS__STARTERS": "false",
            **environment,
        }
        command = [sys.executable, "-m", "forebay_cli", "up"]
        processes = Processes(command, Path(home) / "log", env)
        try:
            for _ in range(600):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{http_port}/readyz", timeout=1)
                    break
                except OSError:
                    time.sleep(0.1)
            yield grpc_port, http_port
        finally:
            processes.stop()


def median(values: list[float]) -> float:
    """The median."""
    return statistics.median(values)
