"""`forebay plan`: from a rate and a latency target to replicas, a batch policy and a price."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from forebay_cli.settings import fail

ROUTINGS = ("two_choices", "random", "round_robin", "least_loaded")
#: Of a batch, where model.yaml does not say.
BATCH_TEXTS, BATCH_ROWS = 32, 512


def plan(
    rate: Annotated[float | None, typer.Option(help="Calls a second to serve.")] = None,
    p99_ms: Annotated[float, typer.Option(help="Latency that 99 of 100 calls keep.")] = 100.0,
    fit: Annotated[
        str, typer.Option(help="Model of the running server, or a model folder, to measure.")
    ] = "",
    cost: Annotated[Path | None, typer.Option(help="A cost model that --save wrote.")] = None,
    save: Annotated[Path | None, typer.Option(help="Write the fitted cost model here.")] = None,
    tokens: Annotated[str, typer.Option(help="Tokens of a text: 20, or 5-256.")] = "20",
    rows: Annotated[int, typer.Option(min=1, help="Rows of a tabular call.")] = 1,
    max_batch_tokens: Annotated[int, typer.Option(min=1)] = 1024,
    max_batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Rows of a batch; by default 32 texts, 512 table rows."),
    ] = None,
    max_padding_tokens: Annotated[int, typer.Option(min=0, help="Padding of a batch.")] = 12,
    instances: Annotated[
        int, typer.Option(min=1, help="Engines of a replica; with --fit, of the running server.")
    ] = 1,
    call_us: Annotated[
        float | None,
        typer.Option(min=0, help="Interpreter time of a call, microseconds; default: as fitted."),
    ] = None,
    headroom: Annotated[float, typer.Option(min=0, help="Share of the rate on top.")] = 0.2,
    routing: Annotated[str, typer.Option(help=", ".join(ROUTINGS))] = "two_choices",
    price: Annotated[float, typer.Option(min=0, help="Of a replica for an hour.")] = 0.0,
    keep_policy: Annotated[bool, typer.Option(help="Do not look for a better policy.")] = False,
    output: Annotated[Path | None, typer.Option(help="Write the plans as JSON too.")] = None,
) -> None:
    """Say how many replicas, with which batch policy, keep a latency target at a rate.

    The server's own queue runs in simulated time; what a batch costs is fitted from measurement.
    """
    from forebay_server.capacity import planning
    from forebay_server.capacity.simulation import Call
    from forebay_server.core.interfaces import BatchPolicy
    from rich.console import Console
    from rich.progress import Progress

    if routing not in ROUTINGS:
        fail(f"--routing is {routing!r}; allowed are {', '.join(ROUTINGS)}")
    if bool(fit) == (cost is not None):
        fail("one of --fit and --cost is needed")
    lengths = lengths_of(tokens)
    said = BatchPolicy(max_batch_tokens, max_batch_size or BATCH_ROWS, max_padding_tokens)
    model, policy, instances, text = _cost(fit, cost, lengths, rows, said, instances)
    if policy is said and text and max_batch_size is None:
        policy = replace(policy, max_batch_size=BATCH_TEXTS)
    table = Call.of_table(rows, policy.max_batch_size)
    calls = [Call(n) for n in lengths] if text else [table]
    call_s = model.call_s if call_us is None else call_us / 1e6
    if save is not None:
        save.write_text(model.to_json() + "\n")
    peak = planning.peak(model, policy, calls, instances, call_s)
    typer.echo(
        f"a batch takes {model.base_s * 1e3:.3f} ms + {model.per_row_s * 1e6:.1f} us a row"
        + (f" + {model.per_token_s * 1e6:.2f} us a token" if model.per_token_s else "")
        + f" (off by {model.error:.0%} in the middle); "
        f"one replica's peak is {peak:.0f} calls/s"
    )
    if rate is None:
        return
    target = planning.Target(
        rate,
        p99_ms / 1e3,
        calls,
        headroom,
        instances,
        call_s,
        routing=routing,
        price_per_hour=price,
    )
    policies = [policy] if keep_policy else planning.candidates(policy, calls)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"{len(policies)} policies", total=len(policies))
        plans = planning.best(target, model, policies, lambda: progress.advance(task))
    if not plans:
        fail(
            f"no number of replicas keeps a p99 of {p99_ms:g} ms: one call alone takes "
            f"{model.seconds(calls[-1].rows, calls[-1].length) * 1e3:.1f} ms"
        )
    _show(plans, text, price)
    if output is not None:
        made = {"cost": json.loads(model.to_json()), "plans": [asdict(p) for p in plans]}
        output.write_text(json.dumps(made, indent=1) + "\n")


def _cost(
    fit: str, cost: Path | None, lengths: list[int], rows: int, policy: Any, instances: int
) -> tuple[Any, Any, int, bool]:
    """The cost model, the policy and the instances in force, and whether its items are texts."""
    from forebay.errors import ForebayError
    from forebay_server.capacity.cost import CostModel

    if cost is not None:
        try:
            model = CostModel.read(cost)
        except (OSError, ValueError, TypeError) as e:
            fail(f"{cost}: {e}")
        return model, policy, instances, model.source.get("items") != "rows"
    spread = (
        lengths if len(lengths) < 6 else [lengths[i * (len(lengths) - 1) // 4] for i in range(5)]
    )
    try:
        if Path(fit).is_dir():
            from forebay_server.capacity.fitting import fit_folder

            model, policy, instances = fit_folder(Path(fit), spread)
        else:
            from forebay_cli.client import channel
            from forebay_cli.fit import fit_live

            with channel() as (open_channel, metadata):
                found = fit_live(
                    open_channel, metadata, fit, spread, 1.5, rows, instances, policy.max_batch_size
                )
                model = found.model
    except (ForebayError, ValueError) as e:
        fail(str(e))
    return model, policy, instances, model.source.get("items") != "rows"


def lengths_of(text: str) -> list[int]:
    """Lengths from `20` or `5-256`; exits with a message for anything else."""
    low, _, high = text.partition("-")
    try:
        first, last = int(low), int(high or low)
    except ValueError:
        fail(f"--tokens is {text!r}; a number or a range such as 5-256 is needed")
    if not 1 <= first <= last:
        fail(f"--tokens is {text!r}; a range begins with at least 1 and does not fall")
    step = max(1, (last - first) // 63)
    return list(range(first, last + 1, step))


def _show(plans: list[Any], text: bool, price: float) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "tokens a batch" if text else "rows a batch",
        "delay ms",
        "replicas",
        "one takes, calls/s",
        "p50 ms",
        "p99 ms",
        "busy",
        "rows a batch, mean",
        *(["an hour", "a million calls"] if price else []),
    )
    for p in plans[:8]:
        bound = p.policy.max_batch_tokens if text else p.policy.max_batch_size
        table.add_row(
            str(bound),
            f"{p.policy.max_queue_delay_s * 1e3:g}",
            str(p.replicas),
            f"{p.capacity:.0f}",
            f"{p.p50_s * 1e3:.1f}",
            f"{p.p99_s * 1e3:.1f}",
            f"{p.utilisation:.0%}",
            f"{p.batch_rows:.1f}",
            *([f"{p.cost_per_hour:.2f}", f"{p.cost_per_million:.4f}"] if price else []),
        )
    Console(width=130).print(table)
    first = plans[0]
    typer.echo(
        f"{first.replicas} replicas; in model.yaml: batching: "
        + (
            f"{{max_batch_tokens: {first.policy.max_batch_tokens}, "
            if text
            else f"{{max_batch_size: {first.policy.max_batch_size}, "
        )
        + f"max_queue_delay_ms: {first.policy.max_queue_delay_s * 1e3:g}}}"
    )
