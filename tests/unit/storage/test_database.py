"""The database: migrations, transactions, routing state; SQLite files, and PostgreSQL if present."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from forebay.errors import NotFound, Unavailable
from forebay_server.repository.state import HistoryEvent, Routing
from forebay_server.storage import collections as collections_module
from forebay_server.storage import database as database_module
from forebay_server.storage.collections import CollectionStore
from forebay_server.storage.database import MIGRATIONS, Database, SchemaError
from forebay_server.storage.routing_state import StoredRoutingState
from forebay_server.storage.tables import metadata, model_aliases, usage
from sqlalchemy.ext.asyncio import create_async_engine

from tests.conftest import NewDatabase

#: A version that is a time: more than 32 bits.
DATED = 20260131120000


def sqlite_url(folder: Path) -> str:
    return f"sqlite+aiosqlite:///{folder / 'forebay.db'}"


@pytest.fixture(params=["sqlite", "postgresql"])
async def database(
    request: pytest.FixtureRequest, tmp_path: Path
) -> AsyncIterator[tuple[Database, str]]:
    sqlite = request.param == "sqlite"
    url = sqlite_url(tmp_path) if sqlite else request.getfixturevalue("postgres")()
    opened = await Database.open(url)
    yield opened, url
    await opened.close()


async def test_migrations_make_the_tables_of_the_code(database: tuple[Database, str]) -> None:
    def described(inspector: sa.Inspector) -> dict[str, set[str]]:
        return {
            t: {c["name"] for c in inspector.get_columns(t)} for t in inspector.get_table_names()
        }

    async with database[0].read() as db:
        made = await db.run_sync(lambda c: described(sa.inspect(c)))
    made.pop("alembic_version")
    assert made == {t.name: {c.name for c in t.columns} for t in metadata.sorted_tables}


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
async def test_usage_of_an_older_schema_is_kept(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    from alembic import command
    from alembic.config import Config

    url = sqlite_url(tmp_path) if kind == "sqlite" else request.getfixturevalue("postgres")()
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))

    def older(connection: sa.Connection) -> None:
        config.attributes["connection"] = connection
        command.upgrade(config, "0003_knowledge")
        connection.exec_driver_sql(
            "INSERT INTO usage VALUES ('k', 'm', 1, '2026-01-01', 3, 4, 50, 0, 0, 0, 1.5, 0.25)"
        )

    engine = create_async_engine(url)
    async with engine.begin() as connection:
        await connection.run_sync(older)
    await engine.dispose()
    database = await Database.open(url)
    async with database.read() as db:
        (row,) = (await db.execute(sa.select(usage))).all()
    assert (row.key_id, row.user, row.calls, row.tokens, row.cost) == ("k", "", 3, 50, 0.25)
    await database.close()


async def test_a_commit_is_as_durable_as_sqlite_can_make_it(tmp_path: Path) -> None:
    database = await Database.open(sqlite_url(tmp_path))
    async with database.read() as db:
        assert (await db.exec_driver_sql("PRAGMA journal_mode")).scalar() == "wal"
        assert (await db.exec_driver_sql("PRAGMA synchronous")).scalar() == 2  # FULL
    await database.close()


async def test_nobody_else_may_read_its_files(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    database = await Database.open(sqlite_url(tmp_path))
    async with database.begin() as db:
        await db.execute(model_aliases.insert().values(model="m", alias="a", version=1))
    modes = {p.name: p.stat().st_mode & 0o777 for p in tmp_path.iterdir()}
    assert set(modes.values()) == {0o600} and "forebay.db-wal" in modes
    await database.close()


async def test_servers_that_start_at_once_migrate_once(tmp_path: Path) -> None:
    databases = await asyncio.gather(*(Database.open(sqlite_url(tmp_path)) for _ in range(6)))
    for database in databases:
        await database.close()


async def test_a_migration_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a kill in its middle: the next start must find an empty database, or a whole one."""
    from alembic import op

    make = op.create_table

    def break_down(name: str, *args: object, **kwargs: object) -> object:
        if name == "model_history":
            raise KeyboardInterrupt
        return make(name, *args, **kwargs)

    monkeypatch.setattr(op, "create_table", break_down)
    with pytest.raises(KeyboardInterrupt):
        await Database.open(sqlite_url(tmp_path))
    monkeypatch.undo()
    await (await Database.open(sqlite_url(tmp_path))).close()


