"""The cost model, the simulation and the plans: against known truths."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from forebay_server.capacity.cost import CostModel, Sample, fit, quantiles
from forebay_server.capacity.planning import Target, best, candidates, capacity, peak, plan
from forebay_server.capacity.simulation import Call, Scenario, Simulation, simulate
from forebay_server.capacity.tuning import Candidate, Point, frontier, recommended
from forebay_server.core.interfaces import BatchPolicy

TEXTS = BatchPolicy(max_batch_tokens=1024, max_batch_size=32)
ALONE = BatchPolicy(max_batch_size=1)
TRUE = CostModel(0.001, 2e-5, 1e-4)


def measured(noise: float, outliers: int = 0) -> list[Sample]:
    rng = random.Random(1)
    out = [
        Sample(rows, length, TRUE.seconds(rows, length) * rng.lognormvariate(0, noise))
        for rows in (1, 2, 4, 8, 16, 32)
        for length in (8, 16, 32, 64, 128)
        for _ in range(10)
    ]
    out += [Sample(1, 8, 0.5) for _ in range(outliers)]
    return out


@pytest.mark.parametrize("outliers", [0, 6])
def test_a_fit_finds_the_costs_whatever_held_some_batches_up(outliers: int) -> None:
    found = fit(measured(0.05, outliers))
    for rows, length in ((1, 8), (8, 32), (32, 128)):
        assert found.seconds(rows, length) == pytest.approx(TRUE.seconds(rows, length), rel=0.05)
    assert found.error == pytest.approx(0.035, abs=0.02)


def test_no_term_gives_time_back() -> None:
    falling = [Sample(n, 1, 1 / n) for n in (1, 2, 4, 8)] * 3
    found = fit(falling)
    assert found.base_s >= 0
    assert found.per_row_s >= 0


def test_one_batch_is_no_fit() -> None:
    with pytest.raises(ValueError, match="too few"):
        fit([Sample(1, 1, 0.1)])


def test_models_survive_a_file(tmp_path: Path) -> None:
    made = fit(measured(0.1), [0.001, 0.002], {"model": "m"})
    path = tmp_path / "cost.json"
    path.write_text(made.to_json())
    assert CostModel.read(path) == made


def test_quantiles_keep_the_mean() -> None:
    values = [random.Random(3).expovariate(1) for _ in range(20_000)]
    kept = quantiles(values)
    assert sum(kept) / len(kept) == pytest.approx(sum(values) / len(values), rel=0.02)


@pytest.mark.parametrize(
    ("rows", "rows_of_an_item", "items"), [(1, 1, 1), (256, 256, 1), (257, 129, 2), (500, 250, 2)]
)
def test_a_table_rides_in_as_few_batches_as_take_it(
    rows: int, rows_of_an_item: int, items: int
) -> None:
    assert Call.of_table(rows, 256) == Call(1, rows_of_an_item, items)


@pytest.mark.parametrize(("load", "seconds"), [(0.3, 2000), (0.6, 1000), (0.8, 1000)])
def test_waiting_is_that_of_the_textbook_when_nothing_is_batched(
    load: float, seconds: float
) -> None:
    """M/D/1: the mean wait is load / (2 (1 - load)) service times."""
    service = 0.01
    cost = CostModel(service, 0.0)
    out = simulate(Scenario(load / service, [Call()], cost, ALONE, seed=5), seconds)
    mean = sum(out.waits) / len(out.waits)
    assert mean == pytest.approx(load / (2 * (1 - load)) * service, rel=0.08)
    assert out.utilisation == pytest.approx(load, rel=0.03)


def test_an_engine_takes_no_batch_while_it_answers() -> None:
    """M/D/1 of both times for those that wait; an answer's own time is in the overhead."""
    cost = CostModel(0.006, 0.0, between_s=0.004)
    assert peak(cost, ALONE, [Call()]) == pytest.approx(100)
    out = simulate(Scenario(60, [Call()], cost, ALONE, seed=5), 1000)
    mean = sum(out.waits) / len(out.waits)
    assert mean == pytest.approx(0.6 / (2 * 0.4) * 0.01, rel=0.08)
    took = [t - w for t, w in zip(out.latencies, out.waits, strict=True)]
    assert max(took) == pytest.approx(0.006)


