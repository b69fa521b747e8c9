"""`forebay bench`: measurements on this machine. Most of them live in a checkout's `benchmarks/`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import typer

app = typer.Typer(no_args_is_help=True)

#: Subcommands that are modules of benchmarks/: they read their own arguments.
MODULES = {
    "peers": ("benchmarks.peers.run", "Forebay and its peers side by side, in one run."),
    "layers": ("benchmarks.embedding_overhead", "What each layer costs on an embedding call."),
    "gpu": ("benchmarks.gpu", "Texts a second on a GPU, beside the bare loop."),
}
_REST = {"allow_extra_args": True, "ignore_unknown_options": True}


def checkout() -> Path:
    """The checkout that holds benchmarks/; exits with a message where this is an installed wheel."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "benchmarks" / "peers").is_dir():
        typer.secho("forebay: this benchmark needs a checkout of the sources", fg="red", err=True)
        raise typer.Exit(2)
    return root


def _register(name: str, module: str, text: str) -> None:
    @app.command(name, help=text, context_settings=_REST, add_help_option=False)
    def command(context: typer.Context) -> None:
        os.chdir(checkout())
        # In this process's place, so that a signal reaches the measurement itself.
        os.execv(sys.executable, [sys.executable, "-m", module, *context.args])  # noqa: S606 - no shell


for _name, (_module, _text) in MODULES.items():
    _register(_name, _module, _text)
