"""Runs the items of batches in idle capacity, and survives its own end.

Where a batch stands is in the database alone. A server takes batches that nobody runs and says every
few seconds that it still does; after a crash they are taken again, and items without a result run
anew. A result, its batch's counts and what it used are stored in one transaction: an item that has
a result never runs again and is charged once.

Items are run as calls of their key's in the background (Call.background): the engines' queues serve
everybody else first. Batches take turns, one item each.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from forebay.errors import ForebayError, Unauthenticated

from forebay_server.access.deferred import DeferredWork
from forebay_server.core.call import Call
from forebay_server.storage.batches import OPEN, BatchRow, BatchStore, Ending, ItemRow

log = logging.getLogger("forebay.batches")

#: How long a server's word holds that it runs a batch, and how often it says so.
OWNED_S, CLAIM_EVERY_S = 10.0, 2.0
SWEEP_EVERY_S = 60.0
#: Items of a batch that are read ahead.
AHEAD = 64
#: Waits before an item is tried again whose engine is away.
BACKOFF_S = (0.5, 30.0)


@dataclass(slots=True)
class Executed:
    """What came of an item. `result` is a BatchResult; tokens: prompt, completion, cached,
    reasoning."""

    result: bytes
    good: bool
    tokens: tuple[int, int, int, int]


class Executor(Protocol):
    """Knows the contract's messages."""

    async def call(self, work: DeferredWork, row: BatchRow, item: ItemRow) -> Call:
        """The call that an item becomes. Raises ForebayError: its key may not."""
        ...

    async def run(self, call: Call, item: ItemRow) -> Executed:
        """Run an item to its answer. Raises ForebayError."""
        ...

    def failed(self, item: ItemRow, error: ForebayError) -> Executed:
        """The result of an item that failed."""
        ...

    def expired(self, item: ItemRow) -> Executed:
        """The result of an item whose batch's time ran out."""
        ...


@dataclass(slots=True)
class _Open:
    """A batch that this server runs."""

    row: BatchRow
    ahead: deque[ItemRow] = field(default_factory=deque)
    last: int = -1
    exhausted: bool = False
    running: dict[int, asyncio.Task[None]] = field(default_factory=dict)


