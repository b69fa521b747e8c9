"""Tokens a second and time to the first token: vLLM offline, its own server, Forebay by gRPC and REST.

    python -m benchmarks.generation --vllm-python .venv-vllm/bin/python

All are up at once, and take turns, round by round: a shared machine is now quicker, now slower, and
ratios are medians of those within a round. The same model, prompts and options; the load on the
servers is one Go program (benchmarks/streams): its clients take a tenth of what Python's take of the
cores that are measured. `offline` is `LLM.generate` as it comes; `offline, one process` the same with
VLLM_ENABLE_V1_MULTIPROCESSING=0 and one computing thread less than cores, as Forebay runs the engine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CONTEXT, PROMPT = 1024, 32
#: Between two ways: computing threads spin on for a while when there is nothing to compute.
SETTLE_S = 1.0
MAKE = """
import json, sys
from transformers import LlamaConfig, LlamaForCausalLM
import torch
torch.manual_seed(0)
config = LlamaConfig(vocab_size=2048, max_position_embeddings=1024, head_dim=64,
    tie_word_embeddings=True, bos_token_id=0, eos_token_id=2, **json.loads(sys.argv[2]))
LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(sys.argv[1])
"""
SHAPES = {
    "27M": {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    },
    "109M": {
        "hidden_size": 768,
        "intermediate_size": 2560,
        "num_hidden_layers": 13,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
    },
}


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Way:
    """A process that runs a round when it is told to."""

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            command,
            env=env,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )

    def round(self, streams: int, number: int) -> dict[str, float]:
        """What a round brought: `rate`, and `first_ms` where streams are read."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{streams} {number}\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("RESULT "):
                return json.loads(line[7:])
        raise RuntimeError(f"{self._process.args} ended")

    def close(self) -> None:
        """End it with its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@contextlib.contextmanager
def process(command: list[str], env: dict[str, str], ready: str) -> Iterator[None]:
    """A server that is ready, ended with its children."""
    running = subprocess.Popen(
        command,
        env=env,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 600
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(ready, timeout=2) as answer:
                if answer.status == 200:
                    break
            if running.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command} did not start")
            time.sleep(0.5)
        yield
    finally:
        running.send_signal(signal.SIGTERM)
        try:
            running.wait(20)
        except subprocess.TimeoutExpired:
            pass  # killed below
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
        running.wait()


def prompts(streams: list[int], rounds: int) -> dict[str, Any]:
    """Random prompts, new ones each round: no prefix is in the cache."""
    r = random.Random(1)
    return {
        str(n): [
            [[r.randrange(3, 2000) for _ in range(PROMPT)] for _ in range(n)]
            for _ in range(rounds + 1)
        ]
        for n in streams
    }


def measure(name: str, model: Path, a: argparse.Namespace) -> dict[str, Any]:
    """All ways for one model."""
    streams = [1, 8, 32]
    options: dict[str, Any] = {"dtype": "bfloat16"} | ({"enforce_eager": True} if a.eager else {})
    env = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "PYTHONPATH": os.pathsep.join(
            str(ROOT / p) for p in ("contract", "server", "gateway", "cli")
        ),
    }
    plain = {k: v for k, v in env.items() if k != "PYTHONPATH"}
    threads = str(max(1, (os.cpu_count() or 2) - 1))
    one_process = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": threads}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        given = folder / "prompts.json"
        given.write_text(json.dumps(prompts(streams, a.rounds)))
        common = {"tokens": a.tokens, "prompts": str(given)}

        def way(command: list[str], env: dict[str, str]) -> Way:
            made = Way(command, env)
            stack.callback(made.close)
            return made

        def load(kind: str, target: str) -> Way:
            wanted = {**common, "kind": kind, "target": target, "model": "m"}
            return way([str(a.load), json.dumps(wanted)], env)

        offline = {**common, "model": str(model), "context": CONTEXT, "options": options}
        script = str(ROOT / "benchmarks" / "generation_offline.py")
        command = [str(a.vllm_python), script, json.dumps(offline)]
        ways = {
            "offline": way(command, plain),
            "offline, one process": way(command, {**plain, **one_process}),
        }
        ways["vllm server"] = load("sse", stack.enter_context(vllm_server(model, a, plain)))
        grpc, rest = stack.enter_context(forebay(model, a, options, env))
        ways |= {"forebay gRPC": load("grpc", grpc), "forebay REST": load("sse", rest)}
        out: dict[str, Any] = {w: {str(n): {"rates": []} for n in streams} for w in ways}
        for number in range(a.rounds + 1):
            for n in streams:
                turn = number % len(ways)  # nobody always comes after the same
                for label in [*ways][turn:] + [*ways][:turn]:
                    one = ways[label]
                    time.sleep(SETTLE_S)
                    found = one.round(n, number)
                    if number == 0:
                        continue  # to warm up
                    kept = out[label][str(n)]
                    kept["rates"].append(found["rate"])
                    if "first_ms" in found:
                        kept.setdefault("firsts_ms", []).append(found["first_ms"])
            print(name, f"round {number} of {a.rounds}", flush=True)
    return out


@contextlib.contextmanager
def vllm_server(model: Path, a: argparse.Namespace, env: dict[str, str]) -> Iterator[str]:
    """vLLM's own server; its address."""
    port = free_port()
    command = [str(a.vllm_python), "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(model), "--served-model-name", "m"]
    command += ["--port", str(port), "--host", "127.0.0.1"]
    command += ["--max-model-len", str(CONTEXT), "--max-num-seqs", "64", "--dtype", "bfloat16"]
    command += ["--enforce-eager"] if a.eager else []
    base = f"http://127.0.0.1:{port}"
    with process(command, env, f"{base}/health"):
        yield base


@contextlib.contextmanager
def forebay(
    model: Path, a: argparse.Namespace, options: dict[str, Any], env: dict[str, str]
) -> Iterator[tuple[str, str]]:
    """Forebay; its addresses for gRPC and REST."""
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / "models" / "m"
        folder.mkdir(parents=True)
        shutil.copytree(model, folder / "1")
        settings = f"engine: vllm\nengine_options: {json.dumps(options)}\n"
        (folder / "model.yaml").write_text(settings)
        grpc_port, http_port = free_port(), free_port()
        flags = {
            **env,
            "FOREBAY_HOME": home,
            "FOREBAY_GRPC_PORT": str(grpc_port),
            "FOREBAY_HTTP_PORT": str(http_port),
            "FOREBAY_MODELS__STARTERS": "false",
            "FOREBAY_GENERATION__VLLM_PYTHON": str(a.vllm_python),
            "FOREBAY_OBSERVABILITY__ACCESS_LOG": "false",
        }
        rest = f"http://127.0.0.1:{http_port}"
        with process([sys.executable, "-m", "forebay_cli", "up"], flags, f"{rest}/readyz"):
            yield f"127.0.0.1:{grpc_port}", rest


def table(name: str, found: dict[str, Any]) -> str:
    """Markdown: medians over rounds."""
    lines = [
        f"## {name}: {len(next(iter(found['offline'].values()))['rates'])} rounds",
        "",
        "| way | streams | tokens/s (median) | least - most | of offline | of offline, one process | first token p50, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for way, by_streams in found.items():
        for n, one in sorted(by_streams.items(), key=lambda found: int(found[0])):
            rates = one["rates"]
            median = statistics.median(rates)
            ratios = [
                statistics.median(
                    r / bar for r, bar in zip(rates, found[way][n]["rates"], strict=True)
                )
                for way in ("offline", "offline, one process")
            ]
            first = f"{statistics.median(one['firsts_ms']):.1f}" if "firsts_ms" in one else ""
            lines.append(
                f"| {way} | {n} | {median:.0f} | {min(rates):.0f} - {max(rates):.0f} | {ratios[0]:.2f} | {ratios[1]:.2f} | {first} |"
            )
    return "\n".join(lines) + "\n"


def plot(found: dict[str, Any], path: Path) -> None:
    """Tokens a second by streams, one panel per model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(found), figsize=(5.5 * len(found), 4), squeeze=False)
    for axis, (name, ways) in zip(axes[0], found.items(), strict=True):
        for way, by_streams in ways.items():
            xs = sorted(int(n) for n in by_streams)
            axis.plot(
                xs,
                [statistics.median(by_streams[str(x)]["rates"]) for x in xs],
                marker="o",
                label=way,
            )
        axis.set(title=name, xlabel="streams", ylabel="tokens/s", xscale="log", yscale="log")
        axis.set_xticks(xs, [str(x) for x in xs])
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vllm-python", type=Path, default=ROOT / ".venv-vllm" / "bin" / "python")
    parser.add_argument("--tiny", type=Path, default=ROOT / ".forebay" / "tiny-lm")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--eager", action="store_true", help="without vLLM's compiler")
    parser.add_argument("--only", default="", help="one of tiny, 27M, 109M")
    a = parser.parse_args()
    a.vllm_python = a.vllm_python.absolute()
    kept = RESULTS / "generation.json"
    found: dict[str, Any] = {}
    if a.only and kept.exists():  # those that were measured in the same ways
        before = json.loads(kept.read_text())
        found = before
    with tempfile.TemporaryDirectory() as folder:
        a.load = Path(folder) / "load"
        build = ["go", "build", "-mod=mod", "-o", str(a.load), "."]
        subprocess.run(build, cwd=ROOT / "benchmarks" / "streams", check=True)
        if a.only in ("", "tiny"):
            found["tiny model, 2.0M"] = measure("tiny", a.tiny, a)
        for size, shape in SHAPES.items():
            if a.only not in ("", size):
                continue
            made = Path(folder) / size
            weights = shutil.ignore_patterns("*.safetensors", "config.json")
            shutil.copytree(a.tiny, made, ignore=weights)
            command = [str(a.vllm_python), "-c", MAKE, str(made), json.dumps(shape)]
            subprocess.run(command, check=True, capture_output=True)
            found[f"random Llama, {size}"] = measure(size, made, a)
    text = "# Language models on the CPU: what the layers cost\n\n"
    text += f"Medians of rounds after one to warm up, {PROMPT} tokens in, {a.tokens} out, greedy, bfloat16; "
    text += f"{os.cpu_count()} cores shared by engine, server and load; all ways of a model take turns, round by round"
    text += ", without vLLM's compiler" if a.eager else ""
    text += (
        ".\nRepeat: `python -m benchmarks.generation" + (" --eager" if a.eager else "") + "`.\n\n"
    )
    text += "\n".join(table(n, f) for n, f in found.items())
    text += "\n![tokens per second](generation.png)\n"
    (RESULTS / "generation.md").write_text(text)
    kept.write_text(json.dumps(found, indent=1) + "\n")
    plot(found, RESULTS / "generation.png")
    print(text)


if __name__ == "__main__":
    main()
