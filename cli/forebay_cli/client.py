"""A channel to the running server, for commands."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import typer
from forebay.channels import credentials, options
from forebay.settings import Settings, SettingsError

from forebay_cli.settings import fail, settings_of


@contextmanager
def channel(config: Path | None = None) -> Iterator[tuple[grpc.Channel, list[tuple[str, str]]]]:
    """The server's channel and the metadata of calls; errors become one line.

    The key is taken from FOREBAY_KEY.
    """
    settings = settings_of(config).settings
    key = os.environ.get("FOREBAY_KEY", "")
    if not (key.isascii() and key.isprintable()):
        fail("FOREBAY_KEY is no key: a key is one line of ASCII characters")
    metadata = [("authorization", f"Bearer {key}")] if key else []
    target = settings.grpc.address
    try:
        with _open(settings, target) as open_channel:
            yield open_channel, metadata
    except grpc.RpcError as e:
        code, text = e.code(), e.details()
        if code is grpc.StatusCode.UNAVAILABLE and not e.trailing_metadata():
            text = f"{text}. Does the server run there? FOREBAY_GRPC__HOST and FOREBAY_GRPC__PORT say where"
        typer.secho(f"forebay: {target}: {code.name}: {text}", fg="red", err=True)
        raise typer.Exit(1) from None


def _open(settings: Settings, target: str) -> grpc.Channel:
    # A certificate in the same settings is that of the server which is called.
    secure = settings.client.secure or settings.grpc.secure
    if not secure or target.startswith("unix:"):
        return grpc.insecure_channel(target)
    try:
        given = credentials(settings.client)
    except SettingsError as e:
        fail(str(e))
    return grpc.secure_channel(target, given, options(settings.client))
