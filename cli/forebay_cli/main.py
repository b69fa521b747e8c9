"""The `forebay` command. Each subcommand imports its part only when it runs."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
from forebay.settings import SettingsError

from forebay_cli.settings import fail, settings_of

# gRPC's fork handlers are for forks that go on in Python; ours start a program at once. gRPC looks
# at it when it is imported.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Config = Annotated[Path | None, typer.Option("--config", help="YAML file with settings.")]
Home = Annotated[Path | None, typer.Option("--home", help="Folder of all state.")]
GrpcPort = Annotated[int | None, typer.Option("--grpc-port", help="0 = any free port.")]
HttpPort = Annotated[int | None, typer.Option("--http-port", help="0 = any free port.")]
Supervised = Annotated[bool, typer.Option("--supervised", hidden=True)]


def _version(asked: bool) -> None:
    if asked:
        import forebay

        typer.echo(f"forebay {forebay.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Self-hosted inference: one typed gRPC contract for every AI capability."""


@app.command()
def up(
    config: Config = None, home: Home = None, grpc_port: GrpcPort = None, http_port: HttpPort = None
) -> None:
    """Make the starter models on first start, then serve gRPC and HTTP. Ctrl-C drains."""
    from forebay_cli.up import run

    flags = {"home": home, "grpc__port": grpc_port, "http__port": http_port}
    run(settings_of(config, serves=True, **flags), config)


@app.command()
def serve(
    config: Config = None,
    home: Home = None,
    grpc_port: GrpcPort = None,
    supervised: Supervised = False,
) -> None:
    """Serve gRPC."""
    from forebay_cli import huge_pages
    from forebay_cli.serve import run
    from forebay_cli.up import must_be_free

    huge_pages.ensure()

    settings = settings_of(config, serves=True, home=home, grpc__port=grpc_port).settings
    must_be_free(settings.grpc.host, settings.grpc.port, "--grpc-port")
    if settings.http.gateway:
        must_be_free(settings.http.host, settings.http.port, "FOREBAY_HTTP_PORT")
    metrics = settings.observability.metrics_port
    must_be_free("127.0.0.1", metrics, "FOREBAY_OBSERVABILITY__METRICS_PORT")
    sys.exit(run(settings, supervised))


@app.command()
def gateway(
    config: Config = None,
    http_port: HttpPort = None,
    upstream: Annotated[str | None, typer.Option(help="gRPC target, host:port.")] = None,
    worker: Annotated[bool, typer.Option("--worker", hidden=True)] = False,
    supervised: Supervised = False,
) -> None:
    """Serve HTTP: REST, Open Inference Protocol, OpenAI-compatible routes."""
    loaded = settings_of(config, serves=True, http__port=http_port, http__upstream=upstream)
    settings = loaded.settings
    if settings.http.workers > 1 and not worker:
        from forebay_cli.up import run_gateway

        run_gateway(settings, config)
    if not worker and not settings.http.gateway:  # a worker shares its port
        from forebay_cli.up import must_be_free

        must_be_free(settings.http.host, settings.http.port, "--http-port")
    if supervised:
        from forebay_cli.supervised import listen

        # It has no health of its own: /readyz passes on the server's.
        listen(lambda: None, lambda: os.kill(os.getpid(), signal.SIGTERM))
    if worker:
        from forebay_cli.up import metrics_folder

        # Before the library is imported: it looks once.
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(metrics_folder(settings, settings.http.port))
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as `nohup` has it
        # Its server knows SIGTERM and SIGINT alone.
        signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
    from forebay_gateway.serve import run

    try:
        run(settings, worker)
    except SettingsError as e:
        fail(str(e))


@app.command("config")
def show_config(config: Config = None) -> None:
    """Print the settings in force and where each value came from."""
    for name, value, source in settings_of(config, serves=True).explain():
        typer.echo(f"{name:38} {value:40} {source}")


def _register() -> None:
    from forebay_cli import bench, evaluate, export, health, keys, models, plan, tune

    bench.app.command("tune")(tune.tune)

    app.add_typer(keys.app, name="keys", help="Make, list and revoke API keys.")
    app.add_typer(models.app, name="models", help="The registry of a running server.")
    app.add_typer(bench.app, name="bench", help="Measurements on this machine.")
    app.add_typer(export.app, name="export", help="From trained models to served artefacts.")
    app.command("health")(health.health)
    app.command("pull")(export.pull)
    app.command("eval")(evaluate.evaluate)
    app.command("plan")(plan.plan)


_register()