async def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    database = await Database.open(sqlite_url(tmp_path))
    async with database.begin() as db:
        await db.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    await database.close()
    with pytest.raises(SchemaError, match="newer"):
        await Database.open(sqlite_url(tmp_path))


async def test_a_failed_transaction_writes_nothing(database: tuple[Database, str]) -> None:
    with pytest.raises(ValueError, match="midway"):
        async with database[0].begin() as db:
            await db.execute(model_aliases.insert().values(model="m", alias="a", version=1))
            raise ValueError("midway")
    async with database[0].read() as db:
        assert (await db.execute(sa.select(model_aliases))).all() == []


async def test_a_broken_database_is_unavailable(tmp_path: Path) -> None:
    database = await Database.open(sqlite_url(tmp_path))
    with pytest.raises(Unavailable) as e:
        async with database.read() as db:
            await db.exec_driver_sql("SELECT * FROM no_such_table")
    assert e.value.reason == "STORAGE_AWAY"
    assert "no_such_table" not in e.value.message
    await database.close()


@pytest.fixture
async def shared(postgres: NewDatabase) -> AsyncIterator[tuple[Database, str]]:
    """A database in PostgreSQL."""
    url = postgres()
    opened = await Database.open(url)
    yield opened, url
    await opened.close()


async def _terminate(url: str) -> None:
    """End all connections but the one that says so, as a restart does."""
    operator = await Database.open(url)
    async with operator.begin() as db:
        await db.exec_driver_sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE pid <> pg_backend_pid() AND datname = current_database()"
        )
    await operator.close()


async def test_connections_that_a_restart_closed_are_replaced(shared: tuple[Database, str]) -> None:
    async with shared[0].read() as db:
        await db.exec_driver_sql("SELECT 1")
    await _terminate(shared[1])
    async with shared[0].begin() as db:
        assert (await db.exec_driver_sql("SELECT 2")).scalar() == 2


async def test_a_connection_that_is_lost_midway_is_unavailable(
    shared: tuple[Database, str],
) -> None:
    with pytest.raises(Unavailable):
        async with shared[0].begin() as db:
            await db.exec_driver_sql("SELECT 1")
            await _terminate(shared[1])
            await db.exec_driver_sql("SELECT 2")


@pytest.mark.parametrize("hangs", ["statement", "connection"])
async def test_a_statement_without_end_is_unavailable(
    hangs: str, postgres: NewDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "STATEMENT_S", 0.5)
    database = await Database.open(postgres())
    stopped = None
    try:
        with pytest.raises(Unavailable) as caught:
            async with asyncio.timeout(20), database.begin() as db:
                if hangs == "connection":  # nobody answers, not even that it was cancelled
                    stopped = (await db.exec_driver_sql("SELECT pg_backend_pid()")).scalar_one()
                    os.kill(stopped, signal.SIGSTOP)
                await db.exec_driver_sql("SELECT pg_sleep(60)")
        assert caught.value.retry_after_s == 1.0
        async with database.begin() as db:
            assert (await db.exec_driver_sql("SELECT 2")).scalar() == 2
    finally:
        if stopped is not None:
            os.kill(stopped, signal.SIGCONT)
        await database.close()


