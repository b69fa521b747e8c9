"""`forebay export` and `forebay pull`: from trained models to served artefacts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from forebay_cli.settings import settings_of

app = typer.Typer(no_args_is_help=True)
Root = Annotated[
    Path | None, typer.Option("--models", help="Repository folder; default: the home's.")
]


def _root(given: Path | None) -> Path:
    return given or settings_of().settings.models_root


@app.command()
def sklearn(
    source: Annotated[Path, typer.Argument(help="A .skops file, or with --joblib a .joblib file.")],
    data: Annotated[Path, typer.Option(help="CSV with real rows, best held-out: parity.")],
    name: Annotated[str, typer.Option()],
    target: Annotated[str | None, typer.Option(help="Column of the CSV with true values.")] = None,
    training: Annotated[
        Path | None,
        typer.Option(help="CSV with the rows it was fitted on: ranges and categories are theirs."),
    ] = None,
    version: Annotated[int, typer.Option()] = 1,
    models: Root = None,
    trust: Annotated[list[str], typer.Option(help="Types of the skops file to trust.")] = [],  # noqa: B006 - never changed
    joblib: Annotated[
        bool, typer.Option("--joblib", help="Read a joblib file in a sandboxed process.")
    ] = False,
) -> None:
    """Export a fitted scikit-learn estimator or pipeline."""
    from forebay_exporters.artefact import ExportError
    from forebay_exporters.sklearn_export import export_sklearn, load_skops, read_table

    try:
        table = read_table(data, [target] if target else [])
        truth = table.pop(target) if target else None
        columns = list(table.columns)
        fitted = read_table(training, columns)[columns] if training else None
        if joblib:
            from forebay_exporters.joblib_sandbox import joblib_to_skops

            source = joblib_to_skops(source)
        elif source.suffix in (".joblib", ".pkl"):
            raise ExportError(
                f"{source.name} is a pickle, which can run any code; say --joblib to read it in a "
                "sandboxed process, or save it by skops.io.dump"
            )
        estimator = load_skops(source, tuple(trust))
        path = export_sklearn(
            estimator,
            table,
            _root(models),
            name,
            version,
            describing=cast(Any, fitted),
            target=truth,
            target_name=target or "target",
        )
    except ExportError as e:
        typer.secho(f"forebay: {e}", fg="red", err=True)
        raise typer.Exit(1) from None
    typer.echo(path)


@app.command()
def huggingface(
    source: Annotated[Path, typer.Argument(help="A Hugging Face model folder with safetensors.")],
    name: Annotated[str, typer.Option()],
    precision: Annotated[str, typer.Option(help="fp32, fp16, int8 or int8-static.")] = "fp32",
    version: Annotated[int, typer.Option()] = 1,
    models: Root = None,
    calibration: Annotated[Path | None, typer.Option(help="Text file, one text a line.")] = None,
    tuned: Annotated[
        bool, typer.Option("--tune", help="Then `forebay export tune` with its defaults.")
    ] = False,
) -> None:
    """Export an encoder: embedding, classification, pairs, zero-shot. Needs the extra `export`."""
    from forebay_exporters.artefact import ExportError

    try:
        from forebay_exporters.huggingface import export_huggingface

        texts = calibration.read_text().splitlines() if calibration else None
        path = export_huggingface(source, _root(models), name, version, precision, texts)
    except (ExportError, ImportError) as e:
        typer.secho(f"forebay: {e}", fg="red", err=True)
        raise typer.Exit(1) from None
    typer.echo(path)
    if tuned:
        tune(name, version, models)


@app.command()
def tune(
    name: Annotated[str, typer.Argument(help="An encoder of the repository.")],
    version: Annotated[int | None, typer.Option(help="Default: the newest.")] = None,
    models: Root = None,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    seconds: Annotated[float, typer.Option(min=0.05, help="Each measurement's length.")] = 0.5,
    texts: Annotated[
        Path | None, typer.Option(help="Text file, one text a line: cosines are measured on them.")
    ] = None,
    scifact: Annotated[
        Path | None,
        typer.Option(help="Folder with SciFact: a loss of over 1% of nDCG@10 is not taken."),
    ] = None,
) -> None:
    """Measure engines, precisions, threads and length buckets on this machine for an encoder, and
    write the quickest that keeps quality into its model.yaml. Takes a minute or two; with SciFact
    some more."""
    from forebay_exporters import tune as tuning
    from forebay_exporters.artefact import ExportError
    from forebay_exporters.scifact import read

    try:
        outcome = tuning.tune(
            _root(models),
            name,
            version=version,
            rounds=rounds,
            seconds=seconds,
            texts=[t for t in texts.read_text().splitlines() if t] if texts else tuning.TEXTS,
            judge=read(scifact) if scifact else None,
            progress=lambda text: typer.secho(text, err=True),
        )
    except (ExportError, OSError) as e:
        typer.secho(f"forebay: {e}", fg="red", err=True)
        raise typer.Exit(1) from None
    for group in outcome.groups:
        typer.echo("\n".join([*tuning.table(group), ""]))
    typer.echo(f"{_root(models) / name / 'model.yaml'}: {outcome.best.name}")


@app.command("language-model")
def language_model(
    source: Annotated[Path, typer.Argument(help="A Hugging Face folder with safetensors.")],
    name: Annotated[str, typer.Option()],
    version: Annotated[int, typer.Option()] = 1,
    models: Root = None,
) -> None:
    """Convert a language model for the embedded engine. Needs the extra `openvino-export`."""
    from forebay_exporters.artefact import ExportError
    from forebay_exporters.openvino_export import export_language_model

    try:
        path = export_language_model(source, _root(models), name, version, typer.echo)
    except ExportError as e:
        typer.secho(f"forebay: {e}", fg="red", err=True)
        raise typer.Exit(1) from None
    typer.echo(path)


@app.command("tensorrt-llm")
def tensorrt_llm(
    source: Annotated[Path, typer.Argument(help="A Hugging Face folder with safetensors.")],
    name: Annotated[str, typer.Option()],
    version: Annotated[int, typer.Option()] = 1,
    models: Root = None,
    python: Annotated[
        Path | None, typer.Option(help="Python with tensorrt_llm; default: the setting's.")
    ] = None,
    options: Annotated[
        str, typer.Option(help='JSON, such as {"max_batch_size": 64, "quantization": "FP8"}.')
    ] = "{}",
) -> None:
    """Build a TensorRT-LLM engine for the GPU that is here. Not run yet on one."""
    import json

    from forebay_exporters.artefact import ExportError
    from forebay_exporters.tensorrt_llm_export import export_tensorrt_llm

    chosen = python or settings_of().settings.generation.trtllm_python
    if chosen is None:
        typer.secho("forebay: say --python, or set generation.trtllm_python", fg="red", err=True)
        raise typer.Exit(1)
    try:
        wanted = json.loads(options)
        path = export_tensorrt_llm(source, _root(models), name, version, chosen, wanted, typer.echo)
    except (ExportError, ValueError, OSError) as e:
        typer.secho(f"forebay: {e}", fg="red", err=True)
        raise typer.Exit(1) from None
    typer.echo(path)


def pull(
    repo_id: Annotated[str, typer.Argument(help="A model of the hub, such as org/name.")],
    name: Annotated[str | None, typer.Option(help="Name to serve it by.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    precision: Annotated[
        str, typer.Option(help="fp32, fp16 or int8, where it is exported.")
    ] = "fp32",
    models: Root = None,
) -> None:
    """Fetch a model from the hub, and export it when it has no ONNX file."""
    from forebay_exporters.artefact import ExportError
    from forebay_exporters.pull import pull as pull_model

    try:
        path = pull_model(repo_id, _root(models), name=name, revision=revision, precision=precision)
    except (ExportError, ImportError) as e:
        typer.secho(f"forebay: {e}", fg="red", err=True)
        raise typer.Exit(1) from None
    typer.echo(path)
