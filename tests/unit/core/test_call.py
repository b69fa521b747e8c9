"""How a call ends when the client is gone, or its time is up."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import pytest
from forebay.errors import Cancelled, DeadlineExceeded
from forebay.methods import methods
from forebay_server.core.call import Call


@pytest.mark.parametrize("late", [False, True])
def test_work_that_is_stopped_ends_the_call_with_what_stopped_it(late: bool) -> None:
    ended: list[str | None] = []
    call = Call(
        methods()["/forebay.v1.EmbeddingService/Embed"],
        {},
        started=0.0,
        on_end=lambda c: ended.append(c.code),
    )
    # The work answers to its own cancellation before `cancel` comes to end the call.
    call.on_cancel(lambda: call.fail(Cancelled("the request was taken back")))
    call.cancel(DeadlineExceeded("the deadline passed", stage="server") if late else None)
    assert ended == ["DEADLINE_EXCEEDED" if late else "CANCELLED"]


@pytest.mark.parametrize("first", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("step", range(8))
def test_a_call_may_end_at_any_step_of_taking_a_hook(step: int, first: bool) -> None:
    """Another thread may cancel it between any two lines; `step`: before which."""
    call = Call(
        methods()["/forebay.v1.EmbeddingService/Embed"], {}, started=0.0, on_end=lambda c: None
    )
    if not first:
        call.on_cancel(lambda: None)
    lines = 0

    def watch(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal lines
        if frame.f_code is not Call.on_cancel.__code__:
            return None
        if event == "line":
            if lines == step:
                sys.settrace(None)
                call.cancel()
            lines += 1
        return watch

    stopped: list[bool] = []
    sys.settrace(watch)
    try:
        call.on_cancel(lambda: stopped.append(True))
    finally:
        sys.settrace(None)
    if not call.ended:  # there were fewer lines
        call.cancel()
    assert call.code == "CANCELLED"
    assert stopped
