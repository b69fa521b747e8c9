"""Whether `forebay plan` tells the truth: its p50 and p99 beside those of a real open-loop run.

    python -m benchmarks.plan_check [--seconds 40] [--only embed] [--keep]

For each workload a cost model is fitted from a running server, as `forebay plan --fit` does; then Poisson
arrivals at shares of the peak that the model names are sent to that server by the open-loop generator,
and simulated. Asked for is that p50 and p99 agree within 20%. With --keep it writes
benchmarks/results/plan_check.{json,md}, and the fitted cost models beside them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import grpc
from forebay_cli.fit import fit_live
from forebay_server.capacity.planning import peak
from forebay_server.capacity.simulation import Call, Scenario, simulate
from forebay_server.core.interfaces import BatchPolicy
from forebay_server.repository.inspect import describe
from forebay_server.repository.loading import (
    BATCH_TOKENS,
    PADDING_TOKENS,
    Defaults,
    engine_spec,
)
from forebay_server.repository.manifest import ModelConfig

from benchmarks import common
from benchmarks.openloop import Workload, run, workloads
from benchmarks.openloop.live import serve

SHARES = (0.3, 0.5, 0.7)
WITHIN = 0.2
TEXTS = BatchPolicy(BATCH_TOKENS[False], 32, PADDING_TOKENS[False])
ROWS = BatchPolicy(max_batch_size=512)


def mixed(models: Path) -> Workload:
    """Embed with texts of 5 to 256 tokens."""
    out = Workload("mixed", "forebay.v1.EmbeddingService/Embed")
    for tokens in sorted(set(common.mixed_lengths(60))):
        out.requests += workloads.embed(models, tokens, calls=1).requests
    return out


def cases(models: Path) -> dict[str, tuple[Workload, str, list[int], list[Call], BatchPolicy, int]]:
    """By name: workload, model, lengths to fit, calls to simulate, policy, rows a call."""
    lengths = sorted(set(common.mixed_lengths(60)))
    return {
        "embed": (workloads.embed(models), "minilm", [20], [Call(20)], TEXTS, 1),
        "mixed": (
            mixed(models),
            "minilm",
            [8, 32, 64, 128, 192, 256],
            [Call(n) for n in lengths],
            TEXTS,
            1,
        ),
        "forest": (
            workloads.forest(models),
            "housing",
            [],
            [Call.of_table(500, ROWS.max_batch_size)],
            ROWS,
            500,
        ),
    }


def instances(models: Path, name: str) -> int:
    """Engines that the server has for a model."""
    folder = models / name / "1"
    spec = engine_spec(name, 1, folder, describe(folder), ModelConfig(), Defaults(), None)
    return spec.instances


def check(models: Path, name: str, seconds: float) -> dict[str, Any]:
    """One workload, fitted, run and simulated."""
    workload, model, lengths, calls, policy, rows = cases(models)[name]
    with serve(models, FOREBAY_GRPC__LANE="fast") as server:
        with grpc.insecure_channel(server.target) as channel:
            slots = instances(models, model)
            most = policy.max_batch_size
            cost = fit_live(
                channel, [], model, lengths, rows=rows, instances=slots, most=most
            ).model
        able = peak(cost, policy, calls, slots, cost.call_s)
        runs = []
        for share in SHARES:
            rate = share * able
            out = run(
                {
                    "target": server.target,
                    "connections": {"main": {"count": 8}},
                    "workloads": [workload.spec(deadline_ms=10_000)],
                    "phases": [
                        {"name": "warm", "seconds": 3, "rate": rate},
                        {"name": "run", "seconds": seconds, "rate": rate},
                    ],
                    "seed": 23,
                }
            )
            real = out["phases"][1]
            scenario = Scenario(rate, calls, cost, policy, slots=slots, call_s=cost.call_s)
            simulated = simulate(scenario, max(120.0, 20_000 / rate))
            row: dict[str, Any] = {"share": share, "rate": rate, "calls": real["offered"]}
            for q in ("50", "99"):
                is_ms = real["latency"]["percentiles_ms"][q]
                said_ms = simulated.quantile(float(q) / 100) * 1e3
                row[f"p{q}_ms"], row[f"said_p{q}_ms"] = is_ms, round(said_ms, 3)
                row[f"p{q}_off"] = round(said_ms / is_ms - 1, 3)
            row["codes"], row["wrong"] = real["codes"], real["wrong"]
            runs.append(row)
    return {"cost": json.loads(cost.to_json()), "peak": able, "runs": runs}


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        "# forebay plan against a real run",
        "",
        f"{result['machine']}; server and generator on the same cores, one replica, Poisson arrivals. "
        "`python -m benchmarks.plan_check --keep`",
        "",
        "| calls | share of the peak | calls/s | p50 ms: run, simulated, off | p99 ms: run, simulated, off |",
        "|---|---|---|---|---|",
    ]
    off = []
    for name, case in result["cases"].items():
        for r in case["runs"]:
            off += [(abs(r["p50_off"]), name), (abs(r["p99_off"]), name)]
            lines.append(
                f"| {name} | {r['share']:.0%} | {r['rate']:.0f} "
                f"| {r['p50_ms']:.2f}, {r['said_p50_ms']:.2f}, {r['p50_off']:+.0%} "
                f"| {r['p99_ms']:.2f}, {r['said_p99_ms']:.2f}, {r['p99_off']:+.0%} |"
            )
    within = sum(o <= WITHIN for o, _ in off)
    lines += ["", f"{within} of {len(off)} percentiles agree within {WITHIN:.0%}."]
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--only", action="append")
    parser.add_argument("--keep", action="store_true")
    args = parser.parse_args()
    names = args.only or ["embed", "mixed", "forest"]
    with common.exact_starters() as models:
        result = {
            "machine": common.machine(),
            "seconds": args.seconds,
            "cases": {n: check(models, n, args.seconds) for n in names},
        }
    print(table(result))
    for name, case in result["cases"].items():
        print(name, {k: v for k, v in case["cost"].items() if k not in ("ratios", "overhead_s")})
    if args.keep:
        (common.RESULTS / "plan_check.md").write_text(table(result))
        text = json.dumps(result, indent=1)
        (common.RESULTS / "plan_check.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
