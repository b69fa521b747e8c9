"""`forebay bench tune`: the batch policy of a model for this machine, by measurement."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from forebay_cli.plan import lengths_of


def tune(
    folder: Annotated[Path, typer.Argument(help="A model folder of the repository.")],
    tokens: Annotated[str, typer.Option(help="Tokens of a text: 20, or 5-256.")] = "20",
    rows: Annotated[int, typer.Option(min=1, help="Rows of a tabular call.")] = 1,
    callers: Annotated[int, typer.Option(min=2, help="Callers at once, at most.")] = 64,
    seconds: Annotated[float, typer.Option(min=0.01, help="Of each point.")] = 1.5,
    write: Annotated[bool, typer.Option(help="Write the policy into model.yaml.")] = True,
    plot: Annotated[
        Path | None, typer.Option(help="PNG of throughput against latency (needs matplotlib).")
    ] = None,
) -> None:
    """Try batch budgets, delays, instances and threads; recommend, and write model.yaml."""
    from forebay.errors import ForebayError
    from forebay_server.capacity import tuning

    def show(p: Any) -> None:
        typer.echo(f"{_name(p.candidate):48} {p.callers:4} callers {_figures(p)}")

    try:
        points = tuning.sweep(
            folder, lengths_of(tokens), (1, max(2, callers // 8), callers), seconds, rows, show
        )
    except ForebayError as e:
        typer.secho(f"forebay: {e}", fg="red", err=True)
        raise typer.Exit(2) from None
    best = tuning.recommended(points)
    before = next(p for p in points if p.callers == callers)
    after = next(p for p in points if p.callers == callers and p.candidate == best)
    typer.echo(f"\nat present   {_name(before.candidate):48} {_figures(before)}")
    typer.echo(f"recommended  {_name(best):48} {_figures(after)}")
    if plot is not None:
        _plot(points, best, plot, f"{folder.name}, {tokens} tokens" if rows == 1 else folder.name)
    if write:
        _write(folder / "model.yaml", best, _text(points))
        typer.echo(f"written into {folder / 'model.yaml'}")


def _text(points: Any) -> bool:
    """Whether token budgets were tried."""
    return len({p.candidate.policy.max_batch_tokens for p in points}) > 1


def _name(candidate: Any) -> str:
    policy = candidate.policy
    lone = f" (alone {candidate.lone_threads})" if candidate.lone_threads else ""
    return (
        f"{candidate.instances} x {candidate.threads} threads{lone}, {policy.max_batch_tokens} tokens, "
        f"{policy.max_padding_tokens} of padding, {policy.max_batch_size} rows, {policy.max_queue_delay_s * 1e3:g} ms"
    )


def _figures(p: Any) -> str:
    return f"{p.per_s:9.0f}/s  p50 {p.p50_s * 1e3:8.2f} ms  p99 {p.p99_s * 1e3:8.2f} ms"


def _write(path: Path, best: Any, text: bool) -> None:
    """Set what was tuned in model.yaml, and leave the rest of its keys as they are."""
    import yaml

    data: dict[str, Any] = {}
    if path.exists():
        data = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    batching = data.setdefault("batching", {})
    if text:
        batching["max_batch_tokens"] = best.policy.max_batch_tokens
        batching["max_padding_tokens"] = best.policy.max_padding_tokens
    batching["max_batch_size"] = best.policy.max_batch_size
    batching["max_queue_delay_ms"] = best.policy.max_queue_delay_s * 1e3
    execution = data.setdefault("execution", {})
    execution["instances"] = best.instances
    execution["intra_op_threads"] = best.threads
    execution["lone_threads"] = best.lone_threads
    beside = path.with_suffix(".yaml.new")  # a server that looks meanwhile sees one or the other
    beside.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    os.replace(beside, path)


def _plot(points: Any, best: Any, target: Path, title: str) -> None:
    try:
        import matplotlib
    except ImportError:
        typer.secho("forebay: --plot needs matplotlib", fg="red", err=True)
        raise typer.Exit(2) from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from forebay_server.capacity.tuning import frontier

    figure, axis = plt.subplots(figsize=(8, 5))
    for n in sorted({p.callers for p in points}):
        some = [p for p in points if p.callers == n]
        axis.scatter(
            [p.per_s for p in some], [p.p99_s * 1e3 for p in some], s=14, label=f"{n} callers"
        )
    edge = frontier(points)
    axis.plot([p.per_s for p in edge], [p.p99_s * 1e3 for p in edge], lw=0.8, color="0.4")
    chosen = [p for p in points if p.candidate == best]
    axis.scatter(
        [p.per_s for p in chosen],
        [p.p99_s * 1e3 for p in chosen],
        s=90,
        facecolors="none",
        edgecolors="red",
        label=f"recommended: {_name(best)}",
    )
    axis.set_yscale("log")
    axis.set_xlabel("calls a second")
    axis.set_ylabel("p99, ms")
    axis.set_title(title)
    axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(target, dpi=90)
