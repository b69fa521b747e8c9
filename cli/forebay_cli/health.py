"""`forebay health`: whether this machine's server is ready, asked as its own settings have it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer
from forebay.settings import Settings

from forebay_cli.settings import fail, settings_of


def health(
    config: Annotated[
        Path | None, typer.Option("--config", help="YAML file with settings.")
    ] = None,
    grpc: Annotated[
        bool,
        typer.Option("--grpc", help="Ask the gRPC port; so it is where http.enabled is false."),
    ] = False,
) -> None:
    """Exit with status 0 when the server is ready, with 1 when not: for health checks of containers."""
    settings = settings_of(config).settings
    if grpc or not settings.http.enabled:
        _ask_grpc(config)
    else:
        _ask_http(settings)
    typer.echo("ready")


def _ask_grpc(config: Path | None) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from forebay_cli.client import channel

    with channel(config) as (open_channel, metadata):
        stub = cast(Any, health_pb2_grpc.HealthStub(open_channel))
        answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=5, metadata=metadata)
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        _not_ready("the gRPC server says NOT_SERVING")


def _ask_http(settings: Settings) -> None:
    """GET /readyz. Whose the server's certificate is does not matter: nothing is told."""
    import http.client
    import ssl

    http_settings, client = settings.http, settings.client
    host, port = http_settings.host.strip("[]"), http_settings.port
    if http_settings.secure:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        if client.tls_certificate is not None:
            try:
                context.load_cert_chain(client.tls_certificate, client.tls_key)
            except OSError as e:  # ssl.SSLError is one
                fail(f"client.tls_certificate and client.tls_key cannot be used: {e}")
        asked: http.client.HTTPConnection = http.client.HTTPSConnection(
            host, port, timeout=5, context=context
        )
    else:
        asked = http.client.HTTPConnection(host, port, timeout=5)
    try:
        asked.request("GET", "/readyz")
        answer = asked.getresponse()
        if answer.status != 200:
            _not_ready(f"{answer.status}: {answer.read(1000).decode(errors='replace').strip()}")
    except (OSError, http.client.HTTPException) as e:
        _not_ready(f"{host}:{port} does not answer: {e}")
    finally:
        asked.close()


def _not_ready(why: str) -> None:
    typer.secho(f"forebay: not ready: {why}", fg="red", err=True)
    raise typer.Exit(1)