@pytest.mark.parametrize("load", [0.3, 0.6])
def test_engines_on_one_processor_are_that_of_the_textbook(load: float) -> None:
    """M/G/1 with processor sharing: the mean latency is one service time / (1 - load)."""
    service = 0.01
    cost = CostModel(service, 0.0, contention=1.0)
    out = simulate(Scenario(load / service, [Call()], cost, ALONE, slots=64, seed=5), 1000)
    mean = sum(out.latencies) / len(out.latencies)
    assert mean == pytest.approx(service / (1 - load), rel=0.05)


def test_an_interpreter_that_reads_calls_holds_up_engines_on_its_processor() -> None:
    """M/D/1 at 0.3 before the engine; with contention the engine goes at half its pace meanwhile."""
    cost = CostModel(0.01, 0.0, contention=1.0, call_s=0.01)
    alone = simulate(Scenario(1, [Call()], cost, ALONE, call_s=cost.call_s, seed=5), 1000)
    assert alone.quantile(0.5) == pytest.approx(0.02, rel=0.01)
    busy = simulate(Scenario(30, [Call()], cost, ALONE, call_s=cost.call_s, seed=5), 500)
    free = CostModel(0.01, 0.0, contention=0.0, call_s=0.01)
    apart = simulate(Scenario(30, [Call()], free, ALONE, call_s=cost.call_s, seed=5), 500)
    assert apart.quantile(0.5) < 1.2 * alone.quantile(0.5)
    mean = [sum(o.latencies) / len(o.latencies) for o in (apart, busy)]
    assert 1.08 * mean[0] < mean[1] < 1.5 * mean[0]


def test_every_call_is_answered_once_and_batches_keep_their_bounds() -> None:
    seen: list[int] = []
    scenario = Scenario(800, [Call(20), Call(200)], TRUE, TEXTS, replicas=3, slots=2)
    out = Simulation(scenario, lambda at, replica, rows, seconds: seen.append(rows)).run(20, 0)
    assert len(out.latencies) == out.offered > 10_000
    assert out.refused == out.late == 0
    assert sum(seen) == out.offered
    assert max(seen) <= TEXTS.max_batch_size


def test_overload_with_deadlines_answers_what_it_can_in_time() -> None:
    able = peak(TRUE, TEXTS, [Call(20)])
    out = simulate(Scenario(3 * able, [Call(20)], TRUE, TEXTS, deadline_s=1.0), 30)
    assert out.answered * 3 > 0.9, "goodput falls under overload"
    assert max(out.latencies) < 1.0, "calls are answered after their deadline"
    assert out.refused > 0


def test_a_balancer_that_looks_at_queues_waits_less() -> None:
    able = peak(TRUE, TEXTS, [Call(20)])
    p99 = {
        routing: simulate(
            Scenario(8 * 0.7 * able, [Call(20)], TRUE, TEXTS, replicas=8, routing=routing), 20
        ).quantile(0.99)
        for routing in ("random", "two_choices")
    }
    assert p99["two_choices"] < 0.8 * p99["random"]


def test_the_interpreter_bounds_models_that_are_quicker_than_it() -> None:
    quick = CostModel(1e-6, 1e-6)
    fine = simulate(Scenario(15_000, [Call()], quick, TEXTS, call_s=5e-5), 2)
    assert fine.quantile(0.99) < 0.005
    over = simulate(Scenario(25_000, [Call()], quick, TEXTS, call_s=5e-5), 2)
    assert over.quantile(0.5) > 0.05


