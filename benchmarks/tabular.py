"""What a tabular call costs: a random forest, one row a call, through gRPC, beside the bare model.

    python -m benchmarks.tabular [--seconds 5] [--rounds 3] [--kserve PYTHON]

The forest has 100 trees of depth 12 over 8 features, exported by skl2onnx. Forebay serves it with
limits, metrics, usage and logs on. ghz sends TabularService.Predict (a row as google.protobuf.Struct)
and the Open Inference Protocol's ModelInfer (raw FP32), the same message to each server that takes it.
With the interpreter of an environment that has `kserve` and `onnxruntime`, KServe's Python server is
measured in the same rounds. Every server's answer is compared with the bare model's first. Writes
benchmarks/results/tabular.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnxruntime as ort
import pandas as pd
from forebay.oip import open_inference_pb2 as oip
from forebay.v1 import tabular_pb2
from google.protobuf.message import Message

from benchmarks import common

PREDICT = "forebay.v1.TabularService/Predict"
INFER = "inference.GRPCInferenceService/ModelInfer"
COLUMNS = [f"f{i}" for i in range(8)]
TICKS = os.sysconf("SC_CLK_TCK")


def forest(root: Path) -> pd.DataFrame:
    """Train and export `forest`; gives its rows."""
    from forebay_exporters.sklearn_export import export_sklearn
    from sklearn.ensemble import RandomForestRegressor

    rng = np.random.default_rng(0)
    rows = pd.DataFrame(rng.normal(size=(4000, 8)), columns=COLUMNS)
    truth = rows.to_numpy() @ rng.normal(size=8) + np.sin(3 * rows["f0"].to_numpy())
    model = RandomForestRegressor(100, max_depth=12, random_state=0).fit(rows, truth)
    export_sklearn(model, rows, root, "forest", 1, target=truth)
    return rows


def bare(session: ort.InferenceSession, rows: int, seconds: float) -> float:
    """Rows a second of session.run in a loop on one thread."""
    feeds = {"input": np.random.default_rng(rows).normal(size=(rows, 8)).astype(np.float32)}
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        session.run(None, feeds)
        done += rows
    return done / (time.perf_counter() - start)


def cpu_seconds(pids: list[int]) -> float:
    """User and system time of processes so far."""
    total = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        total += int(fields[11]) + int(fields[12])
    return total / TICKS


def tree(pid: int) -> list[int]:
    """A process and its descendants."""
    out = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            out += tree(int(child))
    return out


def load(
    port: int, method: str, message: Message, callers: int, seconds: float, pid: int
) -> dict[str, float]:
    """A closed loop by ghz with one binary message: rates, latencies, the server's CPU per call."""
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(message.SerializeToString())
        file.flush()
        command = [common.ghz(), "--insecure", "--protoset", str(common.PROTOSET)]
        command += ["--call", method, "--binary-file", file.name, "--format", "json"]
        command += ["-c", str(callers), "--connections", str(min(callers, 4))]
        command += ["-z", f"{seconds}s", "--duration-stop", "wait", f"127.0.0.1:{port}"]
        pids = tree(pid)
        before = cpu_seconds(pids)
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        used = cpu_seconds(pids) - before
    out = json.loads(done.stdout)
    bad = {k: v for k, v in (out.get("statusCodeDistribution") or {}).items() if k != "OK"}
    if bad:
        raise RuntimeError(f"calls failed: {bad}")
    latency = {x["percentage"]: x["latency"] / 1e6 for x in out["latencyDistribution"]}
    return {
        "rps": out["rps"],
        "p50_ms": latency[50],
        "p99_ms": latency[99],
        "cpu_us": used / out["count"] * 1e6,
    }


def ask(port: int, method: str, message: Message, answer: type[Message]) -> Any:
    """One call's answer."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call: Callable[..., Any] = channel.unary_unary(
            f"/{method}",
            request_serializer=lambda m: m.SerializeToString(),
            response_deserializer=answer.FromString,
        )
        return call(message, timeout=10, wait_for_ready=True)


@contextmanager
def forebay(models: Path) -> Iterator[tuple[int, int]]:
    """`forebay serve` on the forest; gives its port and process id."""
    import sys

    from forebay_cli.up import free_port

    port = free_port()
    with tempfile.TemporaryDirectory() as home:
        env = {
            **os.environ,
            "FOREBAY_HOME": home,
            "FOREBAY_GRPC_PORT": str(port),
            "FOREBAY_MODELS__ROOT": str(models),
            "FOREBAY_OBSERVABILITY__METRICS_PORT": "-1",
        }
        with (Path(home) / "log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "forebay_cli", "serve"], env=env, stderr=log
            )
            try:
                yield port, process.pid
            finally:
                process.terminate()
                process.wait(60)


@contextmanager
def kserve(python: str, model: Path) -> Iterator[tuple[int, int]]:
    """KServe's Python server with the same ONNX file; gives its port and process id."""
    from forebay_cli.up import free_port

    port = free_port()
    script = Path(__file__).parent / "peers" / "kserve_forest.py"
    command = [python, str(script), str(model), "--grpc_port", str(port)]
    command += ["--http_port", str(free_port()), "--enable_latency_logging", "False"]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            yield port, process.pid
        finally:
            process.terminate()
            process.wait(30)


