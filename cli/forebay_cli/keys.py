"""`forebay keys`: made in the database itself, so that the first key needs no key."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from forebay.settings import SettingsError

from forebay_cli.settings import fail, settings_of

app = typer.Typer(no_args_is_help=True)
Config = Annotated[Path | None, typer.Option("--config", help="YAML file with settings.")]


def _with_store(config: Path | None, work: Callable[[Any], Awaitable[Any]]) -> Any:
    from forebay.errors import Unavailable
    from forebay_server.access.keys import KeyStore
    from forebay_server.storage.database import Database, SchemaError

    settings = settings_of(config).settings
    try:
        settings.home.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as e:
        fail(f"home is {str(settings.home)!r}, which is no folder that can be used: {e.strerror}")

    async def run() -> Any:
        database = await Database.open(settings.database_url)
        try:
            store = KeyStore(database, required=True)
            await store.reload()
            return await work(store)
        finally:
            await database.close()

    try:
        return asyncio.run(run())
    except (OSError, SettingsError, SchemaError, Unavailable) as e:
        fail(str(e))


@app.command()
def create(
    name: str,
    scope: Annotated[
        list[str] | None, typer.Option(help="infer, read, admin; default: infer and read.")
    ] = None,
    rps: Annotated[float | None, typer.Option(help="Calls per second.")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option()] = None,
    max_concurrency: Annotated[int | None, typer.Option()] = None,
    config: Config = None,
) -> None:
    """Make a key. Its secret is printed once and stored nowhere."""
    from forebay_server.access.keys import SCOPES

    scopes = tuple(dict.fromkeys(scope or ("infer", "read")))
    wrong = [s for s in scopes if s not in SCOPES]
    if wrong:
        raise typer.BadParameter(f"{wrong[0]!r}; allowed are {', '.join(SCOPES)}")
    limits = _checked(
        name,
        requests_per_second=rps,
        tokens_per_minute=tokens_per_minute,
        max_concurrency=max_concurrency,
    )
    _, secret = _with_store(config, lambda s: s.create(name, scopes, limits=limits))
    typer.echo(secret)


def _checked(name: str, **limits: float | None) -> Any:
    """The limits, held to the contract's bounds as KeyService holds its callers to them."""
    from forebay.constraints import Validator
    from forebay.errors import InvalidArgument
    from forebay.v1 import key_pb2 as pb
    from forebay_server.access.keys import Limits

    try:
        request = pb.CreateKeyRequest(name=name, limits=pb.KeyLimits(**limits))  # type: ignore[arg-type]
        Validator().check(request)
    except (
        InvalidArgument,
        ValueError,
    ) as e:  # ValueError: more than 64 bits, text that is no text
        raise typer.BadParameter(str(e)) from None
    return Limits(**limits)  # type: ignore[arg-type]


@app.command("list")
def list_keys(config: Config = None) -> None:
    """List keys, without secrets."""

    async def work(store: Any) -> Any:
        return store.list(include_inactive=True)

    for key in _with_store(config, work):
        state = "revoked" if key.revoked_at else "active"
        typer.echo(f"{key.id}  {state:8} {','.join(key.scopes):18} {key.name}")


@app.command()
def revoke(key_id: str, config: Config = None) -> None:
    """Revoke a key, at once and for good."""
    from forebay.errors import ForebayError

    try:
        _with_store(config, lambda s: s.revoke(key_id))
    except ForebayError as e:
        raise typer.BadParameter(e.message) from None
    typer.echo(f"{key_id} is revoked; running servers see it within seconds")
