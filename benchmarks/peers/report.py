"""A run's results: JSON, Markdown with the table of targets, plots."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.peers import figures
from benchmarks.peers.figures import Point, Target
from benchmarks.peers.state import State

TITLES = {
    "tabular": "Tabular: a random forest, one row a call",
    "embed-20": "Embedding: one text of 20 tokens a call",
    "embed-128": "Embedding: one text of 128 tokens a call",
    "embed-mixed": "Embedding: one text of 5 to 256 tokens a call",
    "classify": "Classification: one text of 20 tokens a call",
    "rerank": "Rerank: ten documents of 20 tokens a call",
}


def write(state: State, name: str, folder: Path = common.RESULTS) -> None:
    """`NAME.json`, `NAME.md` and plots."""
    folder.mkdir(parents=True, exist_ok=True)
    found = figures.points(state.records)
    targets = figures.targets(state.records)
    rounds = 1 + max((r["round"] for r in state.records if "round" in r), default=-1)
    summary = {
        **state.facts,
        "date": time.strftime("%Y-%m-%d", time.localtime(state.path.stat().st_mtime)),
        "rounds": rounds,
        "targets": [
            {
                "number": t.number,
                "text": t.text,
                "beside": t.beside,
                "rounds": [_round(v) for v in t.values],
                "median": _round(t.value),
                "bound": t.bound,
                "verdict": t.verdict,
            }
            for t in targets
        ],
        "points": [
            {
                "workload": p.workload,
                "server": p.label,
                "role": p.role,
                "door": p.door,
                "callers": p.callers,
                "median": {m: _round(p.median(m)) for m in figures.METRICS},
                "spread": {m: [_round(v) for v in p.spread(m)] for m in figures.METRICS},
            }
            for p in found
        ],
        "records": [
            {k: _round(v) if isinstance(v, float) else v for k, v in r.items()}
            for r in state.records
        ],
    }
    (folder / f"{name}.json").write_text(json.dumps(summary, indent=1) + "\n")
    plots = plot(found, name, folder)
    text = markdown(state, found, targets, rounds, plots)
    (folder / f"{name}.md").write_text(text)
    print(text)


def _round(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def markdown(
    state: State, found: Sequence[Point], targets: Sequence[Target], rounds: int, plots: list[str]
) -> str:
    """The whole report."""
    facts = state.facts
    machine = ", ".join(f"{k} {v}" for k, v in facts["machine"].items())
    lines = [
        "# Forebay and its peers, side by side",
        "",
        f"Machine: {machine}. Commit {facts['commit']}. {rounds} rounds; runs of "
        f"{facts['seconds']:g} s and longer after {facts['warmup']:g} s of warm-up, each server alone "
        "on the machine with the load generator, in turn. gRPC by ghz over at most four "
        "connections, HTTP by wrk (a far lighter client: compare doors with care). Every answer is "
        "checked first. Forebay runs with keys, limits, usage, metrics and logs on; peers without.",
        "",
        "## Targets",
        "",
        "| target | what | median (rounds) | asked | |",
        "|---|---|---|---|---|",
    ]
    for t in targets:
        value = "-" if t.value is None else f"{t.value:.3g}"
        spread = f" ({min(t.values):.3g}-{max(t.values):.3g})" if t.values else ""
        sign = "at least" if t.least else "at most"
        beside = f" ({t.beside})" if t.beside else ""
        lines.append(
            f"| {t.number} | {t.text}{beside} | {value}{spread} | {sign} {t.bound:g} | {t.verdict} |"
        )
    for group in ("tabular", "embed"):
        lines += _bare(state.records, group)
    for workload in TITLES:
        lines += _workload([p for p in found if p.workload == workload], workload)
    lines += _memory(state.records)
    lines += _faults(state.records)
    if plots:
        lines += ["", "## Plots", "", *(f"![{p}]({p})" for p in plots)]
    return "\n".join([*lines, ""])


def _bare(records: Sequence[dict[str, Any]], group: str) -> list[str]:
    names = {k for r in records if r.get("group") == group and "bare" in r for k in r}
    names -= {"round", "group", "bare"}
    if not names:
        return []
    said = []
    for name in sorted(names):
        values = figures.bare(records, group, name).values()
        unit = "ms for one" if name == "one_ms" else "/s"
        label = "" if name == "one_ms" else f"{name}: "
        said.append(f"{label}{statistics.median(values):.4g} {unit}")
    title = {"tabular": "forest, 1 thread", "embed": "MiniLM fp32, 2 threads"}[group]
    return ["", f"Bare ONNX Runtime, {title}: {'; '.join(said)}."]


def _workload(found: Sequence[Point], workload: str) -> list[str]:
    """One table: a line a door of a server, the callers beside each other."""
    if not found:
        return []
    callers = sorted({p.callers for p in found})
    head = " | ".join(f"{c} caller{'s' if c > 1 else ''}: calls/s, p50, p99 ms" for c in callers)
    lines = [
        "",
        f"## {TITLES[workload]}",
        "",
        f"| server | door | {head} | CPU us a call: server, client |",
        "|---|---|" + "---|" * (len(callers) + 1),
    ]
    rows: dict[tuple[str, str], dict[int, Point]] = {}
    for p in found:
        rows.setdefault((p.label, p.door), {})[p.callers] = p

    def rate(item: tuple[Any, dict[int, Point]]) -> float:
        return -max(p.median("rps") for p in item[1].values())

    for (label, door), at in sorted(rows.items(), key=rate):
        cells = []
        for c in callers:
            p = at.get(c)
            if p is None:
                cells.append("-")
                continue
            low, high = p.spread("rps")
            cells.append(
                f"{p.median('rps'):.4g} ({low:.4g}-{high:.4g}), "
                f"{p.median('p50_ms'):.3g}, {p.median('p99_ms'):.3g}"
            )
        last = at[max(at)]
        bold = "**" if last.role == "forebay" else ""
        cpu = f"{last.median('server_cpu_us'):.0f}, {last.median('client_cpu_us'):.0f}"
        lines.append(f"| {bold}{label}{bold} | {door} | {' | '.join(cells)} | {cpu} |")
    return lines


def _memory(records: Sequence[dict[str, Any]]) -> list[str]:
    kept: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for r in records:
        if "start_s" in r:
            kept.setdefault((r["group"], f"{r['server']} {r['config']}".strip()), []).append(r)
    if not kept:
        return []
    lines = [
        "",
        "## Start and memory",
        "",
        "Seconds to the first right answer of every door; proportional set size of all processes.",
        "",
        "| group | server | start s | idle MB | after load MB |",
        "|---|---|---|---|---|",
    ]
    for (group, label), found in kept.items():
        start, idle, loaded = (
            statistics.median(r[k] for r in found) for k in ("start_s", "idle_mb", "loaded_mb")
        )
        lines.append(f"| {group} | {label} | {start:.1f} | {idle:.0f} | {loaded:.0f} |")
    return lines


def _faults(records: Sequence[dict[str, Any]]) -> list[str]:
    lines = [f"- {r['absent']} is not here: {r['why']}" for r in records if "absent" in r]
    seen: dict[str, None] = {}
    for r in records:
        if "fault" in r:
            where = [r["server"], r["config"], r.get("workload", ""), r.get("door", "")]
            callers = f"{r['callers']} callers" if "callers" in r else ""
            text = ", ".join(x for x in [*where, callers] if x)
            seen[f"- {text}: {' '.join(r['fault'].split())}"] = None
    lines += seen
    return ["", "## What failed", "", *lines] if lines else []


def _best_lines(found: Sequence[Point], workload: str, transport: str) -> list[list[Point]]:
    """For each server its best configuration and door, as points by callers."""
    rows: dict[tuple[str, str], list[Point]] = {}
    for p in found:
        if p.workload == workload and p.transport == transport:
            rows.setdefault((p.label, p.door), []).append(p)
    chosen: dict[str, list[Point]] = {}
    for row in rows.values():
        server = row[0].server
        top = max(p.median("rps") for p in row)
        if server not in chosen or top > max(p.median("rps") for p in chosen[server]):
            chosen[server] = sorted(row, key=lambda p: p.callers)
    return sorted(chosen.values(), key=lambda r: -max(p.median("rps") for p in r))


def plot(found: Sequence[Point], name: str, folder: Path) -> list[str]:
    """Throughput against callers, latency percentiles, CPU a call. Gives the files' names."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    out = []
    for workload in TITLES:
        sets = {t: _best_lines(found, workload, t) for t in ("grpc", "http")}
        if not any(sets.values()):
            continue
        figure, axes = plt.subplots(2, 3, figsize=(16, 9))
        for (transport, rows), (rate, latency, cpu) in zip(sets.items(), axes, strict=True):
            most = max((p.callers for r in rows for p in r), default=0)
            for row in rows:
                width = 2.5 if row[0].role == "forebay" else 1.2
                style = "--" if row[0].role == "limit" else "-"
                rate.plot(
                    [p.callers for p in row],
                    [p.median("rps") for p in row],
                    style,
                    marker="o",
                    linewidth=width,
                    label=row[0].server,
                )
            rate.set(xscale="log", yscale="log", xlabel="callers")
            rate.set_title(f"{transport}: calls/s")
            if rows:
                rate.legend(fontsize=7)
            last = [p for r in rows for p in r if p.callers == most]
            names = [p.server for p in last]
            at = range(len(last))
            for i, percentile in enumerate(("p50_ms", "p90_ms", "p99_ms")):
                latency.bar(
                    [x + (i - 1) * 0.27 for x in at],
                    [p.median(percentile) for p in last],
                    0.27,
                    label=percentile[:3],
                )
            latency.set_yscale("log")
            latency.set_title(f"{transport}, {most} callers: latency, ms")
            cpu.bar(at, [p.median("server_cpu_us") for p in last], label="server")
            cpu.bar(
                at,
                [p.median("client_cpu_us") for p in last],
                bottom=[p.median("server_cpu_us") for p in last],
                label="load generator",
            )
            cpu.set_title(f"{transport}, {most} callers: CPU us a call")
            for axis in (latency, cpu):
                axis.set_xticks(list(at), names, rotation=30, ha="right", fontsize=7)
                if last:
                    axis.legend(fontsize=7)
        figure.suptitle(TITLES[workload])
        figure.tight_layout()
        file = f"{name}_{workload}.png"
        figure.savefig(folder / file, dpi=80)
        plt.close(figure)
        out.append(file)
    return out
