"""Streams of the fast lane: every call ends once, whenever it is stopped."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from forebay.methods import methods
from forebay.v1 import model_pb2
from forebay_server.core.call import Call
from forebay_server.services.base import Handler
from forebay_server.transport.streams import Streams

METHOD = methods()["/forebay.v1.ModelService/WatchModels"]


def call_of(ends: list[str], deadline: float | None = None) -> Call:
    def ended(call: Call) -> None:
        assert call.code is not None
        ends.append(call.code)

    return Call(METHOD, {}, started=time.monotonic(), deadline=deadline, on_end=ended)


async def endless(call: Call) -> AsyncIterator[Any]:
    while True:
        yield model_pb2.WatchModelsResponse()
        await asyncio.sleep(0.001)


async def settled(ends: list[str]) -> None:
    for _ in range(200):
        if ends:
            return
        await asyncio.sleep(0.01)


def test_a_call_that_is_stopped_before_its_first_step_ends() -> None:
    ends: list[str] = []

    async def run() -> None:
        streams = Streams(asyncio.get_running_loop(), lambda messages: [])
        call = call_of(ends)
        streams.start(Handler(METHOD, endless), [call])
        streams.gone(call)  # both in the same turn of the loop
        await settled(ends)

    asyncio.run(run())
    assert ends == ["CANCELLED"]


def test_a_reader_that_never_reads_does_not_outlive_its_deadline() -> None:
    ends: list[str] = []

    async def run() -> None:
        streams = Streams(asyncio.get_running_loop(), lambda messages: range(len(messages)))
        streams.start(Handler(METHOD, endless), [call_of(ends, time.monotonic() + 0.1)])
        await settled(ends)

    asyncio.run(run())
    assert ends == ["DEADLINE_EXCEEDED"]
