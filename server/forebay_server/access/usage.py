"""Usage by key, user, model, version and day; every call counted exactly once, cancelled ones too.

A call's record is appended to a journal file before the call is answered: one write of some 100
bytes to the page cache, which outlives the process (kill -9) though not the machine; the file is
synced every second, so power loss costs one second of records at most. Every few seconds the
journal is rolled: its records are added up and committed to the database together with the
segment's name, and the file is removed. A segment that is found at start is committed unless its
name is in the database, so a crash at any point counts nothing twice. Each segment is locked until
it is committed: of two servers with one home, neither takes the other's.

A full disk keeps no call from its answer: records that cannot be written wait in memory, up to
MAX_UNWRITTEN, and are written as soon as there is room. Only these are lost by a kill.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import orjson
import sqlalchemy as sa
from forebay.errors import Unavailable
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from forebay_server.storage.database import Database
from forebay_server.storage.tables import usage, usage_segments

log = logging.getLogger("forebay.access")

COUNTERS = ("calls", "items", "tokens", "cached", "errors", "cancelled", "engine_ms", "cost")
ROLL_EVERY_S, SYNC_EVERY_S = 5.0, 1.0
#: Records that wait in memory while the disk is full; beyond it they are lost, and the log says so.
MAX_UNWRITTEN = 100_000


#: Key, model, version and, where the caller named one, its own user.
UsageKey = tuple[str, str, int] | tuple[str, str, int, str]


@dataclass(slots=True)
class Counters:
    """Counters of use. `calls` includes failed and cancelled ones."""

    calls: int = 0
    items: int = 0
    tokens: int = 0
    cached: int = 0
    errors: int = 0
    cancelled: int = 0
    engine_ms: float = 0.0
    cost: float = 0.0

    def add(self, values: Iterable[float]) -> None:
        """Add counters in the order of COUNTERS."""
        # Records of an earlier version lack the last ones.
        for name, value in zip(COUNTERS, values, strict=False):
            setattr(self, name, getattr(self, name) + value)


_NOTHING = Counters()


#: Day, key, model, version and user of a row.
Place = tuple[str, str, str, int, str]


@dataclass(frozen=True, slots=True)
class UsageRow:
    """Counters of one key, model, version, day (UTC, YYYY-MM-DD) and user of the key's owner."""

    key_id: str
    model: str
    version: int
    day: str
    counters: Counters
    user: str = ""

    def place(self) -> Place:
        """Where it stands in the list of all: newest day first, then by the others, ascending."""
        return self.day, self.key_id, self.model, self.version, self.user


class OtherWriter(Protocol):
    """Who appends whole lines to the journal beside the ledger."""

    def set_journal(self, path: Path | None) -> None:
        """Append to this file from now on, and to the one before no more; None: to none."""
        ...

    def journal_state(self) -> tuple[bool, bool, list[bytes]]:
        """Since the last time: whether it wrote, whether a line was left without an end, and the lines
        that the file did not take."""
        ...


def line_start(key: UsageKey, day: str) -> str:
    """What a line of the journal begins with; the counters, separated by commas, and `]` follow."""
    return orjson.dumps([*key, day]).decode()[:-1] + ","


