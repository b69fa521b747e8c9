"""The database: SQLite in WAL mode by default, PostgreSQL by URL. Migrated at start.

SQLite's driver would begin transactions late and leave schema changes outside of them, so they are
begun here: writers at once (BEGIN IMMEDIATE: two of them queue instead of failing in the middle),
readers deferred. A migration that is killed leaves nothing, and of two servers that start at once
one waits for the other.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from forebay.errors import Unavailable
from forebay.settings import SettingsError
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

MIGRATIONS = Path(__file__).parent / "migrations"
#: The newest migration; a test holds it to be that.
HEAD = "0007_collection_removals"
#: PostgreSQL's advisory lock that holds migrations apart. Any fixed number will do.
MIGRATION_LOCK = 0x464F5245
#: Seconds that PostgreSQL may take for one statement: on a connection that hangs, callers would wait
#: for ever. Migrations may take longer.
STATEMENT_S = 60.0
#: Classes of PostgreSQL's SQLSTATE that say nothing about the statement: the connection is lost, the
#: transaction was in another's way (deadlock), too little of something (connections, disk), a lock
#: is not to be had, an operator intervened (restart, failover), the system failed.
AWAY = ("08", "40", "53", "55", "57", "58", "25006")  # the last one: a standby, which only reads
_URLS = "allowed are sqlite+aiosqlite:///PATH and postgresql+asyncpg://USER:PASSWORD@HOST/NAME"


class SchemaError(Exception):
    """The database's schema is not one that this server knows."""


class Database:
    """An open database. `begin` gives a transaction; a commit is on disk before it returns."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    @classmethod
    async def open(cls, url: str) -> Database:
        """Open, and migrate to the newest schema.

        Raises:
            SchemaError: a newer server has migrated it further.
            SettingsError: the URL is of no database that can be used here.
            OSError: the database cannot be reached, or not be used.
        """
        engine = _engine(url)
        if engine.dialect.name == "sqlite":
            _private(engine.url.database)
            event.listen(engine.sync_engine, "connect", _sqlite_pragmas)
            event.listen(engine.sync_engine, "begin", _sqlite_begin)
        try:
            async with engine.begin() as connection:
                if engine.dialect.name == "postgresql":
                    lock = sa.select(sa.func.pg_advisory_xact_lock(MIGRATION_LOCK))
                    await connection.execute(lock)
                await connection.run_sync(_migrate)
        except DBAPIError as e:
            await engine.dispose()
            await asyncio.sleep(0.05)  # SQLite's driver has a thread that ends by this loop
            raise OSError(f"the database cannot be used: {e.orig}") from None
        except BaseException as e:  # a start that is cut off, too
            await engine.dispose()
            # What asyncpg says while it connects, and the system's word to it.
            if isinstance(e, OSError) or type(e).__module__.startswith("asyncpg."):
                raise OSError(f"the database cannot be used: {e}") from None
            raise
        if engine.dialect.name == "postgresql":
            await engine.dispose()
            engine = _engine(url, STATEMENT_S)
        return cls(engine)

    @property
    def dialect(self) -> str:
        """`sqlite` or `postgresql`."""
        return self._engine.dialect.name

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[AsyncConnection]:
        """One transaction that writes.

        Raises:
            Unavailable: the database is away, full, locked for too long, or takes longer than
                STATEMENT_S for a statement. Nothing was written.
        """
        with _outages():
            async with self._engine.begin() as connection:
                yield connection

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """One transaction that reads, of one moment. Waits for no writer. Raises as `begin`."""
        options: dict[str, Any] = {"forebay_read": True}
        if self.dialect == "postgresql":  # by default each statement there is of its own moment
            options["isolation_level"] = "REPEATABLE READ"
        with _outages():
            async with self._engine.connect() as plain:
                yield await plain.execution_options(**options)

    async def close(self) -> None:
        """Close all connections."""
        await self._engine.dispose()


def _engine(url: str, statement_s: float | None = None) -> AsyncEngine:
    """The engine for a URL, of which no error shows anything: it may hold a password.

    Args:
        statement_s: asyncpg's bound on one statement. It cancels it, or ends a connection that does
            not answer to that in as long again.
    """
    bound = {} if statement_s is None else {"command_timeout": statement_s}
    try:
        # A connection that a restart or a failover has closed is replaced before its use: one
        # question each time. Nobody else closes those to a file.
        return create_async_engine(
            url, pool_pre_ping=url.startswith("postgresql"), connect_args=bound
        )
    except ModuleNotFoundError as e:
        extra = " (install the extra `postgres`)" if e.name == "asyncpg" else ""
        raise SettingsError(
            f"storage.database needs the driver {e.name}, which is not installed{extra}; {_URLS}"
        ) from None
    except (SQLAlchemyError, ValueError):  # ValueError: a port that is no number
        raise SettingsError(f"storage.database is no URL of a database; {_URLS}") from None


@contextmanager
def _outages() -> Iterator[None]:
    try:
        yield
    except Exception as e:
        if not _away(e):
            raise
        raise Unavailable(
            "the server's database cannot be used now", reason="STORAGE_AWAY", retry_after_s=1.0
        ) from e


def _away(error: Exception) -> bool:
    """Whether it is the database that fails, and not the statement."""
    if isinstance(error, (OperationalError, InterfaceError, PoolTimeout, OSError)):
        return True
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return True
    # asyncpg's own errors, which may come bare while it connects, have a state as well.
    state = getattr(getattr(error, "orig", error), "sqlstate", None)
    return str(state or "").startswith(AWAY)


def _private(path: str | None) -> None:
    """Make the file for its owner alone, where it is new; SQLite's files beside it take its mode over.
    The folder may be one that all can read, and callers' documents are in it."""
    if path and path != ":memory:" and not path.startswith("file:"):
        with suppress(OSError):  # opening it says what is wrong
            os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))


def _sqlite_begin(connection: sa.Connection) -> None:
    read = connection.get_execution_options().get("forebay_read", False)
    connection.exec_driver_sql("BEGIN" if read else "BEGIN IMMEDIATE")


def _sqlite_pragmas(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # the driver begins nothing by itself
    cursor = connection.cursor()
    # First: journal_mode itself needs the lock when two processes make the file together.
    cursor.execute("PRAGMA busy_timeout=10000")
    cursor.execute("PRAGMA journal_mode=WAL")
    # FULL: a commit survives power loss. Commits are few (admin calls, usage in bulk).
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.close()


def _migrate(connection: sa.Connection) -> None:
    if _version(connection) == HEAD:
        return
    # Only now: Alembic takes 15 MB and a third of a second, and most starts need none of it.
    from alembic import command
    from alembic.config import Config
    from alembic.util.exc import CommandError

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, "head")
    except CommandError as e:
        raise SchemaError(f"the database is of a newer forebay: {e}") from None


def _version(connection: sa.Connection) -> str | None:
    """The schema's version; None before the first migration."""
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    return connection.scalar(sa.text("SELECT version_num FROM alembic_version"))
