"""Quick engines are run by the thread that submits: never two threads at once, nothing forgotten."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from forebay.errors import InvalidArgument
from forebay_server.core.batcher import BatchingEngineClient
from forebay_server.core.collector import together
from forebay_server.core.interfaces import (
    BatchPolicy,
    Completion,
    EngineRequest,
    EngineSpec,
    Item,
    TokenInput,
)
from forebay_server.engines.deterministic import DeterministicEngine

BAD = 13


class Watched(DeterministicEngine):
    """Says which threads run it, and when two do at once."""

    def __init__(self, spec: EngineSpec) -> None:
        super().__init__(spec)
        self.threads: set[str] = set()
        self.clashes = 0
        self._one = threading.Lock()

    def execute(self, inputs: Any) -> Any:
        if not self._one.acquire(blocking=False):
            self.clashes += 1
            return super().execute(inputs)
        try:
            self.threads.add(threading.current_thread().name)
            return super().execute(inputs)
        finally:
            self._one.release()


@pytest.fixture
def engine() -> Watched:
    options = {"answer": "echo", "base_s": 0.0, "fail_on": BAD}
    spec = EngineSpec(
        "m", 1, "deterministic", "", "tokens", options=options, policy=BatchPolicy(max_batch_size=4)
    )
    made = Watched(spec)
    made.load()
    return made


@pytest.fixture
def client(engine: Watched) -> Iterator[BatchingEngineClient]:
    made = BatchingEngineClient([engine], here_s=0.5)
    answer(made.submit([request(1)])[0])  # the first run is the slot's: how quick it is, shows
    yield made
    made.close(5.0)


def request(*ids: int) -> EngineRequest:
    return EngineRequest([Item(TokenInput(np.array([i], np.int64)), 1) for i in ids])


def answer(completion: Completion) -> list[int]:
    done = threading.Event()
    completion.add_done_callback(lambda _: done.set())
    assert done.wait(10)
    return [int(np.asarray(r).reshape(-1)[0]) for r in completion.result()]


def test_a_batch_of_calls_is_answered_when_submit_returns(
    engine: Watched, client: BatchingEngineClient
) -> None:
    with together():
        completions = client.submit([request(i, i + 1) for i in range(2, 7)])
        assert all(c.done() for c in completions)
    assert [answer(c) for c in completions] == [[i, i + 1] for i in range(2, 7)]
    assert threading.current_thread().name in engine.threads


def test_other_threads_leave_it_to_the_slot(engine: Watched, client: BatchingEngineClient) -> None:
    assert answer(client.submit([request(7)])[0]) == [7]
    assert threading.current_thread().name not in engine.threads


def test_more_than_a_thread_serves_itself_goes_on_in_the_slot(
    client: BatchingEngineClient,
) -> None:
    with together():
        completions = client.submit([request(i) for i in range(100, 164)])
    assert [answer(c) for c in completions] == [[i] for i in range(100, 164)]


def test_a_bad_item_fails_alone(client: BatchingEngineClient) -> None:
    with together():
        good, bad, last = client.submit([request(20), request(BAD), request(21)])
    assert answer(good) == [20]
    assert answer(last) == [21]
    assert bad.error() is not None
    with together():  # it was quarantined or fails again; the others are served either way
        good, bad = client.submit([request(22), request(BAD)])
    assert answer(good) == [22]
    with pytest.raises((InvalidArgument, Exception)):
        answer(bad)


def test_many_threads_at_once(engine: Watched, client: BatchingEngineClient) -> None:
    wrong: list[object] = []

    def run(number: int) -> None:
        for i in range(150):
            ids = [1000 * number + 10 * i + k for k in range(3)]
            if i % 3:
                with together():
                    completions = client.submit([request(*ids)])
            else:
                completions = client.submit([request(*ids)])
            if answer(completions[0]) != ids:
                wrong.append(ids)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(t.is_alive() for t in threads)
    assert not wrong
    assert engine.clashes == 0


class Held(Watched):
    """Runs once it may."""

    def __init__(self, spec: EngineSpec) -> None:
        super().__init__(spec)
        self.may = threading.Event()

    def execute(self, inputs: Any) -> Any:
        assert self.may.wait(10)
        return super().execute(inputs)


def test_what_an_answer_leads_to_is_not_run_by_the_thread_that_answers() -> None:
    """The next batch of the slot waits for that thread, which would wait for itself."""
    policy = BatchPolicy(max_batch_size=2, max_queue_delay_s=60.0)
    options = {"answer": "echo", "base_s": 0.0}
    engine = Held(EngineSpec("m", 1, "deterministic", "", "tokens", options=options, policy=policy))
    engine.load()
    client = BatchingEngineClient([engine], hop_s=0.0, here_s=60.0)
    asked: list[Completion] = []
    done = threading.Event()

    def ask_again(_: Completion) -> None:
        while not client._intake._idle:  # the slot's own thread is out of the way
            time.sleep(0.001)
        asked.extend(client.submit([request(5)]))
        done.set()

    # One that fills a batch, and one that waits for more: so the first is answered elsewhere.
    first, second = client.submit([request(2, 3), request(4)])
    first.add_done_callback(ask_again)
    engine.may.set()
    assert done.wait(10), "the thread that answers waits for itself"
    assert [answer(c) for c in (first, second, *asked)] == [[2, 3], [4], [5]]
    client.close(5.0)