def measure(seconds: float, rounds: int, peer: str | None) -> dict[str, Any]:
    """Medians over rounds; all doors in turn within each round."""
    series: dict[str, list[float]] = {}
    with ExitStack() as stack:
        models = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        rows = forest(models)
        path = models / "forest" / "1" / "model.onnx"
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        values = rows.iloc[:1].to_numpy(np.float32)
        expected = float(np.asarray(session.run(None, {"input": values})[0]).reshape(-1)[0])
        struct = tabular_pb2.PredictRequest(model="forest")
        struct.rows.add().update({n: float(v) for n, v in zip(COLUMNS, values[0], strict=True)})
        raw = oip.ModelInferRequest(model_name="forest")
        raw.inputs.add(name="input", datatype="FP32", shape=[1, 8])
        raw.raw_input_contents.append(values.tobytes())
        port, pid = stack.enter_context(forebay(models))
        doors: list[tuple[str, int, int, str, Message]] = [
            ("forebay Predict", port, pid, PREDICT, struct),
            ("forebay ModelInfer", port, pid, INFER, raw),
        ]
        answer = ask(port, PREDICT, struct, tabular_pb2.PredictResponse)
        got = [answer.predictions[0].value, _first(ask(port, INFER, raw, oip.ModelInferResponse))]
        if peer:
            port, pid = stack.enter_context(kserve(peer, path))
            doors.append(("kserve ModelInfer", port, pid, INFER, raw))
            got.append(_first(ask(port, INFER, raw, oip.ModelInferResponse)))
        if not np.allclose(got, expected, rtol=1e-6):
            raise RuntimeError(f"answers {got} differ from the bare model's {expected}")
        for _, port, pid, method, message in doors:
            load(port, method, message, 64, 2, pid)
        for _ in range(rounds):
            for size in (1, 32):
                series.setdefault(f"bare {size}", []).append(bare(session, size, seconds / 4))
            for name, port, pid, method, message in doors:
                for callers in (1, 64):
                    for key, value in load(port, method, message, callers, seconds, pid).items():
                        series.setdefault(f"{name} {callers} {key}", []).append(value)
    return {
        "machine": common.machine(),
        "rounds": rounds,
        "doors": [d[0] for d in doors],
        "median": {k: round(common.median(v), 3) for k, v in series.items()},
        "spread": {k: [round(min(v), 3), round(max(v), 3)] for k, v in series.items()},
    }


def _first(answer: Any) -> float:
    if answer.raw_output_contents:
        return float(np.frombuffer(answer.raw_output_contents[0], np.float32)[0])
    return float(answer.outputs[0].contents.fp32_contents[0])


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    m = result["median"]
    lines = [
        "# Tabular: a random forest, one row a call",
        "",
        f"{result['machine']}; medians of {result['rounds']} rounds, server and ghz on the same cores.",
        f"Bare ONNX Runtime, one thread: {m['bare 1']:.0f} rows/s one by one, "
        f"{m['bare 32']:.0f} in batches of 32.",
        "",
        "| door | 1 caller: calls/s, p50 ms | 64 callers: calls/s, p50, p99 ms | server CPU us a call |",
        "|---|---|---|---|",
    ]
    for door in result["doors"]:
        one, many = f"{door} 1 ", f"{door} 64 "
        lines.append(
            f"| {door} | {m[one + 'rps']:.0f}, {m[one + 'p50_ms']:.2f} "
            f"| {m[many + 'rps']:.0f}, {m[many + 'p50_ms']:.1f}, {m[many + 'p99_ms']:.1f} "
            f"| {m[many + 'cpu_us']:.0f} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kserve", help="interpreter of an environment with kserve")
    arguments = parser.parse_args()
    common.RESULTS.mkdir(parents=True, exist_ok=True)
    result = measure(arguments.seconds, arguments.rounds, arguments.kserve)
    (common.RESULTS / "tabular.json").write_text(json.dumps(result, indent=2) + "\n")
    text = table(result)
    (common.RESULTS / "tabular.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
