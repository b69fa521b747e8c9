"""Medians, ratios round by round, and the table of targets."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.peers import figures


def record(
    number: int,
    server: str,
    door: str,
    rps: float,
    *,
    workload: str = "tabular",
    callers: int = 64,
    role: str = "peer",
    config: str = "",
    p50: float = 10.0,
    p99: float = 20.0,
) -> dict[str, Any]:
    """A measured point of one round."""
    return {
        "round": number,
        "group": workload.partition("-")[0],
        "server": server,
        "config": config,
        "role": role,
        "workload": workload,
        "door": door,
        "callers": callers,
        "calls": 1,
        "rps": rps,
        "p50_ms": p50,
        "p90_ms": p99,
        "p99_ms": p99,
        "server_cpu_us": 1.0,
        "client_cpu_us": 1.0,
    }


def target(records: list[dict[str, Any]], text: str) -> figures.Target:
    (found,) = (t for t in figures.targets(records) if t.text == text)
    return found


def test_a_point_gathers_its_rounds() -> None:
    records = [record(n, "a", "gRPC X", rps) for n, rps in enumerate((5.0, 1.0, 3.0))]
    (point,) = figures.points([*records, {"round": 0, "fault": "no"}, {"absent": "b"}])
    assert point.median("rps") == 3
    assert point.spread("rps") == (1, 5)
    assert point.transport == "grpc"


def test_ratios_pair_rounds_and_leave_out_lone_ones() -> None:
    assert figures.ratios({0: 10.0, 1: 30.0, 2: 7.0}, {0: 5.0, 1: 10.0}) == [2, 3]


def test_the_bare_limit_of_a_round_is_the_mean_of_before_and_after() -> None:
    records = [
        {"round": 0, "group": "embed", "bare": "before", "32 x 20": 300.0},
        {"round": 0, "group": "embed", "bare": "after", "32 x 20": 500.0},
        {"round": 1, "group": "tabular", "bare": "before", "batch 1": 9.0},
    ]
    assert figures.bare(records, "embed", "32 x 20") == {0: 400}


def test_the_best_peer_is_the_best_of_its_configurations() -> None:
    records = [
        record(0, "forebay", "gRPC Predict", 1000, role="forebay"),
        record(0, "slow", "gRPC ModelInfer", 10),
        record(0, "fast", "gRPC ModelInfer", 50, config="w1"),
        record(0, "fast", "gRPC ModelInfer", 80, config="w2"),
        record(0, "web", "HTTP /predict", 200),
    ]
    by_grpc = target(records, "tabular, gRPC Predict, 64 callers: rate to the best peer's gRPC")
    assert by_grpc.value == pytest.approx(12.5)
    assert by_grpc.beside == "fast w2, gRPC ModelInfer"
    assert by_grpc.verdict == "met"
    by_any = target(records, "tabular, gRPC Predict, 64 callers: rate to the best peer's best door")
    assert by_any.value == pytest.approx(5)
    assert by_any.verdict == "SHORT"


def test_tail_latency_is_held_against_the_least_median_latency_of_any_peer() -> None:
    records = [
        record(0, "forebay", "gRPC Predict", 1000, role="forebay", p99=6.0),
        record(0, "a", "gRPC ModelInfer", 10, p50=8.0),
        record(0, "b", "HTTP /predict", 99, p50=5.0),
    ]
    found = target(
        records, "tabular, gRPC Predict, 64 callers: its p99 to the least p50 of any peer"
    )
    assert found.value == pytest.approx(6 / 5)
    assert found.verdict == "SHORT"


def test_one_caller_is_held_to_the_bare_call_by_difference() -> None:
    records = [
        record(
            0, "forebay", "gRPC Embed", 9, workload="embed-20", callers=1, role="forebay", p50=4.5
        ),
        {"round": 0, "group": "embed", "bare": "before", "one_ms": 4.25},
    ]
    text = "embedding, 20 tokens, gRPC Embed, one caller: p50 above the bare call, ms"
    found = target(records, text)
    assert found.value == pytest.approx(0.25)
    assert found.verdict == "met"


def test_what_was_not_measured_is_said_so() -> None:
    assert {t.verdict for t in figures.targets([])} == {"not measured"}
