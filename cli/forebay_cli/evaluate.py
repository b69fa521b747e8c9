"""`forebay eval`: how well a knowledge base finds what is relevant, and how well it answers."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forebay_cli.client import channel

if TYPE_CHECKING:
    from forebay.v1 import knowledge_pb2 as pb
    from forebay.v1.knowledge_pb2_grpc import KnowledgeServiceStub

MODES = {
    "dense": "SEARCH_MODE_DENSE",
    "keyword": "SEARCH_MODE_KEYWORD",
    "hybrid": "SEARCH_MODE_HYBRID",
}


def evaluate(
    knowledge_base: str,
    questions: Annotated[
        Path | None,
        typer.Argument(
            help='NDJSON, a line each: {"query": ..., "relevant_documents": [...]}, '
            '{"query": ..., "relevant_texts": [...]}, {"query": ..., "answers": [...]}. Without a '
            "file: show the evaluations that are kept."
        ),
    ] = None,
    mode: Annotated[
        list[str] | None, typer.Option(help="dense, keyword, hybrid; default: all three.")
    ] = None,
    rerank: Annotated[
        list[str] | None, typer.Option(help="Each mode also reranked by this model.")
    ] = None,
    answer: Annotated[bool, typer.Option(help="Answer the questions too.")] = False,
    model: Annotated[str, typer.Option(help="Language model that writes the answers.")] = "",
    judge: Annotated[
        str,
        typer.Option(
            help="Language model that judges answers too, by ragas (extra `evaluation`), through "
            "the gateway."
        ),
    ] = "",
    url: Annotated[str, typer.Option(help="The gateway, for --judge.")] = "http://localhost:8080",
    name: Annotated[str, typer.Option(help="Name of the evaluation, for people.")] = "",
    output: Annotated[Path | None, typer.Option(help="Write the figures as JSON too.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the figures as PNG or SVG.")] = None,
) -> None:
    """Compare configurations of a knowledge base, with 95% intervals. The server keeps the results."""
    from forebay.v1 import knowledge_pb2 as pb
    from forebay.v1 import knowledge_pb2_grpc
    from google.protobuf import json_format

    with channel() as (open_channel, metadata):
        stub = knowledge_pb2_grpc.KnowledgeServiceStub(open_channel)
        if questions is None:
            _kept(stub, metadata, knowledge_base)
            return
        request = pb.StartEvaluationRequest(knowledge_base=knowledge_base, name=name)
        for number, line in _lines(questions):
            try:
                json_format.ParseDict(json.loads(line), request.items.add())
            except (json.JSONDecodeError, json_format.ParseError) as e:
                raise typer.BadParameter(f"{questions}:{number}: {e}") from None
        _runs(request, mode or list(MODES), rerank or [], answer or bool(judge), model)
        done = _wait(stub, metadata, request)
        results = [_of_message(r) for r in done.results]
        if judge:
            from forebay_cli.ragas_judge import judged

            for run, result in zip(request.runs, results, strict=True):
                result["metrics"] += judged(stub, metadata, request, run, judge, url)
    _table(results)
    if output is not None:
        output.write_text(json.dumps({"evaluation": done.id, "results": results}, indent=1) + "\n")
    if plot is not None:
        _draw(results, plot)


def _lines(questions: Path) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(questions.read_text().splitlines(), 1):
        if line.strip():
            yield number, line


def _runs(
    request: pb.StartEvaluationRequest,
    modes: Sequence[str],
    rerankers: Sequence[str],
    answer: bool,
    model: str,
) -> None:
    from google.protobuf import json_format

    wrong = [m for m in modes if m not in MODES]
    if wrong:
        raise typer.BadParameter(f"{wrong[0]!r}; allowed are {', '.join(MODES)}")
    for mode in modes:
        for reranker in [None, *rerankers]:
            run = request.runs.add(name=mode if reranker is None else f"{mode} + {reranker}")
            run.answer, run.model = answer, model
            extra = {} if reranker is None else {"rerank": {"model": reranker}}
            json_format.ParseDict({"mode": MODES[mode], **extra}, run.retrieval)


def _wait(
    stub: KnowledgeServiceStub, metadata: Any, request: pb.StartEvaluationRequest
) -> pb.Evaluation:
    """Run the evaluation to its end. Ctrl-C leaves it running."""
    from forebay.v1 import knowledge_pb2 as pb
    from rich.progress import Progress

    job = stub.StartEvaluation(request, metadata=metadata).evaluation
    asked = pb.GetEvaluationRequest(knowledge_base=request.knowledge_base, evaluation=job.id)
    with Progress(transient=True) as progress:
        task = progress.add_task(f"evaluation {job.id}", total=1.0)
        while job.status == pb.EVALUATION_STATUS_RUNNING:
            time.sleep(0.2)
            job = stub.GetEvaluation(asked, metadata=metadata).evaluation
            progress.update(task, completed=job.progress)
    if job.status == pb.EVALUATION_STATUS_FAILED:
        typer.secho(f"forebay: the evaluation failed: {job.message}", fg="red", err=True)
        raise typer.Exit(1)
    return job


def _of_message(result: pb.EvaluationResult) -> dict[str, Any]:
    metrics = [
        {k: getattr(m, k) for k in ("name", "value", "low", "high", "n", "failures")}
        for m in result.metrics
    ]
    return {"name": result.name, "seconds": result.seconds, "metrics": metrics}


def _kept(stub: KnowledgeServiceStub, metadata: Any, base: str) -> None:
    from forebay.v1 import knowledge_pb2 as pb

    found = stub.ListEvaluations(pb.ListEvaluationsRequest(knowledge_base=base), metadata=metadata)
    for job in reversed(found.evaluations):
        state = pb.EvaluationStatus.Name(job.status).removeprefix("EVALUATION_STATUS_").lower()
        when = job.created_at.ToDatetime().isoformat(" ", "minutes")
        typer.echo(f"{job.id}  {when}  {state}  {job.items} questions  {job.name}")
        if job.results:
            _table([_of_message(r) for r in job.results])


def _table(results: Sequence[dict[str, Any]]) -> None:
    """A row a figure, a column a configuration."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", *(r["name"] for r in results))
    names = dict.fromkeys(m["name"] for r in results for m in r["metrics"])
    for name in names:
        cells = []
        for result in results:
            m = next((m for m in result["metrics"] if m["name"] == name), None)
            if m is None or not m["n"]:
                cells.append(f"none of {m['failures']}" if m and m["failures"] else "")
                continue
            failed = f", {m['failures']} failed" if m["failures"] else ""
            cells.append(f"{m['value']:.3f} ({m['low']:.3f}-{m['high']:.3f}; n {m['n']}{failed})")
        table.add_row(name, *cells)
    table.add_row("seconds", *(f"{r['seconds']:.1f}" for r in results))
    Console(width=max(80, 34 * (len(results) + 1))).print(table)


def _draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Dots with their intervals, a row a figure."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise typer.BadParameter("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(m["name"] for r in results for m in r["metrics"]))
    figure, axes = plt.subplots(figsize=(8, 1 + 0.5 * len(names)), layout="constrained")
    for i, result in enumerate(results):
        shift = 0.5 * (i / max(1, len(results) - 1) - 0.5) if len(results) > 1 else 0.0
        found = {m["name"]: m for m in result["metrics"] if m["n"]}
        rows = [(names.index(n) + shift, m) for n, m in found.items()]
        axes.errorbar(
            [m["value"] for _, m in rows],
            [y for y, _ in rows],
            xerr=[
                [max(0.0, m["value"] - m["low"]) for _, m in rows],
                [max(0.0, m["high"] - m["value"]) for _, m in rows],
            ],
            fmt="o",
            label=result["name"],
        )
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(-0.02, 1.02)
    axes.grid(axis="x", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
