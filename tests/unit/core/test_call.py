"""How a call ends when the client is gone, or its time is up."""

from __future__ import annotations

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