class UsageLedger:
    """See the module. `record` is called from any thread; the rest from one event loop."""

    def __init__(
        self, database: Database, folder: Path, clock: Callable[[], float] = time.time
    ) -> None:
        self._database = database
        self._folder = folder
        self._clock = clock
        self._lock = threading.Lock()
        self._flushing = asyncio.Lock()
        self._file = -1
        self._path = folder
        self._dirty = False
        self._unwritten: list[bytes] = []
        self._torn = False
        # Not committed yet: paths, and files that hold their locks.
        self._pending: list[tuple[Path, int]] = []
        self._today = (0, "")
        self._watched: dict[str, Counters] = {}
        self._write: Callable[[int, bytes], int] = os.write
        self._other: OtherWriter | None = None

    def share(self, other: OtherWriter | None) -> None:
        """Let somebody else append to the journal too, before the calls that it answers are answered;
        None: nobody any more."""
        with self._lock:
            if self._other is not None:
                self._other.set_journal(None)
                self._hear()
            self._other = other
            if other is not None:
                other.set_journal(self._path)

    def _hear(self) -> None:
        """What the other writer has done, and what it could not."""
        if self._other is None:
            return
        dirty, torn, lost = self._other.journal_state()
        self._dirty |= dirty
        self._torn |= torn
        for line in lost:
            log.error("the usage journal did not take what the transport has answered")
            self._keep(line)

    async def start(self) -> None:
        """Commit what an earlier process left, and open a new segment."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(self._folder.glob("*.journal")):
            file = _taken(path)
            if file is not None:
                self._pending.append((path, file))
        self._path, self._file = self._new()
        await self._commit_pending()

    def record(self, sums: Mapping[UsageKey, Iterable[float]]) -> None:
        """Append what calls used, in the order of COUNTERS."""
        day = self._day()
        line = b"".join(orjson.dumps([*key, day, *values]) + b"\n" for key, values in sums.items())
        with self._lock:
            self._hear()
            if self._unwritten or self._torn:
                self._keep(line)
                self._write_waiting()
                return
            # One write per record with O_APPEND: a kill leaves whole lines, or a torn last one.
            if not self._append(line):
                self._keep(line)
            elif self._watched:
                for key, values in sums.items():
                    if key[0] in self._watched:
                        self._watched[key[0]].add(values)

    def _append(self, data: bytes) -> bool:
        """Write all of it, or False: then what is there of it is a torn line."""
        try:
            written = self._write(self._file, data)
        except OSError as e:
            log.error("the usage journal cannot be written: %s", e)
            return False
        self._dirty = True
        self._torn = 0 < written < len(data)
        return written == len(data)

    def _keep(self, line: bytes) -> None:
        if len(self._unwritten) < MAX_UNWRITTEN:
            self._unwritten.append(line)
        else:
            log.error("a usage record is lost: %s", line.decode().strip())

    def _write_waiting(self) -> None:
        """Try to write what waits, one record at a time: each is whole or waits on."""
        if self._torn and not self._append(b"\n"):
            return
        self._torn = False
        done = 0
        while done < len(self._unwritten) and self._append(self._unwritten[done]):
            done += 1
        del self._unwritten[:done]

    async def add(self, db: AsyncConnection, key: UsageKey, values: Iterable[float]) -> None:
        """Count at once, in a transaction of the caller's: with it, or not at all."""
        counters = Counters()
        counters.add(values)
        await self._upsert(db, (*key[:3], key[3] if len(key) > 3 else "", self._day()), counters)

    async def _upsert(
        self, db: AsyncConnection, key: tuple[str, str, int, str, str], counters: Counters
    ) -> None:
        key_id, model, version, user, day = key
        user = user.replace("\0", "\ufffd")  # which PostgreSQL's texts cannot hold
        values = {name: getattr(counters, name) for name in COUNTERS}
        await db.execute(
            _upsert(self._database.dialect).values(
                key_id=key_id, model=model, version=version, user=user, day=day, **values
            )
        )

    async def keep(self) -> None:
        """Sync and roll for ever."""
        rolled = time.monotonic()
        while True:
            await asyncio.sleep(SYNC_EVERY_S)
            try:
                await self._sync()
                if time.monotonic() - rolled >= ROLL_EVERY_S:
                    rolled = time.monotonic()
                    await self.flush()
            except Exception:
                log.exception("keeping the usage journal failed; it is tried again")

    async def _sync(self) -> None:
        async with self._flushing:  # a roll would close the file under fsync's hands
            with self._lock:
                self._hear()
            if self._dirty:
                self._dirty = False
                await asyncio.to_thread(os.fsync, self._file)

    async def flush(self) -> None:
        """Bring all records so far into the database.

        Raises:
            Unavailable: the database is away. The records stay on disk for the next flush.
        """
        async with self._flushing:
            await self._flush()

    async def _flush(self, watched: str = "") -> Counters:
        """As `flush`. What is in the database then of what was recorded of a watched key."""
        with self._lock:
            self._hear()
            if self._unwritten:
                self._write_waiting()
            empty = os.fstat(self._file).st_size == 0
            seen = replace(self._watched.get(watched, _NOTHING))
        if not empty:
            path, file = self._new()  # outside the lock: calls don't wait for this
            with self._lock:
                old_file, old_path = self._file, self._path
                self._path, self._file = path, file
                if self._other is not None:
                    self._other.set_journal(path)
                self._torn = False
                seen = replace(self._watched.get(watched, _NOTHING))
            self._pending.append((old_path, old_file))
        await self._commit_pending()
        return seen

    async def close(self) -> None:
        """Flush and close. What the database does not take now stays for the next start."""
        with contextlib.suppress(Unavailable):
            await self.flush()
        with self._lock:
            file, self._file = self._file, -1  # a number that no other file can have
        if os.fstat(file).st_size == 0:
            self._path.unlink(missing_ok=True)
        for kept in (file, *(f for _, f in self._pending)):
            os.close(kept)

    async def total(self, key_id: str, from_day: str, to_day: str) -> Counters:
        """Sums of one key over days, inclusive."""
        await self.flush()
        return await self._sum(key_id, from_day, to_day)

    def watch(self, key_id: str) -> None:
        """Add up what is recorded of a key from now on, until `unwatch`: see `spent`."""
        with self._lock:
            self._watched.setdefault(key_id, Counters())

    def unwatch(self, key_id: str) -> None:
        """End it."""
        with self._lock:
            self._watched.pop(key_id, None)

    async def spent(self, key_id: str, from_day: str) -> tuple[Counters, Counters]:
        """Sums of a watched key from a day on, and how much of that was recorded since `watch`: who
        knows what else was spent meanwhile can tell what the sums lack."""
        async with self._flushing:  # nothing more comes into the database meanwhile
            seen = await self._flush(key_id)
            return await self._sum(key_id, from_day, "9999-99-99"), seen

    async def _sum(self, key_id: str, from_day: str, to_day: str) -> Counters:
        # Cast: PostgreSQL adds whole numbers up to decimals, which no message takes.
        sums = [
            sa.cast(sa.func.coalesce(sa.func.sum(c), 0), c.type)
            for c in (usage.c[name] for name in COUNTERS)
        ]
        query = sa.select(*sums).where(
            usage.c.key_id == key_id, usage.c.day >= from_day, usage.c.day <= to_day
        )
        async with self._database.read() as db:
            row = (await db.execute(query)).one()
        return Counters(**dict(zip(COUNTERS, row, strict=True)))

    async def rows(
        self,
        key_id: str | None,
        model: str | None,
        from_day: str | None,
        to_day: str | None,
        behind: Place | None,
        limit: int,
        user: str | None = None,
    ) -> list[UsageRow]:
        """Rows, newest day first, behind a row's place, or from the first."""
        await self.flush()
        within = (usage.c.key_id, usage.c.model, usage.c.version, usage.c.user)
        query = sa.select(usage).order_by(usage.c.day.desc(), *within)
        if behind is not None:
            day, *rest = behind
            further = sa.tuple_(*within) > sa.tuple_(*map(sa.literal, rest))
            query = query.where((usage.c.day < day) | ((usage.c.day == day) & further))
        for column, value in (("key_id", key_id), ("model", model), ("user", user)):
            if value is not None:
                query = query.where(usage.c[column] == value)
        if from_day:
            query = query.where(usage.c.day >= from_day)
        if to_day:
            query = query.where(usage.c.day <= to_day)
        async with self._database.read() as db:
            found = (await db.execute(query.limit(limit))).all()
        return [
            UsageRow(
                r.key_id,
                r.model,
                r.version,
                r.day,
                Counters(*(getattr(r, c) for c in COUNTERS)),
                r.user,
            )
            for r in found
        ]

    def today(self) -> str:
        """The day now, UTC."""
        return self._day()

    def _day(self) -> str:
        number = int(self._clock() // 86400)
        if number != self._today[0]:
            self._today = (number, time.strftime("%Y-%m-%d", time.gmtime(number * 86400)))
        return self._today[1]

    def _new(self) -> tuple[Path, int]:
        """An empty segment, locked for as long as this process has it open."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        while True:
            path = self._folder / f"{time.time_ns()}-{uuid.uuid4().hex[:12]}.journal"
            file = os.open(path, flags, 0o600)
            if _locked(file) and os.fstat(file).st_nlink:
                return path, file
            os.close(file)  # a server that starts was quicker, and removes it, or has

    async def _commit_pending(self) -> None:
        while self._pending:
            path, file = self._pending[0]
            await self._commit(path)
            self._pending.pop(0)
            os.close(file)

    async def _commit(self, path: Path) -> None:
        """Add a segment to the database, once, and remove it."""
        sums = await asyncio.to_thread(_add_up, path)
        mine = usage_segments.c.segment == path.name
        async with self._database.begin() as db:
            if (await db.execute(sa.select(usage_segments).where(mine))).first() is None:
                await db.execute(usage_segments.insert().values(segment=path.name))
                for key, counters in sums.items():
                    await self._upsert(db, key, counters)
        await asyncio.to_thread(_remove, path)
        async with self._database.begin() as db:  # the file is gone: its name has done its work
            await db.execute(sa.delete(usage_segments).where(mine))


def _taken(path: Path) -> int | None:
    """A segment that no living process writes or commits, locked; None for others."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    if _locked(file):
        return file
    os.close(file)
    return None


def _locked(file: int) -> bool:
    """Lock a file until it is closed; False when another has."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove(path: Path) -> None:
    """Remove a file for good: after a power loss it must not be back without its name's record."""
    path.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _add_up(path: Path) -> dict[tuple[str, str, int, str, str], Counters]:
    """Counters by key, model, version, user and day."""
    sums: dict[tuple[str, str, int, str, str], Counters] = {}
    if not path.exists():  # removed by a server that was killed before it dropped the name
        return sums
    for line in path.read_bytes().splitlines():
        try:
            key_id, model, version, *rest = json.loads(line)
            user = ""
            if isinstance(rest[1], str):  # lines of calls without a user have none
                user, *rest = rest
            day, *values = rest
        except (ValueError, IndexError):
            log.warning("a torn record in %s is left out", path.name)
            continue
        sums.setdefault((key_id, model, version, user, day), Counters()).add(values)
    return sums


def _upsert(dialect: str) -> Any:
    insert = (postgresql if dialect == "postgresql" else sqlite).insert(usage)
    return insert.on_conflict_do_update(
        index_elements=["key_id", "model", "version", "day", "user"],
        set_={name: usage.c[name] + insert.excluded[name] for name in COUNTERS},
    )
