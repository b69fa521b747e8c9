"""Arithmetic on a run's records: medians over rounds, ratios round by round, targets."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

METRICS = ("rps", "p50_ms", "p90_ms", "p99_ms", "server_cpu_us", "client_cpu_us")
ROLES = {"forebay": 0, "peer": 1, "limit": 2}


@dataclass(frozen=True)
class Point:
    """One door of one server under so many callers: figures of every round."""

    workload: str
    server: str
    config: str
    role: str
    door: str
    callers: int
    rounds: dict[int, dict[str, float]]

    @property
    def transport(self) -> str:
        """ "grpc" or "http"."""
        return self.door.split()[0].lower()

    @property
    def label(self) -> str:
        """Server and configuration."""
        return f"{self.server} {self.config}".strip()

    def median(self, metric: str) -> float:
        """Over the rounds."""
        return statistics.median(r[metric] for r in self.rounds.values())

    def spread(self, metric: str) -> tuple[float, float]:
        """Least and largest of the rounds."""
        values = [r[metric] for r in self.rounds.values()]
        return min(values), max(values)


def points(records: Iterable[dict[str, Any]]) -> list[Point]:
    """The measured points; records without figures (faults, memory) are left out."""
    found: dict[tuple[Any, ...], Point] = {}
    for r in records:
        if "rps" not in r:
            continue
        key = tuple(r[k] for k in ("workload", "server", "config", "role", "door", "callers"))
        point = found.setdefault(key, Point(*key, {}))
        point.rounds[r["round"]] = {m: r[m] for m in METRICS}
    return sorted(found.values(), key=lambda p: (p.workload, ROLES[p.role]))


def bare(records: Iterable[dict[str, Any]], group: str, what: str) -> dict[int, float]:
    """By round: the mean of what the bare model gave before and after Forebay."""
    rounds: dict[int, list[float]] = {}
    for r in records:
        if r.get("group") == group and "bare" in r and what in r:
            rounds.setdefault(r["round"], []).append(r[what])
    return {n: statistics.mean(v) for n, v in rounds.items()}


def by_round(point: Point, metric: str) -> dict[int, float]:
    """A metric's values."""
    return {n: r[metric] for n, r in point.rounds.items()}


def ratios(above: dict[int, float], below: dict[int, float]) -> list[float]:
    """Round by round, where both were measured."""
    return [above[n] / below[n] for n in sorted(above.keys() & below.keys()) if below[n]]


def best(found: Iterable[Point], metric: str = "rps") -> Point | None:
    """The one with the largest median rate, or the smallest latency."""
    listed = list(found)
    if not listed:
        return None
    pick: Callable[..., Point] = max if metric == "rps" else min
    return pick(listed, key=lambda p: p.median(metric))


@dataclass(frozen=True)
class Target:
    """One line of "must be shown".

    Attributes:
        values: of each round; empty where something is missing.
        bound: what the median must reach, or stay below.
        least: whether the bound is a lower one.
        beside: what it was compared with.
    """

    number: str
    text: str
    values: Sequence[float]
    bound: float
    least: bool = True
    beside: str = ""

    @property
    def value(self) -> float | None:
        """The median of the rounds."""
        return statistics.median(self.values) if self.values else None

    @property
    def verdict(self) -> str:
        """met, SHORT or not measured."""
        if self.value is None:
            return "not measured"
        met = self.value >= self.bound if self.least else self.value <= self.bound
        return "met" if met else "SHORT"


def targets(records: Sequence[dict[str, Any]]) -> list[Target]:
    """The speed targets, as far as the records reach."""
    all_points = points(records)

    def pick(workload: str, callers: int, role: str, transport: str = "") -> list[Point]:
        return [
            p
            for p in all_points
            if p.workload == workload
            and p.callers == callers
            and p.role == role
            and transport in ("", p.transport)
        ]

    def own(workload: str, callers: int, door: str, server: str = "forebay") -> Point | None:
        found = pick(workload, callers, "forebay")
        return next((p for p in found if p.door == door and p.server == server), None)

    def against(
        number: str, text: str, mine: Point | None, other: Point | None, bound: float,
        metric: str = "rps", least: bool = True, mine_metric: str = "",
    ) -> Target:  # fmt: skip
        values: list[float] = []
        if mine and other:
            values = ratios(by_round(mine, mine_metric or metric), by_round(other, metric))
        beside = f"{other.label}, {other.door}" if other else ""
        return Target(number, text, values, bound, least, beside)

    out: list[Target] = []
    grpc = pick("tabular", 64, "peer", "grpc")
    every = pick("tabular", 64, "peer")
    floor = next((p for p in pick("tabular", 64, "limit") if "8 floats" in p.door), None)
    for door in ("gRPC Predict", "gRPC ModelInfer"):
        mine, lone = own("tabular", 64, door), own("tabular", 1, door)
        say = f"tabular, {door}, 64 callers: "
        out += [
            against("1", say + "rate to the best peer's gRPC", mine, best(grpc), 10),
            against("1", say + "rate to the best peer's best door", mine, best(every), 7),
            against("1", say + "rate to the bare Rust echo", mine, floor, 0.5),
            against(
                "1", say + "its p99 to the least p50 of any peer", mine, best(every, "p50_ms"),
                1, "p50_ms", False, "p99_ms",
            ),
            against(
                "1", f"tabular, {door}, one caller: p50 to the best peer's gRPC", lone,
                best(pick("tabular", 1, "peer", "grpc"), "p50_ms"), 0.5, "p50_ms", False,
            ),
        ]  # fmt: skip
    mine = own("embed-20", 64, "gRPC Embed")
    loop = bare(records, "embed", "32 x 20")
    values = ratios(by_round(mine, "rps"), loop) if mine else []
    say = "embedding, 20 tokens, gRPC, 64 callers: "
    out.append(Target("2", say + "rate to the bare loop", values, 0.97, beside="bare ONNX Runtime"))
    default = own("embed-20", 64, "gRPC Embed", "forebay, default profile")
    peer = best(pick("embed-20", 64, "peer"))
    out += [
        against("2", say + "default profile to the best peer", default or mine, peer, 1.8),
        against(
            "2", "embedding, mixed lengths, gRPC, 64 callers: rate to the best peer, same precision",
            own("embed-mixed", 64, "gRPC Embed"), best(pick("embed-mixed", 64, "peer")), 1.5,
        ),
    ]  # fmt: skip
    alone = bare(records, "embed", "one_ms")
    for number, door, bound in (("3", "gRPC Embed", 0.3), ("3", "HTTP REST embed", 1.0)):
        lone = own("embed-20", 1, door)
        over = by_round(lone, "p50_ms") if lone else {}
        values = [over[n] - alone[n] for n in sorted(over.keys() & alone.keys())]
        text = f"embedding, 20 tokens, {door}, one caller: p50 above the bare call, ms"
        out.append(Target(number, text, values, bound, False, "bare ONNX Runtime"))
    infinity = best(p for p in pick("embed-20", 64, "peer") if p.server == "infinity")
    out.append(
        against(
            "4", "OpenAI /v1/embeddings, 20 tokens, 64 callers: rate to infinity",
            own("embed-20", 64, "HTTP /v1/embeddings"), infinity, 1,
        )
    )  # fmt: skip
    http = best(pick("tabular", 64, "peer", "http"))
    for door in ("HTTP REST predict", "HTTP /v2 infer"):
        mine = own("tabular", 64, door)
        text = f"tabular, {door}, 64 callers: rate to the best peer's HTTP"
        out.append(against("4", text, mine, http, 1))
    return out
