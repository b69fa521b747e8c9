"""The batcher's promises: every request is answered once, and a fault stays with its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from forebay.errors import (
    Cancelled,
    DeadlineExceeded,
    ForebayError,
    Internal,
    InvalidArgument,
    QueueFull,
    Unavailable,
)
from forebay_server.core.batcher import BatchingEngineClient, BatchReport
from forebay_server.core.interfaces import (
    BatchPolicy,
    Completion,
    EngineRequest,
    EngineSpec,
    Item,
    TokenInput,
)
from forebay_server.dataplane.models import located
from forebay_server.engines.deterministic import DeterministicEngine

BAD, KILLER, STUCK = 13, 666, 99


class Gate:
    """Stands for the time that a batch takes: each run stops here until it is let through."""

    def __init__(self) -> None:
        self._runs = threading.Semaphore(0)
        self._passes = threading.Semaphore(0)

    def __call__(self, seconds: float) -> None:
        self._runs.release()
        assert self._passes.acquire(timeout=10)

    def running(self) -> None:
        assert self._runs.acquire(timeout=10), "no batch was started"

    def idle(self) -> bool:
        return not self._runs.acquire(blocking=False)

    def let(self, runs: int = 1) -> None:
        self._passes.release(runs)


class Bench:
    """Makes clients, and closes them at the end."""

    def __init__(self) -> None:
        self.now = 0.0
        self.reports: list[BatchReport] = []
        self._clients: list[BatchingEngineClient] = []
        self._gates: list[Gate] = []

    def client(
        self,
        gate: Gate | None = None,
        policy: BatchPolicy | None = None,
        engines: int = 1,
        more: dict[str, Any] | None = None,
        **options: Any,
    ) -> BatchingEngineClient:
        made = []
        for _ in range(engines):
            options = {"answer": "echo", "base_s": 1.0 if gate else 0.0} | options
            spec = EngineSpec(
                "m",
                1,
                "deterministic",
                "",
                "tokens",
                options=options,
                policy=policy or BatchPolicy(),
            )
            engine = DeterministicEngine(spec, gate) if gate else DeterministicEngine(spec)
            engine.load()
            made.append(engine)
        if gate is not None:
            self._gates.append(gate)
        kwargs: dict[str, Any] = {"wait": lambda s: None} | (more or {})
        client = BatchingEngineClient(made, lambda: self.now, self.reports.append, **kwargs)
        self._clients.append(client)
        return client

    def close(self) -> None:
        for gate in self._gates:
            gate.let(1000)
        for client in self._clients:
            client.close(5.0)


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.close()


def item(*ids: int) -> Item:
    return Item(TokenInput(np.array(ids, np.int64)), len(ids))


def send(client: BatchingEngineClient, *items: Item, **kwargs: Any) -> Completion:
    return client.submit([EngineRequest(list(items), **kwargs)])[0]


def end(completion: Completion) -> BaseException | None:
    """Wait for the answer; gives the error."""
    done = threading.Event()
    completion.add_done_callback(lambda _: done.set())
    assert done.wait(10), "a caller was left waiting"
    return completion.error()


def ids(completion: Completion) -> list[list[int]]:
    assert end(completion) is None
    return [r.tolist() for r in completion.result()]  # type: ignore[union-attr]


def reason(completion: Completion) -> str:
    error = end(completion)
    assert isinstance(error, ForebayError)
    return error.reason


def test_concurrent_callers_get_every_item_once_and_in_order(bench: Bench) -> None:
    policy = BatchPolicy(max_batch_tokens=64, max_batch_size=7, max_queue_size=100_000)
    client = bench.client(policy=policy, engines=2)
    calls: list[int] = []

    def caller(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(40):
            items = [
                item(*rng.integers(1000, 2000, rng.integers(1, 30)))
                for _ in range(rng.integers(1, 20))
            ]
            completion = send(client, *items)
            completion.add_done_callback(lambda c: calls.append(id(c)))
            assert ids(completion) == [i.inputs.ids.tolist() for i in items]  # type: ignore[union-attr]

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(caller, range(8)))
    assert len(calls) == 320
    assert client.stats()["statistics"].success.count == 320
    assert all(r.padded_tokens <= 64 or r.rows == 1 for r in bench.reports)


def test_items_that_arrive_while_the_engine_runs_make_one_batch(bench: Bench) -> None:
    gate = Gate()
    client = bench.client(gate)
    first = send(client, item(1))
    gate.running()
    rest = [send(client, item(n)) for n in range(2, 12)]
    gate.let(2)
    assert [ids(c) for c in (first, *rest)] == [[[n]] for n in range(1, 12)]
    assert [r.rows for r in bench.reports] == [1, 10]


def test_a_partial_batch_is_not_cut_early(bench: Bench) -> None:
    gate = Gate()
    client = bench.client(gate, BatchPolicy(max_batch_size=4), more={"hop_s": 0.0})
    first = send(client, item(1))
    gate.running()
    early = [send(client, item(n)) for n in (2, 3)]
    late = [send(client, item(n)) for n in (4, 5)]
    gate.let(2)
    assert [ids(c) for c in (first, *early, *late)] == [[[n]] for n in range(1, 6)]
    assert [r.rows for r in bench.reports] == [1, 4]


def test_batches_prepared_ahead_and_finished_elsewhere_are_answered(bench: Bench) -> None:
    client = bench.client(policy=BatchPolicy(max_batch_size=4), more={"hop_s": 0.0})
    for round_ in range(20):
        sent = [send(client, *[item(round_, n, k) for k in range(5)]) for n in range(20)]
        assert [ids(c) for c in sent] == [[[round_, n, k] for k in range(5)] for n in range(20)]


def test_an_idle_slot_takes_work_while_another_runs(bench: Bench) -> None:
    gate = Gate()
    client = bench.client(gate, engines=2)
    one = send(client, item(1))
    gate.running()
    two = send(client, item(2))
    gate.running()
    gate.let(2)
    assert (ids(one), ids(two)) == ([[1]], [[2]])


@pytest.mark.parametrize("stage", ["prepare", "execute"])
def test_a_poisoned_item_fails_alone_and_is_refused_afterwards(bench: Bench, stage: str) -> None:
    gate = Gate()
    client = bench.client(gate, fail_on=BAD, fail_in=stage)
    plug = send(client, item(1))
    gate.running()
    good = [send(client, item(n)) for n in range(100, 120)]
    bad = send(client, item(5), item(6, BAD), item(7))
    gate.let(1000)
    assert end(plug) is None
    assert [ids(c) for c in good] == [[[n]] for n in range(100, 120)]
    assert reason(bad) == "ITEM_FAILED"
    assert isinstance(bad.error(), Internal)
    assert bad.failed_item == 1
    again = send(client, item(3), item(6, BAD))
    assert reason(again) == "ITEM_QUARANTINED"
    assert again.failed_item == 1
    assert ids(send(client, item(5))) == [[5]]


def test_an_input_that_the_engine_refuses_keeps_its_own_error(bench: Bench) -> None:
    client = bench.client(reject_on=BAD)
    bad = send(client, item(1), item(BAD))
    assert isinstance(end(bad), InvalidArgument)
    assert "must not hold 13" in str(bad.error())
    assert bad.failed_item == 1
    again = send(client, item(BAD))  # it is known by now; the path is said once all the same
    assert reason(again) == "ITEM_QUARANTINED"
    for refused in (bad, again):
        error = located(refused.error() or RuntimeError(), "texts[1]")
        assert error.message == "texts[1]: must not hold 13"


def test_when_all_items_of_a_batch_fail_none_is_quarantined(bench: Bench) -> None:
    client = bench.client(fail_on=BAD)
    assert reason(send(client, item(BAD, 1), item(BAD, 2))) == "ITEM_FAILED"
    assert client.quarantine.empty


def test_quarantine_ends(bench: Bench) -> None:
    client = bench.client(fail_on=BAD)
    assert reason(send(client, item(BAD))) == "ITEM_FAILED"
    assert reason(send(client, item(BAD))) == "ITEM_QUARANTINED"
    bench.now += 301.0
    assert reason(send(client, item(BAD))) == "ITEM_FAILED"


def test_a_bug_in_finish_fails_the_batch_and_the_next_is_served(bench: Bench) -> None:
    client = bench.client(fail_on=BAD, fail_in="finish")
    assert isinstance(end(send(client, item(BAD))), Internal)
    assert ids(send(client, item(2))) == [[2]]


def test_a_callback_and_an_observer_that_raise_hurt_nobody(bench: Bench) -> None:
    gate = Gate()
    client = bench.client(gate)

    def observer(report: BatchReport) -> None:
        raise RuntimeError("the metrics are full")

    for slot in client._slots:
        slot._observer = observer
    plug = send(client, item(1))
    gate.running()
    rude, polite = send(client, item(2)), send(client, item(3))
    rude.add_done_callback(lambda c: 1 / 0)
    gate.let(1000)
    assert (ids(plug), ids(rude), ids(polite)) == ([[1]], [[2]], [[3]])


def test_a_dead_engine_fails_its_batch_only_and_comes_back(bench: Bench) -> None:
    gate, waits = Gate(), []
    client = bench.client(
        gate,
        BatchPolicy(max_batch_size=2),
        die_on=KILLER,
        load_failures=3,
        more={"wait": waits.append},
    )
    plug = send(client, item(1))
    gate.running()
    doomed = [send(client, item(KILLER)), send(client, item(2))]
    queued = [send(client, item(n)) for n in range(3, 9)]
    gate.let(1000)
    assert end(plug) is None
    assert [reason(c) for c in doomed] == ["ENGINE_DIED"] * 2
    error = doomed[0].error()
    assert isinstance(error, Unavailable)
    assert error.retry_after_s
    assert [ids(c) for c in queued] == [[[n]] for n in range(3, 9)]
    assert waits == sorted(waits)
    assert len(waits) == 3
    assert client.stats()["statistics"].restarts == 1
    # The innocent one runs alone and is acquitted; the killer kills alone and is refused then.
    assert ids(send(client, item(2))) == [[2]]
    assert reason(send(client, item(KILLER))) == "ENGINE_DIED"
    assert reason(send(client, item(KILLER))) == "ITEM_QUARANTINED"


def test_copies_of_a_killer_that_wait_take_nobody_with_them(bench: Bench) -> None:
    gate = Gate()
    client = bench.client(gate, BatchPolicy(max_batch_size=2), die_on=KILLER)
    plug = send(client, item(1))
    gate.running()
    killers = [send(client, item(KILLER)) for _ in range(4)]
    good = [send(client, item(n)) for n in (10, 11, 12)]
    gate.let(1000)
    assert end(plug) is None
    assert [reason(k) for k in killers] == ["ENGINE_DIED"] * 3 + ["ITEM_QUARANTINED"]
    assert [ids(c) for c in good] == [[[10]], [[11]], [[12]]]


def test_an_engine_that_stays_away_fails_what_waits_in_the_end(bench: Bench) -> None:
    client = bench.client(die_on=KILLER, load_failures=12)
    both = client.submit([EngineRequest([item(KILLER)]), EngineRequest([item(1)])])
    assert [reason(c) for c in both] == ["ENGINE_DIED"] * 2


def test_cancelled_before_the_cut_never_runs(bench: Bench) -> None:
    gate = Gate()
    client = bench.client(gate)
    plug = send(client, item(1))
    gate.running()
    gone, kept = send(client, item(2), item(3)), send(client, item(4))
    gone.cancel()
    assert isinstance(end(gone), Cancelled)
    assert client.stats()["queue_depth"] == 1
    gate.let(2)
    assert (ids(plug), ids(kept)) == ([[1]], [[4]])
    assert [r.rows for r in bench.reports] == [1, 1]
    assert client.stats()["statistics"].cancelled == 1


def test_cancelled_while_it_runs_keeps_its_cancellation(bench: Bench) -> None:
    gate = Gate()
    client = bench.client(gate)
    one = send(client, item(1))
    gate.running()
    one.cancel()
    gate.let()
    assert ids_after(client, gate) == [[2]]
    assert isinstance(one.error(), Cancelled)


def ids_after(client: BatchingEngineClient, gate: Gate) -> list[list[int]]:
    completion = send(client, item(2))
    gate.let()
    return ids(completion)


def test_a_deadline_passes_while_the_engine_is_busy(bench: Bench) -> None:
    gate = Gate()
    client = bench.client(gate)
    plug = send(client, item(1))
    gate.running()
    late, kept = send(client, item(2), deadline=5.0), send(client, item(3), deadline=50.0)
    bench.now = 6.0
    client.wake()
    error = end(late)  # before the engine is free
    assert isinstance(error, DeadlineExceeded)
    assert error.stage == "queue"
    gate.let(2)
    assert (ids(plug), ids(kept)) == ([[1]], [[3]])
    assert [r.rows for r in bench.reports] == [1, 1]


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(bench: Bench) -> None:
    gate = Gate()
    client = bench.client(gate, BatchPolicy(max_queue_size=3))
    plug = send(client, item(1))
    gate.running()
    waiting = send(client, item(2), item(3), item(4))
    client.statistics.tokens_per_second = 100.0  # known, as after a batch
    refused = send(client, item(5))
    error = refused.error()
    assert isinstance(error, QueueFull)
    assert error.retry_after_s
    assert error.holds_s == 0, "only who asks first knows that it holds for others"
    asked = client.refusal(None)
    assert isinstance(asked, QueueFull) and asked.holds_s > 0
    gate.let(2)
    assert (end(plug), end(waiting)) == (None, None)
    assert client.stats()["statistics"].rejected == 2


def test_requests_without_items_or_rows_are_refused(bench: Bench) -> None:
    client = bench.client()
    assert isinstance(end(send(client)), InvalidArgument)
    assert isinstance(
        end(send(client, Item(TokenInput(np.array([1])), 1, rows=0))), InvalidArgument
    )


def test_close_serves_what_waits_and_refuses_the_rest(bench: Bench) -> None:
    gate = Gate()
    client = bench.client(gate, BatchPolicy(max_batch_size=2))
    plug = send(client, item(1))
    gate.running()
    waiting = [send(client, item(n)) for n in range(2, 8)]
    closer = threading.Thread(target=client.close)
    closer.start()
    while not client._intake.closing.wait(10):
        pytest.fail("close did not begin")
    assert reason(send(client, item(9))) == "DRAINING"
    gate.let(1000)
    closer.join(10)
    assert not closer.is_alive()
    assert [ids(c) for c in (plug, *waiting)] == [[[n]] for n in range(1, 8)]


def test_close_leaves_nobody_waiting_for_an_engine_that_hangs(bench: Bench) -> None:
    client = bench.client(policy=BatchPolicy(max_batch_size=1), hang_on=STUCK)
    stuck, behind = client.submit([EngineRequest([item(STUCK)]), EngineRequest([item(1)])])
    client.close(0.05)
    assert (reason(stuck), reason(behind)) == ("DRAINING", "DRAINING")


def test_one_slot_that_is_down_does_not_close_the_door(bench: Bench) -> None:
    given_up, stop = threading.Event(), threading.Event()
    tries: list[int] = []

    def revive(engine: Any) -> None:
        tries.append(1)
        if len(tries) < 20:
            raise RuntimeError("not yet")
        given_up.set()
        assert stop.wait(10)
        engine.load()

    client = bench.client(engines=2, die_on=KILLER, more={"revive": revive})
    assert reason(send(client, item(KILLER))) == "ENGINE_DIED"
    assert given_up.wait(10)
    assert ids(send(client, item(1))) == [[1]]
    client.check_health()
    stop.set()


def test_a_batch_prepared_for_an_engine_that_died_is_prepared_again(bench: Bench) -> None:
    gate = Gate()
    more = {"hop_s": 0.0}
    client = bench.client(gate, BatchPolicy(max_batch_size=2), more=more, die_on=KILLER)
    plug = send(client, item(1))
    gate.running()
    killer = send(client, item(KILLER), item(2))
    sent = [send(client, item(n)) for n in range(10, 20)]
    gate.let(1000)
    assert end(plug) is None
    assert reason(killer) == "ENGINE_DIED"
    assert [ids(c) for c in sent] == [[[n]] for n in range(10, 20)]
    assert client.stats()["statistics"].fail.count == 1
    assert not any(client.quarantine.verdict(item(n)) for n in range(10, 20))