def test_a_run_gives_up_when_its_p99_is_lost_and_is_the_same_until_then() -> None:
    able = peak(TRUE, TEXTS, [Call(20)])
    over = Scenario(1.5 * able, [Call(20)], TRUE, TEXTS)
    whole, part = Simulation(over).run(20), Simulation(over).run(20, p99_s=0.1)
    assert part.gave_up
    assert not whole.gave_up
    assert len(part.latencies) < len(whole.latencies) / 2
    assert part.latencies == whole.latencies[: len(part.latencies)]
    kept = Scenario(0.5 * able, [Call(20)], TRUE, TEXTS)
    assert Simulation(kept).run(20, p99_s=0.1) == Simulation(kept).run(20)
    # Of a p99 that is just kept nothing is given up, whatever number of calls came.
    exact = Simulation(kept).run(20)
    assert not Simulation(kept).run(20, p99_s=exact.quantile(0.99)).gave_up


def test_a_plan_keeps_its_target_and_one_replica_less_does_not() -> None:
    target = Target(3000, 0.05, [Call(20)], headroom=0.0, routing="random", price_per_hour=0.5)
    found = plan(target, TRUE, TEXTS)
    assert found is not None
    assert found.p99_s <= 0.05
    assert found.cost_per_hour == found.replicas * 0.5
    assert found.cost_per_million == pytest.approx(found.cost_per_hour / 10.8)
    fewer = Scenario(
        3000, [Call(20)], TRUE, TEXTS, replicas=max(1, int(found.replicas * 0.75)), routing="random"
    )
    assert simulate(fewer, 10).quantile(0.99) > 0.05


@pytest.mark.parametrize("p99", [0.005, 0.5])
def test_what_a_plan_says_it_has_kept_in_its_own_run(p99: float) -> None:
    """Also where a short run of the search does not see that queues grow."""
    quick = CostModel(4e-5, 3.5e-6, call_s=4e-5)
    target = Target(200_000, p99, [Call()], headroom=0.0, call_s=quick.call_s)
    found = plan(target, quick, replace(TEXTS, max_batch_size=256))
    assert found is not None
    assert found.replicas >= 8, "fewer than the interpreters of so many calls"
    assert found.p99_s <= p99


def test_no_replicas_keep_a_target_below_one_batch() -> None:
    assert plan(Target(10, 0.001, [Call(200)]), TRUE, TEXTS) is None
    assert capacity(Target(10, 0.001, [Call(200)]), TRUE, TEXTS) == 0


@pytest.mark.slow
def test_better_policies_come_first() -> None:
    target = Target(2000, 0.1, [Call(n) for n in range(5, 257, 8)])
    tiny = replace(TEXTS, max_batch_tokens=256)
    assert len(candidates(TEXTS, target.calls)) > 5
    seen: list[int] = []
    found = best(target, CostModel(0.01, 0.0, 5e-5), [tiny, TEXTS], lambda: seen.append(1))
    assert len(found) == len(seen) == 2
    assert found[0].replicas <= found[-1].replicas
    assert found[0].policy.max_batch_tokens > 256


def point(tokens: int, callers: int, per_s: float, p50: float, p99: float) -> Point:
    candidate = Candidate(1, 2, replace(TEXTS, max_batch_tokens=tokens))
    return Point(candidate, callers, per_s, p50, p99, 1.0)


def test_what_is_recommended_is_quick_for_one_and_for_many() -> None:
    points = [
        point(256, 1, 100, 0.010, 0.01),
        point(256, 64, 400, 0.1, 0.20),
        point(512, 1, 100, 0.010, 0.01),
        point(512, 64, 395, 0.1, 0.15),  # alike in throughput, quicker
        point(1024, 1, 50, 0.020, 0.02),
        point(1024, 64, 500, 0.1, 0.10),  # the best under load, at a lone caller's cost
    ]
    assert recommended(points).policy.max_batch_tokens == 512
    assert [p.per_s for p in frontier(points)] == [100, 500]
