"""The gate: foreground first, background in what is idle."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest
from forebay.errors import QueueFull
from forebay_server.generation.gate import Gate


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


class Visits:
    """Requests at a gate: who is in, and in which order they came in."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.order: list[str] = []
        self._leave: dict[str, asyncio.Event] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def come(self, name: str, background: bool = False, answers: int = 1) -> None:
        leave = self._leave[name] = asyncio.Event()

        async def visit() -> None:
            async with self.gate.enter("k", answers, 1, background=background):
                self.order.append(name)
                await leave.wait()

        self._tasks[name] = asyncio.create_task(visit())
        await settle()

    async def go(self, name: str) -> None:
        self._leave[name].set()
        await settle()

    async def cancel(self, name: str) -> None:
        self._tasks[name].cancel()
        await settle()


async def test_background_leaves_places_free_for_who_comes_next() -> None:
    visits = Visits(Gate(8, 100))
    for i in range(20):
        await visits.come(f"b{i}", background=True)
    assert len(visits.order) == 6 and visits.gate.background == 6
    await visits.come("f0")
    await visits.come("f1")
    assert visits.order[-2:] == ["f0", "f1"]


async def test_while_others_are_served_the_background_has_few_places() -> None:
    visits = Visits(Gate(8, 100))
    await visits.come("f0")
    for i in range(5):
        await visits.come(f"b{i}", background=True)
    assert visits.order == ["f0", "b0"]
    await visits.go("f0")
    assert visits.order == ["f0", "b0", "b1", "b2", "b3", "b4"]


async def test_all_that_wait_go_before_the_background() -> None:
    visits = Visits(Gate(2, 100))
    await visits.come("f0")
    await visits.come("f1")
    await visits.come("b0", background=True)
    await visits.come("f2")
    await visits.come("f3")
    for name in ("f0", "f1"):
        await visits.go(name)
    assert visits.order == ["f0", "f1", "f2", "f3"]
    await visits.go("f2")
    await visits.go("f3")
    assert visits.order[-1] == "b0"


async def test_the_background_counts_for_no_bound_and_can_be_taken_back() -> None:
    visits = Visits(Gate(1, 1))
    await visits.come("f0")
    for i in range(5):
        await visits.come(f"b{i}", background=True)
    await visits.come("f1")
    assert visits.gate.waiting == 1 and visits.gate.background_waiting == 5
    with pytest.raises(QueueFull):
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(visits.gate.enter("k", 1, 1))
    for i in range(4):
        await visits.cancel(f"b{i}")
    assert visits.gate.background_waiting == 1
    await visits.go("f0")
    await visits.go("f1")
    assert visits.order == ["f0", "f1", "b4"]
    await visits.go("b4")
    assert (visits.gate.running, visits.gate.background) == (0, 0)
