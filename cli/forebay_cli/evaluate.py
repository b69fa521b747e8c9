"""`forebay eval`: how well a knowledge base's retrieval finds what is relevant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from forebay_cli.client import channel

MODES = {
    "dense": "SEARCH_MODE_DENSE",
    "keyword": "SEARCH_MODE_KEYWORD",
    "hybrid": "SEARCH_MODE_HYBRID",
}


def evaluate(
    knowledge_base: str,
    questions: Annotated[
        Path,
        typer.Argument(
            help='NDJSON, a line each: {"query": ..., "relevant_documents": [...]} or '
            '{"query": ..., "relevant_texts": [...]}.'
        ),
    ],
    mode: Annotated[
        list[str] | None, typer.Option(help="dense, keyword, hybrid; default: all three.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Write the figures as JSON too.")] = None,
) -> None:
    """Compare ways to search a knowledge base: recall, MRR and nDCG with 95% intervals."""
    from forebay.v1 import knowledge_pb2 as pb
    from forebay.v1 import knowledge_pb2_grpc
    from google.protobuf import json_format
    from rich.console import Console
    from rich.table import Table

    chosen = mode or list(MODES)
    wrong = [m for m in chosen if m not in MODES]
    if wrong:
        raise typer.BadParameter(f"{wrong[0]!r}; allowed are {', '.join(MODES)}")
    request = pb.EvaluateRequest(knowledge_base=knowledge_base)
    for number, line in enumerate(questions.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            json_format.ParseDict(json.loads(line), request.items.add())
        except (json.JSONDecodeError, json_format.ParseError) as e:
            raise typer.BadParameter(f"{questions}:{number}: {e}") from None
    for name in chosen:
        run = request.runs.add(name=name)
        json_format.ParseDict({"mode": MODES[name]}, run.retrieval)
    with channel() as (open_channel, metadata):
        stub = knowledge_pb2_grpc.KnowledgeServiceStub(open_channel)
        answer = stub.Evaluate(request, metadata=metadata)
    table = Table("search", *(m.name for m in answer.results[0].metrics), "n", "failures", "s")
    for result in answer.results:
        cells = [f"{m.value:.3f} ({m.low:.3f}-{m.high:.3f})" for m in result.metrics]
        first = result.metrics[0]
        table.add_row(
            result.name, *cells, str(first.n), str(first.failures), f"{result.seconds:.1f}"
        )
    Console(width=160).print(table)
    if output is not None:
        text = json_format.MessageToJson(answer, preserving_proto_field_name=True)
        output.write_text(text + "\n")
