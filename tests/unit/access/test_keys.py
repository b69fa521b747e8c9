"""API keys: what is stored, who is let in, and changes by several processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from forebay.errors import NotFound, PermissionDenied, Unauthenticated
from forebay_cli.main import app
from forebay_server.access import keys
from forebay_server.access.keys import KeyStore, Limits, require_scope
from forebay_server.storage.database import Database
from typer.testing import CliRunner

from .conftest import Clock


async def until(condition: Callable[[], bool]) -> None:
    """Let other tasks run until it holds."""
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0)


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)  # whose files are read here
async def test_a_key_is_let_in_and_its_secret_is_stored_nowhere(
    database: Database, clock: Clock, tmp_path: Path
) -> None:
    store = KeyStore(database, True, clock)
    key, secret = await store.create("shop", ("infer", "read"), ("a,b", "c"), Limits(2.5, 5))
    assert secret.startswith(f"fbk_{key.id}_")
    principal = store.authenticate(f"Bearer {secret}")
    assert principal is not None
    assert (principal.key_id, principal.scopes) == (key.id, {"infer", "read"})
    assert principal.may_use("a,b")
    assert not principal.may_use("a")
    stored = b"".join(p.read_bytes() for p in tmp_path.iterdir() if p.is_file())
    assert key.id.encode() in stored
    assert secret.removeprefix(f"fbk_{key.id}_").encode() not in stored


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Bearer",
        "Bearer x",
        "Basic {good}",
        "{good}",
        "Bearer {good}x",
        "Bearer fbk_{id}_",
        "Bearer fbk__",
    ],
)
async def test_everybody_else_is_refused(database: Database, clock: Clock, header: str) -> None:
    store = KeyStore(database, True, clock)
    key, secret = await store.create("shop", ("infer",))
    with pytest.raises(Unauthenticated) as e:
        store.authenticate(header.format(good=secret, id=key.id))
    assert secret not in e.value.message


async def test_several_spaces_may_stand_before_the_key(database: Database, clock: Clock) -> None:
    store = KeyStore(database, True, clock)
    key, secret = await store.create("shop", ("infer",))
    principal = store.authenticate(f"Bearer   {secret}")
    assert principal is not None and principal.key_id == key.id


async def test_where_no_key_is_needed_a_wrong_one_is_refused_all_the_same(
    database: Database,
) -> None:
    store = KeyStore(database, False)
    assert store.authenticate("") is None
    assert store.authenticate("Bearer sk-anything") is None
    with pytest.raises(Unauthenticated):
        store.authenticate("Bearer fbk_0000_x")


async def test_expired_and_revoked_keys_are_refused_at_once(
    database: Database, clock: Clock
) -> None:
    store = KeyStore(database, True, clock)
    expiring, secret = await store.create("a", ("infer",), expires_at=clock.now + 10)
    assert store.authenticate(f"Bearer {secret}")
    clock.now += 10
    with pytest.raises(Unauthenticated, match="expired"):
        store.authenticate(f"Bearer {secret}")
    key, secret = await store.create("b", ("infer",))
    revoked = await store.revoke(key.id)
    with pytest.raises(Unauthenticated, match="revoked"):
        store.authenticate(f"Bearer {secret}")
    clock.now += 5
    assert (await store.revoke(key.id)).revoked_at == revoked.revoked_at
    assert store.list(include_inactive=False) == []
    assert [k.id for k in store.list(include_inactive=True)] == [key.id, expiring.id]


async def test_changes_of_another_process_are_seen(url: str, database: Database) -> None:
    mine, other_database = KeyStore(database, True), await Database.open(url)
    other = KeyStore(other_database, True)
    key, secret = await other.create("a", ("infer",))
    with pytest.raises(Unauthenticated):
        mine.authenticate(f"Bearer {secret}")
    refresh = asyncio.create_task(mine.keep_fresh(0.0))
    await until(lambda: mine.limits(key.id) is not None)
    assert mine.authenticate(f"Bearer {secret}")
    await other.revoke(key.id)
    await until(lambda: not mine.list(include_inactive=False))
    refresh.cancel()
    async with asyncio.timeout(10):
        with contextlib.suppress(asyncio.CancelledError):
            await refresh
    await other_database.close()


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
async def test_a_connection_that_hangs_keeps_no_revoked_key_in_force(
    url: str, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "RELOAD_S", 1.0)
    mine, other_database = KeyStore(database, True), await Database.open(url)
    other = KeyStore(other_database, True)
    key, _ = await other.create("a", ("infer",))
    await mine.reload()
    async with database.read() as db:
        backend = (await db.exec_driver_sql("SELECT pg_backend_pid()")).scalar_one()
    os.kill(backend, signal.SIGSTOP)
    try:
        refresh = asyncio.create_task(mine.keep_fresh(0.0))
        await other.revoke(key.id)
        await until(lambda: not mine.list(include_inactive=False))
    finally:
        os.kill(backend, signal.SIGCONT)
    refresh.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await refresh
    await other_database.close()


async def test_limits_set_from_a_stale_copy_do_not_bring_a_revoked_key_back(
    url: str, database: Database
) -> None:
    mine, other_database = KeyStore(database, True), await Database.open(url)
    other = KeyStore(other_database, True)
    key, secret = await mine.create("a", ("infer",))
    await other.reload()
    await mine.revoke(key.id)
    changed = await other.set_limits(key.id, Limits(max_concurrency=3))
    assert changed.revoked_at is not None
    assert changed.limits == Limits(max_concurrency=3)
    with pytest.raises(Unauthenticated):
        other.authenticate(f"Bearer {secret}")
    await other_database.close()


async def test_unknown_keys_are_not_found(database: Database) -> None:
    store = KeyStore(database, True)
    for change in (store.revoke("nobody"), store.set_limits("nobody", Limits())):
        with pytest.raises(NotFound):
            await change


async def test_a_scope_holds_no_other(database: Database) -> None:
    store = KeyStore(database, True)
    _, secret = await store.create("a", ("admin",))
    principal = store.authenticate(f"Bearer {secret}")
    assert principal
    require_scope(principal, "admin")
    require_scope(principal, "public")
    with pytest.raises(PermissionDenied):
        require_scope(principal, "infer")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a", "--rps", "0"], "limits.requests_per_second: is 0"),
        (["a", "--rps", "nan"], "limits.requests_per_second: is nan"),
        (["a", "--tokens-per-minute", "0"], "limits.tokens_per_minute: is 0"),
        (["a", "--max-concurrency", "0"], "limits.max_concurrency: is 0"),
        (["a", "--tokens-per-minute", str(2**63)], "out of range"),
        (["", "--rps", "1"], "name: is required"),
    ],
)
def test_the_command_makes_no_key_that_the_contract_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    """A limit of 0 divided by zero at each of the key's calls, and failed others that came with them."""
    monkeypatch.setenv("FOREBAY_HOME", str(tmp_path))
    run = CliRunner().invoke(app, ["keys", "create", *arguments])
    assert run.exit_code == 2, run.output
    assert said in run.output
    assert not (tmp_path / "forebay.db").exists()
