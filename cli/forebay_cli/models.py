"""`forebay models`: the registry of a running server."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from forebay_cli.client import channel

app = typer.Typer(no_args_is_help=True)
#: The contract's versions have 64 bits.
NEWEST = 2**63 - 1
Version = Annotated[
    int | None,
    typer.Option("--version", min=1, max=NEWEST, help="Unset = what the policy says."),
]


def _call(method: str, kind: Any, **fields: Any) -> Any:
    from forebay.v1 import model_pb2_grpc

    try:
        request = kind(**fields)
    except ValueError as e:  # text that is no text
        raise typer.BadParameter(str(e)) from None
    with channel() as (open_channel, metadata):
        stub = model_pb2_grpc.ModelServiceStub(open_channel)
        return getattr(stub, method)(request, metadata=metadata, timeout=300)


@app.command("list")
def list_models() -> None:
    """List models, versions and states."""
    from forebay.v1 import model_pb2 as pb

    for model in _call("ListModels", pb.ListModelsRequest, page_size=1000).models:
        for version in model.versions:
            state = pb.ModelState.Name(version.state).removeprefix("MODEL_STATE_").lower()
            size = f"{version.memory_bytes / 1e6:.0f} MB" if version.memory_bytes else ""
            task = pb.Task.Name(model.task).removeprefix("TASK_").lower()
            typer.echo(
                f"{model.name}@{version.version:<4} {task:24} {state:10} {size:8} {version.reason}"
            )


@app.command()
def load(model: str, version: Version = None) -> None:
    """Load a model."""
    from forebay.v1 import model_pb2 as pb

    _call("LoadModel", pb.LoadModelRequest, model=model, version=version)
    typer.echo(f"{model} is loaded")


@app.command()
def unload(model: str, version: Version = None) -> None:
    """Unload a model."""
    from forebay.v1 import model_pb2 as pb

    answer = _call("UnloadModel", pb.UnloadModelRequest, model=model, version=version)
    before, after = answer.memory_before_bytes / 1e6, answer.memory_after_bytes / 1e6
    typer.echo(f"{model} is unloaded; resident memory was {before:.0f} MB and is {after:.0f} MB")


@app.command()
def promote(model: str, version: Annotated[int, typer.Argument(min=1, max=NEWEST)]) -> None:
    """Make a version the production one."""
    from forebay.v1 import model_pb2 as pb

    _call("Promote", pb.PromoteRequest, model=model, version=version)
    typer.echo(f"{model}@{version} is production")


@app.command()
def rollback(model: str) -> None:
    """Back to the production version before."""
    from forebay.v1 import model_pb2 as pb

    answer = _call("Rollback", pb.RollbackRequest, model=model)
    typer.echo(f"{model}@{answer.model.aliases['production']} is production")