async def test_a_migration_may_take_longer_than_a_statement(
    postgres: NewDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here it waits for another server's."""
    url = postgres()
    other = await Database.open(url)
    monkeypatch.setattr(database_module, "STATEMENT_S", 0.2)
    async with other.begin() as db:
        await db.execute(sa.select(sa.func.pg_advisory_xact_lock(database_module.MIGRATION_LOCK)))
        opening = asyncio.create_task(Database.open(url))
        await asyncio.sleep(1)
        assert not opening.done()
    await (await opening).close()
    await other.close()


@pytest.mark.parametrize("points", [0, 4, 5])
async def test_a_collection_goes_with_all_its_points(
    database: tuple[Database, str], points: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collections_module, "DELETED", 2)
    store = CollectionStore(database[0])
    kept, gone = [await store.create(name, "{}") for name in ("kept", "gone")]
    for row in (kept, gone):
        await store.upsert(row.id, [(str(i), b"", None) for i in range(points)])
    assert await store.delete(gone.id) == points
    assert [row.name for row in await store.all()] == ["kept"]
    async with store.moment(kept.id) as moment:
        assert len(await moment.labels(0, moment.next_label)) == points
    assert [rows async for rows in store.points_from(gone.id, 0)] == []
    with pytest.raises(NotFound):
        await store.delete(gone.id)


async def test_what_writes_removed_is_kept_for_a_while(
    shared: tuple[Database, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CollectionStore(shared[0])
    row = await store.create("c", "{}")
    assert await store.upsert(row.id, [(str(i), b"", None) for i in range(4)]) == (0, [])
    assert await store.upsert(row.id, [("1", b"", None)], ["2"]) == (4, [1, 2])
    assert await store.delete_ids(row.id, ["0", "x"]) == (5, [0])
    assert await store.delete_labels(row.id, [3, 77]) == (6, 1)
    assert await store.delete_ids(row.id, ["x"]) == (7, [])

    async def removals(label: int) -> list[int]:
        async with store.moment(row.id) as moment:
            assert moment.next_label == 8
            return sorted(await moment.removals(label))

    assert await removals(0) == [0, 1, 2, 3, 77]
    assert await removals(5) == [0, 3, 77]
    await store.forget_removals()
    assert await removals(6) == [3, 77]
    monkeypatch.setattr(collections_module, "KEPT_S", -1.0)
    await store.forget_removals()
    assert await removals(0) == []


async def test_a_moment_stays_as_it_is(database: tuple[Database, str]) -> None:
    store = CollectionStore(database[0])
    row = await store.create("c", "{}")
    await store.upsert(row.id, [("a", b"", None)])
    async with store.moment(row.id) as moment:
        assert await moment.labels(0, 9) == [0]
        await store.upsert(row.id, [("a", b"", None), ("b", b"", None)])
        assert await moment.labels(0, 9) == [0]
        assert [[p.point_id for p in rows] async for rows in moment.points_from(0)] == [["a"]]


async def test_of_two_in_a_deadlock_one_is_unavailable(shared: tuple[Database, str]) -> None:
    database, _ = shared
    rows = [{"model": m, "alias": "a", "version": 1} for m in ("one", "other")]
    async with database.begin() as db:
        await db.execute(sa.insert(model_aliases), rows)
    both = asyncio.Barrier(2)

    async def change(first: str, then: str) -> None:
        async with database.begin() as db:
            for name in (first, then):
                mine = sa.update(model_aliases).where(model_aliases.c.model == name)
                await db.execute(mine.values(version=2))
                if name == first:
                    await both.wait()

    done = await asyncio.gather(
        change("one", "other"), change("other", "one"), return_exceptions=True
    )
    assert [type(d) for d in done if d is not None] == [Unavailable]


async def test_without_a_free_connection_the_database_is_unavailable(
    shared: tuple[Database, str],
) -> None:
    async with shared[0].begin() as db:
        await db.exec_driver_sql("CREATE ROLE few LOGIN CONNECTION LIMIT 1")
        await db.exec_driver_sql("GRANT ALL ON ALL TABLES IN SCHEMA public TO few")
    few = await Database.open(shared[1].replace("forebay@", "few@"))
    with pytest.raises(Unavailable):
        async with few.read(), few.read():
            pass
    await few.close()


async def test_what_postgresql_cannot_hold_is_no_outage(shared: tuple[Database, str]) -> None:
    with pytest.raises(sa.exc.DBAPIError):
        async with shared[0].begin() as db:
            await db.execute(model_aliases.insert().values(model="a\0", alias="a", version=1))


async def test_routing_outlives_the_process(database: tuple[Database, str]) -> None:
    state = StoredRoutingState(database[0])
    await state.set_alias("m", "staging", 2)
    await state.set_alias("m", "old", 1)
    await state.set_alias("m", "old", None)
    await state.set_traffic("m", {1: 9, 2: 1}, (2, 0.25))
    first = HistoryEvent(1.0, "promote", 0, 1, "k1")
    second = HistoryEvent(2.0, "rollback", 1, 2, "k2")
    await state.promote("m", first)
    await state.promote("m", second)
    await state.set_alias("other", "production", DATED)

    again = await Database.open(database[1])
    state = StoredRoutingState(again)
    assert await state.load() == {
        "m": Routing({"staging": 2, "production": 2}, {1: 9, 2: 1}, (2, 0.25)),
        "other": Routing({"production": DATED}),
    }
    assert await state.history("m") == [second, first]
    await state.set_traffic("m", {}, None)
    assert (await state.load())["m"].shares == {}
    assert (await state.load())["m"].shadow is None
    await again.close()
