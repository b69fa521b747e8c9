"""Settings for commands: what is wrong with them is one line and exit status 2, no traceback."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import typer
from forebay.settings import Loaded, Settings, SettingsError, load_settings


def fail(message: str) -> NoReturn:
    """Say why, and exit with status 2."""
    typer.secho(f"forebay: {message}", fg="red", err=True)
    raise typer.Exit(2)


def settings_of(config: Path | None = None, *, serves: bool = False, **flags: Any) -> Loaded:
    """Settings from all sources; exits with the line that names a wrong one.

    Args:
        serves: the command listens: settings that would let strangers in are wrong too.
        flags: names with `__` for dots.
    """
    named = {k.replace("__", "."): v for k, v in flags.items()}
    try:
        loaded = load_settings(named, config)
        if serves:
            loaded.settings.check_exposure()
        return loaded
    except SettingsError as e:
        fail(str(e))


def has_fast_lane(settings: Settings) -> bool:
    """Whether the server's port is the extension's."""
    return settings.grpc.lane != "ordinary" and find_spec("forebay_native") is not None
