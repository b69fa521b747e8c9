"""What ghz, openloop and wrk print becomes figures; a failed call is never a figure."""

from __future__ import annotations

import json

import pytest

from benchmarks.load import CallsFailed, parse_frames, parse_ghz, parse_wrk

GHZ = {
    "count": 200,
    "rps": 99.5,
    "statusCodeDistribution": {"OK": 200},
    "latencyDistribution": [
        {"percentage": 10, "latency": 1_000_000},
        {"percentage": 50, "latency": 2_500_000},
        {"percentage": 90, "latency": 4_000_000},
        {"percentage": 99, "latency": 9_000_000},
    ],
}
WRK = {
    "requests": 300,
    "duration_us": 2_000_000,
    "connect": 0,
    "read": 0,
    "write": 0,
    "status": 0,
    "timeout": 0,
    "p50_us": 1500,
    "p90_us": 2500,
    "p99_us": 12_000,
}


def test_ghz_nanoseconds_become_milliseconds() -> None:
    load = parse_ghz(json.dumps(GHZ))
    assert (load.calls, load.rps) == (200, 99.5)
    assert (load.p50_ms, load.p90_ms, load.p99_ms) == (2.5, 4.0, 9.0)


def test_a_call_that_ghz_saw_fail_raises_with_its_code() -> None:
    failed = {**GHZ, "statusCodeDistribution": {"OK": 199, "Unavailable": 1}}
    failed["errorDistribution"] = {"rpc error: code = Unavailable": 1}
    with pytest.raises(CallsFailed, match="Unavailable"):
        parse_ghz(json.dumps(failed))


def test_ghz_without_calls_raises() -> None:
    with pytest.raises(CallsFailed, match="no call"):
        parse_ghz(json.dumps({"count": 0, "rps": 0, "latencyDistribution": None}))


def frames(**codes: int) -> dict[str, object]:
    latency = {"percentiles_ms": {"50": 2.5, "90": 4.0, "99": 9.0}}
    return {
        "phases": [{"ok": codes.get("OK", 0), "ok_per_s": 99.5, "codes": codes, "latency": latency}]
    }


def test_a_closed_loop_of_frames_becomes_figures() -> None:
    load = parse_frames(frames(OK=200))
    assert (load.calls, load.rps) == (200, 99.5)
    assert (load.p50_ms, load.p90_ms, load.p99_ms) == (2.5, 4.0, 9.0)


@pytest.mark.parametrize("codes", [{"OK": 199, "UNAVAILABLE": 1}, {}])
def test_a_closed_loop_of_frames_with_a_failed_call_raises(codes: dict[str, int]) -> None:
    with pytest.raises(CallsFailed, match=r"UNAVAILABLE|no call"):
        parse_frames(frames(**codes))


def test_wrk_figures_are_found_below_its_own_report() -> None:
    text = (
        f"Running 2s test @ http://127.0.0.1\n  1 threads\nRequests/sec: 1\n\n{json.dumps(WRK)}\n"
    )
    load = parse_wrk(text)
    assert load.rps == 150
    assert (load.p50_ms, load.p90_ms, load.p99_ms) == (1.5, 2.5, 12.0)


@pytest.mark.parametrize("fault", ["connect", "read", "write", "status", "timeout"])
def test_an_error_that_wrk_counted_raises(fault: str) -> None:
    with pytest.raises(CallsFailed, match=fault):
        parse_wrk(json.dumps({**WRK, fault: 2}))
