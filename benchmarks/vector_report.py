"""The results of vector_search as Markdown and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

HEAD = """# Vector search

`python -m benchmarks.vector_search`, {date}, {cores} cores ({cpu}), server, load generator and peers on
the same cores. 384 dimensions, cosine, k = 10. {real} of the points are minilm's embeddings of real
sentences, the others are drawn like them (benchmarks/vector_data.py says how; {difficulty}). Queries
are embeddings of 2,000 other real sentences. Usage, limits, metrics and access log are on. Recall is
against exact search of all points. Medians of {rounds} rounds.
"""


def table(head: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(c) for c in row) + " |" for row in lines) + "\n"


def n(value: float | None, digits: int = 0) -> str:
    """A number as it is read."""
    return "-" if value is None else f"{value:,.{digits}f}"


def sizes(points: str, part: dict[str, Any]) -> list[str]:
    """What is said of one number of points."""
    out = [f"\n## {int(points):,} points, through gRPC\n"]
    kinds = [k for k in ("hnsw", "flat", "ivf_pq") if k in part or f"load {k}" in part]
    rows = []
    for k in kinds:
        a, b = part.get(f"load {k}", {}), part.get(k, {})
        memory = b.get("memory", {})
        rows.append([k, n(a.get("upsert_points_per_s")), n(a.get("built_after_s")), n(a.get("index_mb")),
                     n(memory.get("rss_mb")), n(a.get("peak_mb")), n(b.get("started_s"), 1)])  # fmt: skip
    head = ["index", "upserts/s (stream)", "all built after s", "index MB", "server MB", "most MB while loading", "start s"]  # fmt: skip
    out.append(table(head, rows))
    rows = []
    for k in kinds:
        b = part.get(k)
        if not b or "rps" not in b:
            continue
        step = b.get("ef_search") or b.get("probes") or "-"
        rows.append([k, step, n(b["recall@10"], 3), n(b["rps"]), n(b["p50_ms"], 1), n(b["p99_ms"], 1),
                     n(b["payload_rps"]), n(b["bare_rps"]), n(b["bare_recall@10"], 3), f"**{b['ratio']:.2f}**",
                     n(b["batch"], 1), n(b["cpu_us"]), n(b.get("bare_cpu_us")), n(b.get("cpu_ratio"), 2)])  # fmt: skip
    head = ["index", "ef / probes", "recall@10", "searches/s, 64 callers", "p50 ms", "p99 ms", "with payloads/s",
            "bare FAISS/s", "its recall", "ratio", "mean batch", "CPU us a search, server", "bare", "ratio of CPU"]  # fmt: skip
    out.append(table(head, rows))
    for k in kinds:
        large = part.get(k, {}).get("bare_large_pages_rps")
        if large:
            ratio = part[k]["rps"] / large
            out.append(f"\nBare FAISS has its memory in pages of 4 kB, as programs have where the kernel leaves that "
                       f"to them; the server asks for pages of 2 MB (docs/adr/0027). Given such, bare FAISS has "
                       f"{n(large)} searches/s with {k}, and the ratio is {ratio:.2f}.\n")  # fmt: skip
    found = part.get("hnsw", {}).get("filtered")
    if found:
        out.append("\nFiltered (HNSW, the same ef), searches of one SearchStream:\n")
        rows = [[k, n(v["recall@10"], 3), n(v["searches_per_s"])] for k, v in found.items()]
        out.append(table(["points that match", "recall@10", "searches/s"], rows))
    for k in kinds:
        curve = part.get(k, {}).get("recall_by")
        if curve:
            said = ", ".join(f"{s}: {r:.3f}" for s, r in curve.items())
            out.append(f"\nrecall@10 of {k} by {'ef' if k == 'hnsw' else 'probes'}: {said}.\n")
    return out


def peers(part: dict[str, Any]) -> list[str]:
    """What is said of peers."""
    out = [
        "\n## Beside peers, 100,000 points, one run\n",
        "The least effort that reaches recall@10 of 0.95. Forebay through gRPC with 64 callers, prepared frames; "
        "the others in process, by their fastest way of those tried (1, 2, 8 threads of single queries; "
        "64 queries a call where they take them).\n",
    ]
    rows = []
    for name, p in part.items():
        if "rps" not in p:
            continue
        ways = p.get("ways")
        if ways:
            way = max(ways, key=ways.get)
            singles = n(max(v for k, v in ways.items() if "a call" not in k))
        else:
            way, singles = "64 callers, gRPC", n(p["rps"])
        rows.append([name, p.get("package", ""), n(p["recall@10"], 3), n(p["rps"]), way, singles,
                     n(p.get("built_s"))])  # fmt: skip
    head = ["library", "package", "recall@10", "queries/s", "way", "single queries/s", "loaded and built in s"]  # fmt: skip
    return [*out, table(head, rows)]


def write(results: dict[str, Any], folder: Path) -> None:
    """vector_search.md and .png from the JSON."""
    machine = results["machine"]
    measured = [k for k in results if k.isdigit() and len(results[k]) > 1]
    counts = sorted(measured, key=int, reverse=True)
    difficulty = results.get("difficulty")
    said = "not compared"
    if difficulty:
        ef = "64"
        said = (
            f"HNSW with ef {ef} finds {difficulty['real'][ef]:.3f} among 40,000 real ones and "
            f"{difficulty['drawn'][ef]:.3f} among as many drawn ones"
        )
    rounds = len(results[counts[0]].get("hnsw", {}).get("rounds", [])) if counts else 0
    text = HEAD.format(
        date=machine["date"],
        cores=machine["cores"],
        cpu=machine["cpu"],
        real=f"{results[counts[0]]['real_points']:,}" if counts else "-",
        difficulty=said,
        rounds=rounds,
    )
    parts = [text]
    for points in counts:
        parts += sizes(points, results[points])
    if "peers" in results:
        parts += peers(results["peers"])
    parts += [f"\n{note}\n" for note in results.get("notes", [])]
    (folder / "vector_search.md").write_text("\n".join(parts))
    _plot(results, counts, folder / "vector_search.png")


def _plot(results: dict[str, Any], counts: list[str], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    bars = [
        (f"{k}, {int(c):,}", results[c][k])
        for c in counts
        for k in ("hnsw", "ivf_pq", "flat")
        if "rps" in results[c].get(k, {})
    ]
    at = range(len(bars))
    left.bar([x - 0.2 for x in at], [b["rps"] for _, b in bars], 0.4, label="through gRPC")
    left.bar([x + 0.2 for x in at], [b["bare_rps"] for _, b in bars], 0.4, label="bare FAISS")
    left.set_xticks(list(at), [name for name, _ in bars], fontsize=8)
    left.set_ylabel("searches/s")
    left.legend(fontsize=8)
    shown = {k: p for k, p in results.get("peers", {}).items() if "rps" in p}
    right.barh(list(shown), [p["rps"] for p in shown.values()])
    right.set_xlabel("queries/s at recall@10 of 0.95, 100,000 points")
    for i, p in enumerate(shown.values()):
        right.text(p["rps"], i, f" {p['rps']:,.0f} ({p['recall@10']:.2f})", va="center", fontsize=8)
    right.margins(x=0.2)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    import json

    from benchmarks.common import RESULTS

    write(json.loads((RESULTS / "vector_search.json").read_text()), RESULTS)
