"""Closed-loop load: ghz or frames for gRPC, wrk for HTTP. Each caller waits, then calls again.

`ghz` is grpc-go behind a template engine: 60 to 270 microseconds of CPU a call, paid on the cores that
it shares with the server. `frames` (benchmarks/openloop in its closed loop) sends prepared messages for
4 to 15, so that what is measured is the server. A run with a single failed call raises: figures of
errors mean nothing.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from benchmarks import openloop

PROTOSET = Path(__file__).resolve().parent.parent / "contract" / "forebay" / "contract.binpb"
SCRIPT = Path(__file__).with_name("wrk.lua")
GHZ = "github.com/bojand/ghz/cmd/ghz@v0.121.0"


class CallsFailed(Exception):
    """The server answered errors under load."""


@dataclass(frozen=True)
class Load:
    """One run. Latencies in milliseconds; CPU in microseconds a call, user and system together."""

    calls: int
    rps: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    server_cpu_us: float = 0.0
    client_cpu_us: float = 0.0


def ghz() -> str:
    """The path of ghz; installs it by `go install` where go is there."""
    kept = Path.home() / "go" / "bin" / "ghz"
    found = shutil.which("ghz") or (str(kept) if kept.exists() else None)
    if found:
        return found
    go = shutil.which("go") or "/usr/local/go/bin/go"
    if not Path(go).exists():
        raise SystemExit(f"ghz is needed: go install {GHZ}")
    subprocess.run(
        [go, "install", GHZ], check=True, env={"HOME": str(Path.home()), "PATH": "/usr/bin:/bin"}
    )
    return str(kept)


def wrk() -> str:
    """The path of wrk."""
    found = shutil.which("wrk")
    if not found:
        raise SystemExit("wrk is needed: apt-get install wrk")
    return found


def parse_ghz(text: str) -> Load:
    """The figures in ghz's JSON.

    Raises:
        CallsFailed: with the status codes, when any call was not OK.
    """
    out = json.loads(text)
    bad = {k: v for k, v in (out.get("statusCodeDistribution") or {}).items() if k != "OK"}
    if bad or not out["count"]:
        raise CallsFailed(f"{bad or 'no call'}: {list(out.get('errorDistribution') or {})[:2]}")
    at = {x["percentage"]: x["latency"] / 1e6 for x in out["latencyDistribution"]}
    return Load(out["count"], out["rps"], at[50], at[90], at[99])


def parse_wrk(text: str) -> Load:
    """The figures that wrk.lua prints in wrk's output.

    Raises:
        CallsFailed: with the counts, when any call failed.
    """
    out = json.loads(next(x for x in reversed(text.splitlines()) if x.startswith("{")))
    bad = {k: out[k] for k in ("connect", "read", "write", "status", "timeout") if out[k]}
    if bad or not out["requests"]:
        raise CallsFailed(str(bad or "no call"))
    rps = out["requests"] / (out["duration_us"] / 1e6)
    p50, p90, p99 = (out[f"p{p}_us"] / 1e3 for p in (50, 90, 99))
    return Load(out["requests"], rps, p50, p90, p99)


def grpc_load(
    port: int,
    method: str,
    requests: Sequence[Message | Mapping[str, Any]],
    callers: int,
    seconds: float,
    *,
    metadata: Mapping[str, str] | None = None,
    cpu: Callable[[], float] | None = None,
    proto: Path | None = None,
) -> Load:
    """ghz on a loopback port; the requests are sent in turn, over at most four connections.

    Args:
        method: `package.Service/Method`.
        cpu: gives the server's CPU seconds so far.
        proto: the method's proto file, where it is not one of Forebay's or the standard's.
    """
    data = [MessageToDict(r) if isinstance(r, Message) else dict(r) for r in requests]
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(data, file)
        file.flush()
        command = [ghz(), "--insecure", "--call", method, "--data-file", file.name]
        command += ["--proto", str(proto)] if proto else ["--protoset", str(PROTOSET)]
        command += ["--format", "json", "--connections", str(min(callers, 4))]
        command += ["-c", str(callers), "-z", f"{seconds}s", "--duration-stop", "wait"]
        command += ["--metadata", json.dumps(dict(metadata or {})), f"127.0.0.1:{port}"]
        return _measured(command, parse_ghz, cpu)


def parse_frames(out: Mapping[str, Any]) -> Load:
    """The figures of openloop's first phase.

    Raises:
        CallsFailed: with the status codes, when any call was not OK.
    """
    phase = out["phases"][0]
    bad = {k: v for k, v in phase["codes"].items() if k != "OK"}
    if bad or not phase["ok"]:
        raise CallsFailed(str(bad or "no call"))
    at = phase["latency"]["percentiles_ms"]
    return Load(phase["ok"], phase["ok_per_s"], at["50"], at["90"], at["99"])


def frames_load(
    port: int,
    method: str,
    requests: Sequence[Message],
    callers: int,
    seconds: float,
    *,
    metadata: Mapping[str, str] | None = None,
    cpu: Callable[[], float] | None = None,
) -> Load:
    """openloop's closed loop on a loopback port: the requests at random, over at most four connections.

    Args and errors are `grpc_load`'s.
    """
    work = openloop.Workload("calls", method)
    for request in requests:
        work.add(request)
    spec = {
        "target": f"127.0.0.1:{port}",
        "metadata": dict(metadata or {}),
        "connections": {"main": {"count": min(callers, 4)}},
        "workloads": [work.spec()],
        "phases": [{"name": "closed", "seconds": seconds, "callers": callers}],
    }
    before = cpu() if cpu else 0.0
    out = openloop.run(spec)
    used = (cpu() if cpu else 0.0) - before
    load = parse_frames(out)
    client = out["client"]["cpu_s"] / load.calls * 1e6
    return replace(load, server_cpu_us=used / load.calls * 1e6, client_cpu_us=client)


def http_load(
    port: int,
    path: str,
    bodies: Sequence[Mapping[str, Any]],
    callers: int,
    seconds: float,
    *,
    headers: Mapping[str, str] | None = None,
    cpu: Callable[[], float] | None = None,
) -> Load:
    """wrk on a loopback port: one thread, a kept connection for each caller, JSON bodies in turn."""
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        file.writelines(json.dumps(b) + "\n" for b in bodies)
        file.flush()
        command = [wrk(), "-t1", f"-c{callers}", f"-d{max(1, round(seconds))}s", "--timeout", "30s"]
        for name, value in {"content-type": "application/json", **(headers or {})}.items():
            command += ["-H", f"{name}: {value}"]
        command += ["-s", str(SCRIPT), f"http://127.0.0.1:{port}{path}", "--", file.name]
        return _measured(command, parse_wrk, cpu)


def _measured(
    command: list[str], parse: Callable[[str], Load], cpu: Callable[[], float] | None
) -> Load:
    own = resource.getrusage(resource.RUSAGE_CHILDREN)
    before = cpu() if cpu else 0.0
    done = subprocess.run(command, capture_output=True, text=True)
    used = (cpu() if cpu else 0.0) - before
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode or not done.stdout.strip():
        raise CallsFailed(f"{Path(command[0]).name}: {done.stderr.strip()[-300:]}")
    load = parse(done.stdout)
    client = after.ru_utime + after.ru_stime - own.ru_utime - own.ru_stime
    return replace(
        load, server_cpu_us=used / load.calls * 1e6, client_cpu_us=client / load.calls * 1e6
    )
