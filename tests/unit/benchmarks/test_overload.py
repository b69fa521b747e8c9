"""When a server counts as recovered from an overload."""

from __future__ import annotations

from collections.abc import Collection

import pytest

from benchmarks.overload import recovery


def timeline(slow: Collection[int], refused: Collection[int] = ()) -> list[dict[str, float]]:
    """Ten seconds in tenths, from second 65 on."""
    return [
        {
            "at_s": 65 + i / 10,
            "offered": 10,
            "ok": 9 if i in refused else 10,
            "p50_ms": 500 if i in slow else 10,
            "p99_ms": 20,
        }
        for i in range(100)
    ]


@pytest.mark.parametrize(
    ("slow", "refused", "expected"),
    [
        ((), (), 0.0),
        ((0, 1), (2,), 0.3),
        ((0, 15), (), 1.6),
        ((0,), (79,), 0.1),
    ],
)
def test_recovered_is_who_answers_quickly_for_two_seconds(
    slow: Collection[int], refused: Collection[int], expected: float
) -> None:
    assert recovery(timeline(slow, refused), 65, 75) == pytest.approx(expected)


def test_who_refuses_every_other_second_has_not_recovered() -> None:
    assert recovery(timeline((), range(0, 100, 15)), 65, 75) is None
