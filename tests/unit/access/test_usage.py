"""Usage: every record once, whatever dies and whenever."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa
from forebay.errors import Unavailable
from forebay_server.access.usage import Counters, UsageLedger
from forebay_server.storage.database import Database
from forebay_server.storage.tables import usage_segments

from .conftest import Clock

ONE = (1, 2, 10, 1, 0, 0, 0.5)
DAY = "2027-01-15"

#: Records calls, says so after each, and rolls now and then, until it is killed.
WRITER = """
import asyncio, sys
from pathlib import Path
from forebay_server.access.usage import UsageLedger
from forebay_server.storage.database import Database

async def main():
    database = await Database.open(sys.argv[1])
    ledger = UsageLedger(database, Path(sys.argv[2]))
    await ledger.start()
    n = 0
    while True:
        for _ in range(50):
            ledger.record({("k", "m", 1): (1, 2, 10, 1, 0, 0, 0.5)})
            n += 1
            print(n, flush=True)
        await ledger.flush()

asyncio.run(main())
"""


@pytest.fixture
async def ledger(database: Database, tmp_path: Path, clock: Clock) -> UsageLedger:
    made = UsageLedger(database, tmp_path / "usage", clock)
    await made.start()
    return made


async def calls(ledger: UsageLedger, key: str = "k") -> int:
    return (await ledger.total(key, "0000-00-00", "9999-99-99")).calls


async def test_users_have_rows_of_their_own(ledger: UsageLedger, database: Database) -> None:
    ledger.record({("k", "m", 1): ONE, ("k", "m", 1, "ann"): ONE})
    ledger.record({("k", "m", 1, "ann"): ONE})
    async with database.begin() as db:
        await ledger.add(db, ("k", "m", 1, "bob\0"), ONE)
    rows = await ledger.rows("k", None, None, None, None, 10)
    assert [(r.user, r.counters.calls) for r in rows] == [("", 1), ("ann", 2), ("bob\ufffd", 1)]
    (ann,) = await ledger.rows("k", None, None, None, None, 10, user="ann")
    assert ann.counters.tokens == 20
    assert await calls(ledger) == 4


async def test_what_a_transaction_counts_goes_with_it(
    ledger: UsageLedger, database: Database
) -> None:
    with pytest.raises(RuntimeError):
        async with database.begin() as db:
            await ledger.add(db, ("k", "m", 1), ONE)
            raise RuntimeError
    assert await calls(ledger) == 0


async def test_records_are_added_up_by_key_model_version_and_day(
    ledger: UsageLedger, clock: Clock
) -> None:
    ledger.record({("k", "m", 1): ONE})
    ledger.record({("k", "m", 1): (1, 0, 0, 0, 1, 0, 0.0)})
    ledger.record({("k", "m", 2): (1, 0, 0, 0, 0, 1, 0.0)})
    ledger.record({("k2", "m", 1): ONE})
    await ledger.flush()
    clock.now += 86400
    ledger.record({("k", "m", 1): ONE})
    rows = await ledger.rows(None, None, None, None, None, 10)
    assert [(r.key_id, r.version, r.day, r.counters.calls) for r in rows] == [
        ("k", 1, "2027-01-16", 1),
        ("k", 1, DAY, 2),
        ("k", 2, DAY, 1),
        ("k2", 1, DAY, 1),
    ]
    assert rows[1].counters == Counters(2, 2, 10, 1, 1, 0, 0.5)
    total = await ledger.total("k", DAY, DAY)
    assert total == Counters(3, 2, 10, 1, 1, 1, 0.5)
    whole = {total.calls, total.items, total.tokens, total.cached, total.errors, total.cancelled}
    assert {type(n) for n in whole} == {int} and type(total.engine_ms) is float
    behind = rows[1].place()
    assert [r.version for r in await ledger.rows("k", "m", DAY, DAY, behind, 9)] == [2]
    for n in range(4):
        behind = rows[n - 1].place() if n else None
        assert await ledger.rows(None, None, None, None, behind, 1) == [rows[n]]


async def test_threads_lose_nothing_to_each_other_or_to_rolls(ledger: UsageLedger) -> None:
    def write() -> None:
        for _ in range(300):
            ledger.record({("k", "m", 1): ONE})

    with ThreadPoolExecutor(4) as pool:
        running = [asyncio.wrap_future(pool.submit(write)) for _ in range(4)]
        while not all(f.done() for f in running):
            await ledger.flush()
            await asyncio.sleep(0)
    assert await ledger.total("k", DAY, DAY) == Counters(1200, 2400, 12000, 1200, 0, 0, 600.0)


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("after", [3, 127, 260])
async def test_a_kill_loses_no_record_and_doubles_none(
    url: str, tmp_path: Path, after: int
) -> None:
    folder = tmp_path / "usage"
    said = write_until_killed(url, folder, after)
    database = await Database.open(url)
    ledger = UsageLedger(database, folder)
    await ledger.start()
    counted = await calls(ledger)
    # The kill may come between the record and its announcement, never the other way round.
    assert said <= counted <= said + 1
    await ledger.close()
    assert list(folder.iterdir()) == []
    await database.close()


def write_until_killed(url: str, folder: Path, after: int) -> int:
    """Kill a writer once it has announced `after` records; how many it announced in the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, url, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None
    for _ in range(after):
        assert process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    said = after + len(process.stdout.read().split())
    process.wait()
    process.stdout.close()
    return said


