"""From a rate and a latency target to replicas and a policy, by simulation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from forebay_server.capacity.cost import CostModel
from forebay_server.capacity.simulation import Call, Outcome, Routing, Scenario, simulate
from forebay_server.core.interfaces import BatchPolicy

#: Calls that one simulation goes through, at least: its p99 rests on a hundredth of them.
CALLS = 20_000
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
    low, high = 0.0, 1.05 * peak(cost, policy, target.calls, target.slots, target.call_s)
    for _ in range(9):
        rate = (low + high) / 2
        if _keeps(_run(target, cost, policy, rate, 1), target):
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
    replicas = max(1, int(-(-rate // able)))
    # A balancer that looks at queues makes several replicas better than each alone: try fewer.
    while replicas > 1:
        fewer = replicas - max(1, replicas // 20)
        if not _keeps(_share(target, cost, policy, rate, fewer), target):
            break
        replicas = fewer
    out = _share(target, cost, policy, target.rate, replicas)
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
                for t in (256, 512, 1024, 2048, 4096, 8192)
                if t >= longest
            ]
        else:
            out += [
                replace(policy, max_batch_size=n, max_queue_delay_s=delay)
                for n in (16, 64, 256, 1024)
            ]
    return [policy, *(p for p in out if p != policy)]


def best(target: Target, cost: CostModel, policies: Sequence[BatchPolicy]) -> list[Plan]:
    """Plans with these policies, the cheapest first; among equals the one with the lower p99."""
    found = [p for p in (plan(target, cost, one) for one in policies) if p is not None]
    return sorted(found, key=lambda p: (p.replicas, p.p99_s))


def _share(
    target: Target, cost: CostModel, policy: BatchPolicy, rate: float, replicas: int
) -> Outcome:
    together = min(replicas, TOGETHER)
    return _run(target, cost, policy, rate * together / replicas, together)


def _run(
    target: Target, cost: CostModel, policy: BatchPolicy, rate: float, replicas: int
) -> Outcome:
    seconds = max(CALLS / rate, 40 * target.p99_s)
    scenario = Scenario(
        rate,
        target.calls,
        cost,
        policy,
        replicas,
        target.slots,
        call_s=target.call_s,
        routing=target.routing,
    )
    return simulate(scenario, seconds)


def _keeps(out: Outcome, target: Target) -> bool:
    return out.refused == 0 and out.quantile(0.99) <= target.p99_s
