"""Trace context by the W3C's rules, and real OpenTelemetry spans."""

from __future__ import annotations

import pytest
from forebay_server.observability.tracing import (
    TraceContext,
    Tracer,
    new_request_ids,
    parse_traceparent,
)
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def test_a_good_header_is_read_and_written_back() -> None:
    header = f"00-{TRACE}-{PARENT}-01"
    context = parse_traceparent(header)
    assert context == TraceContext(TRACE, PARENT, True)
    assert context.header() == header


def test_flags_of_later_days_are_read_by_their_first_bit() -> None:
    assert parse_traceparent(f"00-{TRACE}-{PARENT}-fe") == TraceContext(TRACE, PARENT, False)


def test_later_versions_may_be_longer() -> None:
    for tail in ("", "-more"):
        assert parse_traceparent(f"01-{TRACE}-{PARENT}-01{tail}") is not None


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "x",
        f"ff-{TRACE}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-01-more",
        f"01-{TRACE}-{PARENT}-01more",
        f"00-{TRACE.upper()}-{PARENT}-01",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE[1:]}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-01\n",
    ],
)
def test_a_bad_header_is_left_out(header: str | None) -> None:
    assert parse_traceparent(header) is None


def test_request_ids_are_unlike_each_other() -> None:
    assert len({*new_request_ids(1000), *new_request_ids(1), *new_request_ids(999)}) == 2000


def test_without_an_exporter_nothing_is_traced() -> None:
    assert not Tracer().enabled


def test_spans_join_the_callers_trace() -> None:
    exporter = InMemorySpanExporter()
    tracer = Tracer(exporter=exporter)
    assert tracer.enabled
    tracer.start("call", TraceContext(TRACE, PARENT, True)).end()
    tracer.start("alone", None).end()
    tracer.start("unsampled", TraceContext(TRACE, PARENT, False)).end()
    tracer.close()
    joined, alone = exporter.get_finished_spans()
    assert f"{joined.context.trace_id:032x}" == TRACE
    assert f"{joined.parent.span_id:016x}" == PARENT
    assert alone.parent is None
    assert joined.kind.name == "SERVER"