class BatchRunner:
    """See the module. Lives on one event loop.

    Args:
        max_running: items at once, of all batches.
        keep_s: how long results are kept whose batch says nothing.
        on_end: told `completed` or `failed`, and how many items.
    """

    def __init__(
        self,
        store: BatchStore,
        executor: Executor,
        work: DeferredWork,
        max_running: int,
        keep_s: float,
        on_end: Callable[[str, int], None] = lambda result, count: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.store = store
        self.keep_s = keep_s
        self.clock = clock
        self._executor = executor
        self._work = work
        self._max_running = max_running
        self._on_end = on_end
        self._owner = secrets.token_hex(8)
        self._open: dict[str, _Open] = {}
        self._turns: deque[str] = deque()
        self._endings: asyncio.Queue[tuple[Ending, _Open | None]] = asyncio.Queue()
        self._wake = asyncio.Event()
        self._changed = True
        self._tasks: list[asyncio.Task[None]] = []
        self._closing = False

    async def start(self) -> None:
        """Begin to run, with what was left unfinished."""
        self._tasks = [
            asyncio.create_task(self._schedule()),
            asyncio.create_task(self._write()),
            asyncio.create_task(self._sweep()),
        ]

    async def close(self) -> None:
        """Stop; items that run have no result and run again at the next start."""
        self._closing = True
        items = [t for o in self._open.values() for t in o.running.values()]
        for task in [*items, *self._tasks]:
            task.cancel()
        await asyncio.gather(*items, *self._tasks, return_exceptions=True)
        await self._write_waiting()
        with contextlib.suppress(ForebayError):  # else others take them after OWNED_S
            await self.store.release(self._owner)

    def open(self) -> tuple[int, int]:
        """Batches that this server runs, and items of theirs that run now."""
        return len(self._open), sum(len(o.running) for o in self._open.values())

    def wake(self) -> None:
        """Batches have changed in the database: look at once."""
        self._changed = True
        self._wake.set()

    # Which items run.

    async def _schedule(self) -> None:
        claimed = 0.0
        while True:
            try:
                self._wake.clear()
                if self._changed or time.monotonic() - claimed >= CLAIM_EVERY_S:
                    self._changed = False
                    await self._claim()
                    claimed = time.monotonic()
                for batch in list(self._open.values()):
                    await self._look_after(batch)
                await self._fill()
            except Exception as e:
                if not isinstance(e, ForebayError):
                    log.exception("running batches failed; it is tried again")
                await asyncio.sleep(1.0)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), 0.5 if self._open else CLAIM_EVERY_S)

    async def _claim(self) -> None:
        now = self.clock()
        rows = {r.id: r for r in await self.store.claim(self._owner, now, now + OWNED_S)}
        for name, row in rows.items():
            if name in self._open:
                self._open[name].row = row
            else:
                self._open[name] = _Open(row)
                self._turns.append(name)
        for name in [n for n in self._open if n not in rows]:
            await self._drop(self._open[name])  # another server has it, or it was removed

    async def _drop(self, batch: _Open) -> None:
        await self._stop_items(batch)
        self._open.pop(batch.row.id, None)
        with contextlib.suppress(ValueError):  # dropped meanwhile
            self._turns.remove(batch.row.id)

    async def _stop_items(self, batch: _Open) -> None:
        tasks = list(batch.running.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _look_after(self, batch: _Open) -> None:
        """Bring a batch to its end where it is due."""
        row = batch.row
        if row.status == "cancelling":
            await self._stop_items(batch)
            await self._written()
            await self._end(batch, ("cancelling",), "cancelled")
        elif self.clock() >= row.expires_at:
            await self._stop_items(batch)
            await self._written()
            await self._fail_rest(batch, self._executor.expired)
            await self._end(batch, OPEN, "expired")
        elif row.status == "finalizing" or (batch.exhausted and not batch.running):
            now = self.clock()
            await self.store.move(
                row.id, ("validating", "in_progress"), status="finalizing", finalizing_at=now
            )
            await self._end(batch, ("finalizing",), "completed")

    async def _end(self, batch: _Open, old: tuple[str, ...], status: str) -> None:
        now = self.clock()
        kept = batch.row.results_expire_at  # until the end it is how long, not until when
        await self.store.move(
            batch.row.id,
            old,
            status=status,
            ended_at=now,
            results_expire_at=now + (self.keep_s if kept is None else kept),
            owner=None,
            owned_until=None,
        )
        log.info("batch %s: %s", batch.row.id, status)
        await self._drop(batch)

    async def _fail_rest(self, batch: _Open, result: Callable[[ItemRow], Executed]) -> None:
        """Give all items that have none a result."""
        while rows := await self.store.waiting(batch.row.id, -1, 500):
            endings = [
                Ending(r.batch_id, r.number, "failed", result(r).result, (0, 0, 0, 0)) for r in rows
            ]
            stored = await self.store.end(endings)
            self._on_end("failed", stored)

    async def _fill(self) -> None:
        """Start items, one of each batch in turn, up to the bound."""
        idle = 0
        while self._turns and idle < len(self._turns):
            if self.open()[1] >= self._max_running:
                return
            self._turns.rotate(-1)
            batch = self._open[self._turns[-1]]
            item = await self._next(batch)
            if item is None:
                idle += 1
                continue
            idle = 0
            task = asyncio.create_task(self._item(batch, item))
            batch.running[item.number] = task
            task.add_done_callback(lambda t, b=batch, i=item: self._look_at(t, b, i))

    async def _next(self, batch: _Open) -> ItemRow | None:
        if batch.exhausted or batch.row.status not in ("validating", "in_progress"):
            return None
        if not batch.ahead:
            try:
                self._work.check(batch.row.key_id)
            except Unauthenticated as e:
                error = e
                await self._stop_items(batch)
                await self._written()
                await self._fail_rest(batch, lambda item: self._executor.failed(item, error))
                await self._end(batch, OPEN, "failed")
                return None
            rows = await self.store.waiting(batch.row.id, batch.last, AHEAD)
            if not rows:
                batch.exhausted = True
                self._wake.set()
                return None
            batch.ahead.extend(r for r in rows if r.number not in batch.running)
            batch.last = rows[-1].number
            if not batch.ahead:
                self._wake.set()
                return None
            if batch.row.status == "validating":
                now = self.clock()
                await self.store.move(
                    batch.row.id, ("validating",), status="in_progress", in_progress_at=now
                )
                self._changed = True
        return batch.ahead.popleft()

    def _look_at(self, task: asyncio.Task[None], batch: _Open, item: ItemRow) -> None:
        """An item's task is over: one that fell over leaves its item to be run again."""
        if task.cancelled():
            batch.running.pop(item.number, None)
        elif (error := task.exception()) is not None:
            log.error("an item of batch %s fell over", batch.row.id, exc_info=error)
            batch.running.pop(item.number, None)
            batch.ahead.clear()
            batch.last, batch.exhausted = -1, False

    # One item.

    async def _item(self, batch: _Open, item: ItemRow) -> None:
        wait = BACKOFF_S[0]
        while True:
            call: Call | None = None
            try:
                call = await self._executor.call(self._work, batch.row, item)
                self._work.admit(call)
                done = await self._executor.run(call, item)
                code = "OK"
            except asyncio.CancelledError:
                self._stopped(batch, item, call)
                raise
            except ForebayError as e:
                if call is not None and _passes(e):
                    # Its work is lost: it is not charged.
                    call.facts.tokens = 0
                    call.note("cost", 0.0)
                    self._work.settle(call)
                    try:
                        await asyncio.sleep(max(wait, e.retry_after_s or 0.0))
                    except asyncio.CancelledError:
                        self._stopped(batch, item, None)
                        raise
                    wait = min(wait * 2, BACKOFF_S[1])
                    continue
                done, code = self._executor.failed(item, e), e.code
            except Exception as e:
                log.exception("item %d of batch %s failed", item.number, item.batch_id)
                error = ForebayError("internal error")
                error.__cause__ = e
                done, code = self._executor.failed(item, error), "INTERNAL"
            break
        if call is not None:
            self._work.settle(call)
        ending = Ending(
            item.batch_id,
            item.number,
            "completed" if done.good else "failed",
            done.result,
            done.tokens,
            self._counting(call, code),
        )
        self._endings.put_nowait((ending, batch))

    def _stopped(self, batch: _Open, item: ItemRow, call: Call | None) -> None:
        """An item was stopped: it has no result. What it used is charged when its batch was
        cancelled; at a shutdown it is not, for it runs again."""
        batch.running.pop(item.number, None)
        if call is None:
            return
        self._work.settle(call)
        if not self._closing and call.facts.tokens:
            ending = Ending(
                item.batch_id, item.number, "", None, (0, 0, 0, 0),
                self._counting(call, "CANCELLED"),
            )  # fmt: skip
            self._endings.put_nowait((ending, None))

    def _counting(self, call: Call | None, code: str) -> Any:
        if call is None:
            return None

        async def count(db: Any) -> None:
            await self._work.count(db, call, code)

        return count

    # Results.

    async def _write(self) -> None:
        while True:
            await self._write_group([await self._endings.get()])

    async def _write_group(self, group: list[tuple[Ending, _Open | None]]) -> None:
        """Store this and all else that has ended meanwhile, together, however long it takes."""
        while not self._endings.empty():
            group.append(self._endings.get_nowait())
        while True:
            try:
                await self.store.end([e for e, _ in group])
                break
            except ForebayError as e:
                log.error("results of batches cannot be stored yet: %s", e.message)
                await asyncio.sleep(1.0)
        for ending, batch in group:
            if batch is not None:
                batch.running.pop(ending.number, None)
                self._on_end(ending.status, 1)
            self._endings.task_done()
        self._wake.set()

    async def _written(self) -> None:
        """Wait until all endings so far are stored."""
        await self._endings.join()

    async def _write_waiting(self) -> None:
        """At the end: what has ended is stored, if the database is there."""
        group = []
        while not self._endings.empty():
            group.append(self._endings.get_nowait()[0])
        if group:
            with contextlib.suppress(ForebayError):
                await self.store.end(group)

    async def _sweep(self) -> None:
        while True:
            try:
                for batch in await self.store.stale(self.clock()):
                    await self.store.discard(batch)
            except Exception:
                log.exception("removing old batches failed; it is tried again")
            await asyncio.sleep(SWEEP_EVERY_S)


def _passes(error: ForebayError) -> bool:
    """Whether an error says nothing of the item, and is over after a while."""
    if error.code == "UNAVAILABLE":
        return True
    soon = error.retry_after_s is not None and error.retry_after_s <= 60
    return error.code == "RESOURCE_EXHAUSTED" and soon
