"""W3C trace context and OpenTelemetry spans. Without an exporter a call costs a few string checks."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

#: Version 00 ends after the flags; later versions may go on after another dash; ff is no version.
_TRACEPARENT = re.compile(
    r"(?:00-(?=.{52}$)|(?!00|ff)[0-9a-f]{2}-)"
    r"([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(?:$|-.*)"
)


@dataclass(frozen=True, slots=True)
class TraceContext:
    """Ids as lower-case hexadecimal; `sampled` is the caller's wish."""

    trace_id: str
    parent_id: str
    sampled: bool

    def header(self) -> str:
        """The `traceparent` for calls further on."""
        return f"00-{self.trace_id}-{self.parent_id}-{int(self.sampled):02x}"


def parse_traceparent(value: str | None) -> TraceContext | None:
    """The caller's trace context; None when there is none or it is malformed."""
    if not value:
        return None
    match = _TRACEPARENT.fullmatch(value)
    if match is None or set(match[1]) == {"0"} or set(match[2]) == {"0"}:
        return None
    return TraceContext(match[1], match[2], bool(int(match[3], 16) & 1))


_PROCESS = secrets.token_hex(8)
_numbers = count(secrets.randbits(32))


def new_request_ids(count: int) -> list[str]:
    """Each 128 bits as hexadecimal: 64 random ones of this process, and a number."""
    return [f"{_PROCESS}{n:016x}" for n in islice(_numbers, count)]


class Tracer:
    """Spans, exported by OTLP where an endpoint is set."""

    def __init__(self, endpoint: str = "", exporter: Any = None) -> None:
        self._tracer: Any = None
        self._provider: Any = None
        if not endpoint and exporter is None:
            return
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor

        self._provider = TracerProvider(resource=Resource.create({"service.name": "forebay"}))
        if exporter is not None:
            self._provider.add_span_processor(SimpleSpanProcessor(exporter))
        else:
            try:
                from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import (  # type: ignore[import-not-found]
                    OTLPSpanExporter,
                )
            except ImportError:
                raise RuntimeError(
                    "observability.otlp_endpoint is set; install forebay[otel] to export traces"
                ) from None

            self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
        self._tracer = self._provider.get_tracer("forebay")

    @property
    def enabled(self) -> bool:
        """Whether spans go anywhere."""
        return self._tracer is not None

    def start(self, name: str, parent: TraceContext | None) -> Any:
        """A server span, child of the caller's where there is one."""
        from opentelemetry import trace

        context = None
        if parent is not None:
            context = trace.set_span_in_context(
                trace.NonRecordingSpan(
                    trace.SpanContext(
                        int(parent.trace_id, 16),
                        int(parent.parent_id, 16),
                        is_remote=True,
                        trace_flags=trace.TraceFlags(int(parent.sampled)),
                    )
                )
            )
        return self._tracer.start_span(name, context=context, kind=trace.SpanKind.SERVER)

    def close(self) -> None:
        """Export what waits."""
        if self._provider is not None:
            self._provider.shutdown()