async def test_a_segment_that_was_committed_before_the_crash_is_not_counted_again(
    database: Database, ledger: UsageLedger, tmp_path: Path
) -> None:
    line = b'["k","m",1,"2027-01-15",1,2,10,1,0,0,0.5]\n'
    folder = tmp_path / "crashed"
    folder.mkdir()
    (folder / "1.journal").write_bytes(line)
    (folder / "2.journal").write_bytes(line + line[:17])  # torn at the end
    async with database.begin() as db:
        await db.execute(usage_segments.insert().values(segment="1.journal"))
    crashed = UsageLedger(database, folder)
    await crashed.start()
    assert await calls(crashed) == 1
    async with database.read() as db:
        assert (await db.execute(sa.select(usage_segments))).all() == []
    await crashed.close()


async def test_servers_with_one_home_leave_each_others_segments_alone(
    database: Database, ledger: UsageLedger, tmp_path: Path
) -> None:
    ledger.record({("k", "m", 1): ONE})
    second = UsageLedger(database, tmp_path / "usage")
    await second.start()
    assert await calls(second) == 0
    ledger.record({("k", "m", 1): ONE})
    second.record({("k", "m", 1): ONE})
    assert await calls(ledger) == 2
    assert await calls(second) == 3
    await second.close()


async def test_a_segment_that_one_server_commits_is_not_taken_by_another(
    database: Database, ledger: UsageLedger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another that starts meanwhile has read it, and counts it when the first has forgotten it."""
    ledger.record({("k", "m", 1): ONE})
    second = UsageLedger(database, tmp_path / "usage")
    begin, starting = Database.begin, []

    def begins(self: Database) -> object:
        if not starting:
            starting.append(asyncio.create_task(second.start()))
        return begin(self)

    monkeypatch.setattr(Database, "begin", begins)
    await ledger.flush()
    await starting[0]
    assert second._pending == []
    assert await calls(ledger) == 1
    await second.close()


async def test_a_segment_is_not_shared_with_a_server_that_was_quicker_to_lock_it(
    database: Database, ledger: UsageLedger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another that starts may see a new segment before its owner has locked it."""
    taken: list[int] = []
    opened = os.open

    def opens(path: Path, flags: int, *mode: int) -> int:
        file = opened(path, flags, *mode)
        if flags & os.O_CREAT and not taken:
            taken.append(opened(path, os.O_RDONLY))
            fcntl.flock(taken[0], fcntl.LOCK_EX)
        return file

    ledger.record({("k", "m", 1): ONE})
    with monkeypatch.context() as quick:
        quick.setattr(os, "open", opens)
        await ledger.flush()
    ledger.record({("k", "m", 1): ONE})
    os.close(taken[0])
    assert await calls(ledger) == 2


async def test_records_wait_on_disk_while_the_database_is_away(
    ledger: UsageLedger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def locked(*_: object, **__: object) -> None:
        raise Unavailable("away")

    ledger.record({("k", "m", 1): ONE})
    with monkeypatch.context() as away:
        away.setattr(Database, "begin", locked)
        with pytest.raises(Unavailable):
            await ledger.flush()
        ledger.record({("k", "m", 1): ONE})
        with pytest.raises(Unavailable):
            await ledger.flush()
    assert await calls(ledger) == 2
    assert len(list((tmp_path / "usage").iterdir())) == 1


class Disk:
    """Has `room` bytes left: short writes, then ENOSPC."""

    def __init__(self, room: int) -> None:
        self.room = room

    def write(self, file: int, data: bytes) -> int:
        """As os.write."""
        if self.room <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        fits = data[: self.room]
        self.room -= len(fits)
        return os.write(file, fits)


async def test_a_full_disk_costs_no_record_and_no_call(ledger: UsageLedger) -> None:
    disk = Disk(75)  # the second record is torn
    ledger._write = disk.write
    for _ in range(5):
        ledger.record({("k", "m", 1): ONE})
    assert await calls(ledger) < 5
    disk.room = 1_000_000
    ledger.record({("k", "m", 1): ONE})
    assert await calls(ledger) == 6
    await ledger.close()


async def test_a_torn_record_takes_none_behind_it_along(ledger: UsageLedger) -> None:
    """Where there is room again before its segment is rolled, the segment goes on."""
    disk = Disk(75)
    ledger._write = disk.write
    for _ in range(3):
        ledger.record({("k", "m", 1): ONE})
    disk.room = 1_000_000
    for _ in range(2):
        ledger.record({("k", "m", 1): ONE})
    written = ledger._path.read_bytes()
    assert written.endswith(b"\n") and len(written.splitlines()) == 6  # the torn one, and five
    assert await calls(ledger) == 5
    await ledger.close()


async def test_a_roll_writes_what_waited_for_room(ledger: UsageLedger) -> None:
    disk = Disk(75)
    ledger._write = disk.write
    for _ in range(3):
        ledger.record({("k", "m", 1): ONE})
    disk.room = 1_000_000
    assert await calls(ledger) == 3
    await ledger.close()
