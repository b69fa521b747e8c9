"""What many calls leave behind is passed on as one list, at the end or when it should not wait."""

from __future__ import annotations

from forebay_server.core.collector import Collector, pass_on, together


def test_values_come_as_one_list_when_the_outermost_is_left() -> None:
    seen: list[list[int]] = []
    add = Collector(seen.append).add
    add(0)
    with together():
        add(1)
        with together():
            add(2)
        assert seen == [[0]]
    assert seen == [[0], [1, 2]]


def test_what_should_not_wait_is_passed_on_and_once_only() -> None:
    seen: list[list[int]] = []
    add = Collector(seen.append).add
    pass_on()
    with together():
        add(1)
        pass_on()
        assert seen == [[1]]
        add(2)
    assert seen == [[1], [2]]
