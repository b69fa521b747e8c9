"""What benchmarks share: texts of known length, a server of its own, ghz, the machine's facts."""

from __future__ import annotations

import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / ".forebay"
PROTOSET = ROOT / "contract" / "forebay" / "contract.binpb"
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
    with tempfile.TemporaryDirectory(dir=KEPT) as folder:
        root = Path(folder) / "models"
        shutil.copytree(starters(), root, copy_function=os.link)
        (root / name / "model.yaml").unlink(missing_ok=True)
        (root / name / "model.yaml").write_text(model_yaml)
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
        "python": platform.python_version(),
        "onnxruntime": onnxruntime.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


@contextmanager
def serving(**environment: str) -> Iterator[tuple[int, int]]:
    """`forebay up` on the starter models; gives the gRPC and the HTTP port."""
    from forebay_cli.up import free_port

    grpc_port, http_port = free_port(), free_port()
    with tempfile.TemporaryDirectory() as home:
        env = {
            **os.environ,
            "FOREBAY_HOME": home,
            "FOREBAY_GRPC_PORT": str(grpc_port),
            "FOREBAY_HTTP_PORT": str(http_port),
            "FOREBAY_MODELS__ROOT": str(starters()),
            "FOREBAY_MODELS__STARTERS": "false",
            **environment,
        }
        log = (Path(home) / "log").open("wb")
        process = subprocess.Popen([sys.executable, "-m", "forebay_cli", "up"], env=env, stderr=log)
        try:
            import urllib.request

            for _ in range(600):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{http_port}/readyz", timeout=1)
                    break
                except OSError:
                    time.sleep(0.1)
            yield grpc_port, http_port
        finally:
            process.terminate()
            process.wait(60)


def ghz() -> str:
    """The load generator. Says how to get it where it is not."""
    found = shutil.which("ghz") or str(Path.home() / "go" / "bin" / "ghz")
    if not Path(found).exists():
        raise SystemExit("ghz is needed: go install github.com/bojand/ghz/cmd/ghz@latest")
    return found


def load(
    port: int, method: str, requests: list[Any], callers: int, seconds: float
) -> dict[str, float]:
    """A closed loop by ghz: calls a second and latencies in milliseconds."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(requests, file)
        file.flush()
        command = [
            ghz(),
            "--insecure",
            "--protoset",
            str(ROOT / "contract" / "forebay" / "contract.binpb"),
            "--call",
            method,
            "--data-file",
            file.name,
            "--format",
            "json",
        ]
        command += ["-c", str(callers), "--connections", str(min(callers, 4)), "-z", f"{seconds}s"]
        command += ["--duration-stop", "wait", f"127.0.0.1:{port}"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    out = json.loads(done.stdout)
    bad = {k: v for k, v in (out.get("statusCodeDistribution") or {}).items() if k != "OK"}
    if bad:
        raise RuntimeError(f"calls failed: {bad}")
    latency = {x["percentage"]: x["latency"] / 1e6 for x in out["latencyDistribution"]}
    return {"rps": out["rps"], "p50_ms": latency[50], "p99_ms": latency[99]}


def median(values: list[float]) -> float:
    """The median."""
    return statistics.median(values)
