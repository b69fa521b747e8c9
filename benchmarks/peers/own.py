"""Forebay and the bare Rust echo as candidates."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks import common
from benchmarks.peers import doors, models
from benchmarks.peers.doors import Door
from benchmarks.peers.spec import Candidate, NotInstalled, Ports
from benchmarks.peers.workloads import Group
from benchmarks.processes import Processes

ECHO = Path(__file__).with_name("echo")
#: model.yaml for fp32 by ONNX Runtime, as the peers serve it.
SAME_PRECISION = "default_for: [embedding]\n"
#: Served, by group: only what the group asks, so that memory is comparable.
SERVED: dict[Group, tuple[str, ...]] = {
    "tabular": ("forest",),
    "embed": ("minilm",),
    "text": ("sentiment", "minilm"),
}


def forebay(
    group: Group,
    name: str = "forebay",
    profile: str = SAME_PRECISION,
    cosine: float = 0.9999,
) -> Candidate:
    """`forebay up`, server and gateway, with keys, limits, usage, metrics and logs on.

    Args:
        profile: model.yaml of minilm.
    """
    model = "minilm"

    def start(ports: Ports, home: Path) -> Processes:
        for served in SERVED[group]:
            source = models.forest().parent if served == "forest" else common.starters() / served
            folder = home / "models" / served
            shutil.copytree(source, folder, copy_function=os.link)
            if served == model:
                (folder / "model.yaml").unlink(missing_ok=True)
                (folder / "model.yaml").write_text(profile)
        environment = {
            "FOREBAY_HOME": str(home),
            "FOREBAY_GRPC_PORT": str(ports["grpc"]),
            "FOREBAY_HTTP_PORT": str(ports["http"]),
            "FOREBAY_MODELS__STARTERS": "false",
            "FOREBAY_AUTH__REQUIRED": "always",
        }
        command = [sys.executable, "-m", "forebay_cli"]
        limits = ["--rps", "1000000", "--tokens-per-minute", "1000000000"]
        done = subprocess.run(
            [*command, "keys", "create", "bench", *limits, "--max-concurrency", "10000"],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=True,
        )
        (home / "key").write_text(done.stdout.strip())
        return Processes([*command, "up"], home / "log", environment)

    def ways(home: Path, workload: str) -> tuple[Door, ...]:
        found = {
            "tabular": (
                doors.predict_grpc("forest"),
                doors.oip_grpc("forest"),
                doors.predict_http("forest"),
                doors.oip_http("forest"),
            ),
            "embed-20": (
                doors.embed_grpc(model),
                doors.oip_grpc(model),
                doors.embed_http(model),
                doors.openai_http(model),
            ),
            "classify": (doors.classify_grpc("sentiment"), doors.classify_http("sentiment")),
            "rerank": (doors.rerank_grpc(model), doors.rerank_http(model)),
        }.get(workload, (doors.embed_grpc(model), doors.openai_http(model)))
        key = {"authorization": f"Bearer {(home / 'key').read_text()}"}
        return tuple(d.with_headers(key) for d in found)

    return Candidate(name, "", "forebay", start, ways, cosine)


def default_profile() -> str:
    """The model.yaml that minilm comes with; empty where it is the same as the peers' precision."""
    text = (common.starters() / "minilm" / "model.yaml").read_text()
    return text if "engine" in text else ""


def echo() -> Candidate:
    """tonic, one thread, with nothing behind it.

    Raises:
        NotInstalled: there is no cargo, or it does not build.
    """
    binary = ECHO / "target" / "release" / "bench-echo"
    if not binary.exists():
        cargo = shutil.which("cargo")
        if cargo is None:
            raise NotInstalled("cargo is not here")
        done = subprocess.run(
            [cargo, "build", "--release", "--quiet"], cwd=ECHO, capture_output=True, text=True
        )
        if done.returncode:
            raise NotInstalled(done.stderr[-500:])
    return Candidate(
        "Rust echo",
        "",
        "limit",
        lambda ports, home: Processes([str(binary), str(ports["grpc"])], home / "log"),
        lambda _home, _workload: (doors.echo_floats(), doors.echo_infer()),
    )
