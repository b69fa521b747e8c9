"""After a full batch its callers come back one by one: the next batch waits a moment for all of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from forebay_server.core import slot
from forebay_server.core.batcher import BatchingEngineClient
from forebay_server.core.interfaces import (
    BatchPolicy,
    Completion,
    EngineRequest,
    EngineSpec,
    Item,
    TokenInput,
)
from forebay_server.engines.deterministic import DeterministicEngine

#: Longer than in service, so that a busy machine's threads keep the order that the tests mean.
SETTLE_S = 0.2


def request() -> EngineRequest:
    return EngineRequest([Item(TokenInput(np.array([1, 2], np.int64)), 2)])


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[BatchingEngineClient]:
    monkeypatch.setattr(slot, "SETTLE_SHARE", 100)
    monkeypatch.setattr(slot, "MAX_SETTLE_S", SETTLE_S)
    options = {"answer": "echo", "base_s": 0.02}
    spec = EngineSpec("m", 1, "deterministic", "", "tokens", options=options, policy=BatchPolicy())
    engine = DeterministicEngine(spec)
    engine.load()
    made = BatchingEngineClient([engine])
    yield made
    made.close()


def answered(completions: list[Completion]) -> list[int]:
    """Rows of the batch that each rode in."""
    done = [threading.Event() for _ in completions]
    for completion, event in zip(completions, done, strict=True):
        completion.add_done_callback(lambda _, e=event: e.set())
    for event in done:
        assert event.wait(10)
    return [c.timing.batch_rows for c in completions]


def test_callers_that_come_back_one_by_one_ride_together(client: BatchingEngineClient) -> None:
    assert (
        answered(client.submit([request() for _ in range(slot.CROWD)])) == [slot.CROWD] * slot.CROWD
    )
    back = []
    for _ in range(slot.CROWD):
        back += client.submit([request()])
        time.sleep(SETTLE_S / (4 * slot.CROWD))
    assert answered(back) == [slot.CROWD] * slot.CROWD


def test_fewer_callers_are_not_waited_for(client: BatchingEngineClient) -> None:
    few = slot.CROWD - 1
    assert answered(client.submit([request() for _ in range(few)])) == [few] * few
    first = client.submit([request()])
    time.sleep(SETTLE_S / 2)
    later = client.submit([request() for _ in range(few - 1)])
    assert answered(first) == [1], "it was cut at once"
    answered(later)


def test_who_comes_late_is_not_waited_with(client: BatchingEngineClient) -> None:
    answered(client.submit([request() for _ in range(slot.CROWD)]))
    time.sleep(2 * SETTLE_S)
    lone = client.submit([request()])
    time.sleep(SETTLE_S / 4)
    more = client.submit([request() for _ in range(slot.CROWD)])
    assert answered(lone) == [1], "the moment was over when it came"
    answered(more)


def test_not_all_come_back_and_the_rest_is_served(client: BatchingEngineClient) -> None:
    answered(client.submit([request() for _ in range(slot.CROWD)]))
    assert answered(client.submit([request(), request()])) == [2, 2]


def test_closing_does_not_wait_for_them(client: BatchingEngineClient) -> None:
    answered(client.submit([request() for _ in range(slot.CROWD)]))
    (last,) = client.submit([request()])
    client.close()
    assert last.error() is None
