"""From a rate and a latency target to replicas and a policy, by simulation."""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace

from forebay_server.capacity.cost import CostModel
from forebay_server.capacity.simulation import Call, Routing, Scenario, Simulation
from forebay_server.core.interfaces import BatchPolicy

#: Calls that a plan's simulation goes through: its p99 rests on a hundredth of them. A step of the search
#: for a plan takes half of them.
CALLS = 20_000
#: It is as long as this many times the target's latency, so that an overload shows; not if that would
#: take more than twice the calls.
LATENCIES = 40
#: Steps in which the rate that one replica keeps is found: to a sixtieth of its peak.
HALVINGS = 6
#: Replicas that are simulated together; more behave as these, each with its share of the calls.
TOGETHER = 16


@dataclass(frozen=True, slots=True)
class Target:
    """What is asked for.

    Attributes:
        rate: calls a second.
        p99_s: latency that 99 of 100 calls keep.
        call_s: interpreter time of each call, see Scenario.
        headroom: share of the rate that comes on top, for bursts and a replica that is away.
    """

    rate: float
    p99_s: float
    calls: Sequence[Call]
    headroom: float = 0.2
    slots: int = 1
    call_s: float = 0.0
    routing: Routing = "two_choices"
    price_per_hour: float = 0.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What keeps the target with one policy. Times in seconds; `capacity` is calls a second at which
    one replica just keeps it."""

    policy: BatchPolicy
    replicas: int
    capacity: float
    p50_s: float
    p99_s: float
    utilisation: float
    batch_rows: float
    cost_per_hour: float
    cost_per_million: float


def peak(
    cost: CostModel,
    policy: BatchPolicy,
    calls: Sequence[Call],
    slots: int = 1,
    call_s: float = 0.0,
) -> float:
    """Calls a second of one replica when its queue never empties, by the model."""
    rates = []
    for call in calls:
        rows = max(1, min(policy.max_batch_size, policy.max_batch_tokens // max(1, call.length)))
        batch = cost.seconds(rows, call.length) * (1 + cost.contention * (slots - 1))
        rates.append((batch + cost.between_s) / rows * call.rows * call.items)
    each = sum(rates) / len(rates)
    return 1 / max(each / slots, call_s)


def capacity(target: Target, cost: CostModel, policy: BatchPolicy) -> float:
    """Calls a second at which one replica alone just keeps the target; 0 when it never does."""
    if max(cost.seconds(c.rows, c.length) for c in target.calls) > target.p99_s:
        return 0.0  # not even alone
    low, high = 0.0, peak(cost, policy, target.calls, target.slots, target.call_s)
    for _ in range(HALVINGS):
        rate = (low + high) / 2
        if _keeps(target, cost, policy, rate, 1):
            low = rate
        else:
            high = rate
    return low


def plan(target: Target, cost: CostModel, policy: BatchPolicy) -> Plan | None:
    """The least replicas with this policy; None when no number keeps the target."""
    able = capacity(target, cost, policy)
    if able <= 0:
        return None
    rate = target.rate * (1 + target.headroom)
    replicas = max(1, math.ceil(rate / able))
    # A balancer that looks at queues makes several replicas better than each alone: try fewer.
    least = math.ceil(rate / peak(cost, policy, target.calls, target.slots, target.call_s))
    while replicas > max(1, least):
        fewer = max(least, replicas - max(1, replicas // 20))
        if not _keeps(target, cost, policy, rate, fewer):
            break
        replicas = fewer
    while True:
        simulation, seconds = _simulation(target, cost, policy, target.rate, replicas, CALLS)
        out = simulation.run(seconds)
        if out.refused == 0 and out.quantile(0.99) <= target.p99_s:
            break
        replicas += max(1, replicas // 50)  # a step of the search saw less than this run
    hourly = replicas * target.price_per_hour
    return Plan(
        policy,
        replicas,
        able,
        out.quantile(0.5),
        out.quantile(0.99),
        out.utilisation,
        out.batch_rows,
        hourly,
        hourly / (target.rate * 3600 / 1e6),
    )


def candidates(policy: BatchPolicy, calls: Sequence[Call]) -> list[BatchPolicy]:
    """Policies worth trying around one: token budgets, or rows for tensors, and short delays."""
    longest = max(c.length for c in calls)
    out = []
    for delay in (0.0, 0.002):
        if longest > 1:
            out += [
                replace(policy, max_batch_tokens=t, max_queue_delay_s=delay)
                for t in (256, 1024, 4096)
                if t >= longest
            ]
        else:
            out += [
                replace(policy, max_batch_size=n, max_queue_delay_s=delay)
                for n in (16, 64, 256, 1024)
            ]
    return [policy, *(p for p in out if p != policy)]


def best(
    target: Target,
    cost: CostModel,
    policies: Sequence[BatchPolicy],
    done: Callable[[], None] = lambda: None,
) -> list[Plan]:
    """Plans with these policies, the cheapest first; among equals the one with the lower p99.

    A process for each core, as a simulation is Python alone. `done` is called as each is
    found.
    """
    found: list[Plan | None] = []
    if len(policies) == 1:
        found.append(plan(target, cost, policies[0]))
    else:
        workers = min(len(policies), os.cpu_count() or 1)
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            running = [pool.submit(plan, target, cost, p) for p in policies]
            for _ in as_completed(running):
                done()
            found += [one.result() for one in running]
    return sorted((p for p in found if p is not None), key=lambda p: (p.replicas, p.p99_s))


def _simulation(
    target: Target,
    cost: CostModel,
    policy: BatchPolicy,
    rate: float,
    replicas: int,
    calls: int,
) -> tuple[Simulation, float]:
    """Replicas with their share of the rate, and the seconds that are worth simulating."""
    together = min(replicas, TOGETHER)
    rate = rate * together / replicas
    scenario = Scenario(
        rate,
        target.calls,
        cost,
        policy,
        together,
        target.slots,
        call_s=target.call_s,
        routing=target.routing,
    )
    seconds = max(calls, min(2 * calls, rate * LATENCIES * target.p99_s)) / rate
    return Simulation(scenario), seconds


def _keeps(
    target: Target, cost: CostModel, policy: BatchPolicy, rate: float, replicas: int
) -> bool:
    simulation, seconds = _simulation(target, cost, policy, rate, replicas, CALLS // 2)
    out = simulation.run(seconds, p99_s=target.p99_s)
    return not out.gave_up and out.refused == 0 and out.quantile(0.99) <= target.p99_s
