"""Idempotency keys: one act, one answer, whatever the caller does."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

import pytest
from forebay.errors import Aborted, FailedPrecondition, InvalidArgument, Unavailable
from forebay_server.access import idempotency
from forebay_server.access.idempotency import KEEP_S, STALE_S, IdempotencyStore
from forebay_server.storage.database import Database

from .conftest import Clock


class Work:
    """Counts how often it acts; ends when let."""

    def __init__(self, error: Exception | None = None, waits: bool = False) -> None:
        self.acts = 0
        self.error = error
        self.started, self.may_end = asyncio.Event(), asyncio.Event()
        if not waits:
            self.may_end.set()

    async def __call__(self) -> bytes:
        self.acts += 1
        self.started.set()
        await self.may_end.wait()
        if self.error:
            raise self.error
        return b"secret answer %d" % self.acts


async def test_a_retry_gets_the_first_answer(database: Database, clock: Clock) -> None:
    store, work = IdempotencyStore(database, clock), Work()
    for _ in range(3):
        assert await store.once("k", "/m", "t", b"r", work) == b"secret answer 1"
    assert work.acts == 1
    await store.once("k2", "/m", "t", b"r", work)
    await store.once("k", "/m2", "t", b"r", work)
    await store.once("k", "/m", "t2", b"r", work)
    assert work.acts == 4


async def test_another_request_under_the_same_token_is_refused(database: Database) -> None:
    store, work = IdempotencyStore(database), Work()
    await store.once("k", "/m", "t", b"r", work)
    with pytest.raises(InvalidArgument):
        await store.once("k", "/m", "t", b"other", work)
    with pytest.raises(InvalidArgument):
        await store.once("k", "/m", "t" * 257, b"r", work)
    assert work.acts == 1


async def test_a_second_call_while_the_first_runs_is_aborted(database: Database) -> None:
    store, work = IdempotencyStore(database), Work(waits=True)
    first = asyncio.create_task(store.once("k", "/m", "t", b"r", work))
    await work.started.wait()
    with pytest.raises(Aborted) as e:
        await store.once("k", "/m", "t", b"r", work)
    assert e.value.retry_after_s
    work.may_end.set()
    assert await first == b"secret answer 1"


async def test_work_goes_on_when_its_caller_is_gone(database: Database) -> None:
    store, work = IdempotencyStore(database), Work(waits=True)
    first = asyncio.create_task(store.once("k", "/m", "t", b"r", work))
    await work.started.wait()
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    work.may_end.set()
    await store.drain()
    assert await store.once("k", "/m", "t", b"r", work) == b"secret answer 1"
    assert work.acts == 1


async def test_a_failed_call_may_be_tried_again(database: Database) -> None:
    store, work = IdempotencyStore(database), Work(FailedPrecondition("no"))
    with pytest.raises(FailedPrecondition):
        await store.once("k", "/m", "t", b"r", work)
    work.error = None
    assert await store.once("k", "/m", "t", b"r", work) == b"secret answer 2"


async def test_tokens_expire(database: Database, clock: Clock) -> None:
    store, work = IdempotencyStore(database, clock), Work()
    await store.once("k", "/m", "t", b"r", work)
    clock.now += KEEP_S - 1
    await store.once("k", "/m", "t", b"r", work)
    assert work.acts == 1
    clock.now += 2
    await store.once("k", "/m", "t", b"r", work)
    assert work.acts == 2


async def test_a_call_that_died_with_its_server_blocks_for_a_while_only(
    database: Database, clock: Clock
) -> None:
    dead, work = IdempotencyStore(database, clock), Work()
    row = ("k", "/m", hashlib.sha256(b"t").hexdigest())
    await dead._take(row, hashlib.sha256(b"r").digest())
    store = IdempotencyStore(database, clock)
    clock.now += STALE_S - 1
    with pytest.raises(Aborted):
        await store.once("k", "/m", "t", b"r", work)
    await dead.touch(row)
    clock.now += STALE_S - 1
    with pytest.raises(Aborted):
        await store.once("k", "/m", "t", b"r", work)
    clock.now += 2
    assert await store.once("k", "/m", "t", b"r", work) == b"secret answer 1"


async def test_neither_answer_nor_token_is_stored_readable(
    database: Database, tmp_path: Path
) -> None:
    await IdempotencyStore(database).once("k", "/m", "my-token", b"r", Work())
    stored = b"".join(p.read_bytes() for p in tmp_path.iterdir() if p.is_file())
    assert b"secret answer" not in stored
    assert b"my-token" not in stored


async def test_a_token_that_cannot_be_kept_fresh_costs_no_answer_and_is_in_the_log(
    database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(idempotency, "STALE_S", 0.04)
    store, work = IdempotencyStore(database), Work(waits=True)

    async def away(row: tuple[str, str, str]) -> None:
        work.may_end.set()
        raise Unavailable("the database is away")

    monkeypatch.setattr(store, "touch", away)
    assert await store.once("k", "/m", "t", b"r", work) == b"secret answer 1"
    assert "the database is away" in caplog.text
