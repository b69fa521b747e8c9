"""The cross-cutting stages in the order of `standard_stages`: see pipeline.py for how they run."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Sequence

from forebay.errors import ForebayError, Unavailable

from forebay_server.access.budgets import Budgets
from forebay_server.access.keys import KeyStore, Limits, require_scope
from forebay_server.access.limits import Limiter, LimitSpent
from forebay_server.access.usage import UsageLedger
from forebay_server.core.call import ANONYMOUS, Call
from forebay_server.observability.logs import ACCESS
from forebay_server.observability.metrics import Metrics
from forebay_server.observability.tracing import Tracer, new_request_id, parse_traceparent
from forebay_server.transport.pipeline import Stage

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
#: Codes that are the server's fault, and so errors in the log; the rest are the caller's.
OUR_FAULTS = ("INTERNAL", "UNKNOWN", "DATA_LOSS", "UNIMPLEMENTED")


class Tracing:
    """Request ids and spans."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    def begin(self, calls: Sequence[Call]) -> None:
        """Take the caller's ids, or make some."""
        for call in calls:
            given = call.metadata.get("x-request-id", "")
            call.request_id = given if _REQUEST_ID.fullmatch(given) else new_request_id()
            call.trailers.append(("x-request-id", call.request_id))
            trace = parse_traceparent(call.metadata.get("traceparent"))
            if trace is not None:
                call.context["trace"] = trace
            if self._tracer.enabled:
                span = self._tracer.start(call.method.path.lstrip("/"), trace)
                span.set_attribute("rpc.system", "grpc")
                span.set_attribute("rpc.service", call.method.service)
                span.set_attribute("rpc.method", call.method.name)
                call.context["span"] = span

    def end(self, call: Call) -> None:
        """Close the span with what is known of the call."""
        span = call.context.pop("span", None)
        if span is None:
            return
        f = call.facts
        for name, value in (
            ("rpc.grpc.status", call.code or ""),
            ("gen_ai.request.model", f.model),
            ("gen_ai.usage.input_tokens", f.tokens),
            ("forebay.model.version", f.version),
            ("forebay.queue_ms", f.queue_s * 1e3),
            ("forebay.batch_rows", f.batch_rows),
        ):
            span.set_attribute(name, value)  # type: ignore[attr-defined]
        span.end()  # type: ignore[attr-defined]


class Measuring:
    """Metrics of calls."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float] = time.monotonic) -> None:
        self._metrics = metrics
        self._clock = clock

    def begin(self, calls: Sequence[Call]) -> None:
        """Count calls in progress."""
        for call in calls:
            self._metrics.call_started(call.method.path)

    def end(self, call: Call) -> None:
        """Observe duration and outcome."""
        code = call.code or "UNKNOWN"
        self._metrics.call_ended(call.method.path, code, self._clock() - call.started)
        if code in ("RESOURCE_EXHAUSTED", "UNAUTHENTICATED", "PERMISSION_DENIED") and call.error:
            self._metrics.rejected.labels(call.error.reason).inc()
        elif code == "OK" and call.facts.items:
            self._metrics.items.labels(call.facts.model).inc(call.facts.items)
            if call.facts.tokens:
                self._metrics.tokens.labels(call.facts.model).inc(call.facts.tokens)


class AccessLog:
    """One line a call, at its end."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._log = logging.getLogger(ACCESS)

    def begin(self, calls: Sequence[Call]) -> None:
        """Nothing to say yet."""

    def end(self, call: Call) -> None:
        """Write the line: the server's faults as errors, all else as information."""
        level = logging.ERROR if call.code in OUR_FAULTS else logging.INFO
        if not self._log.isEnabledFor(level):
            return
        f = call.facts
        fields: dict[str, object] = {
            "method": call.method.path,
            "code": call.code,
            "ms": round((self._clock() - call.started) * 1e3, 3),
            "request_id": call.request_id,
            "key": call.principal.key_id,
            "peer": call.peer,
        }
        if f.model:
            fields.update(
                model=f"{f.model}@{f.version}",
                items=f.items,
                tokens=f.tokens,
                cached=f.cached,
                queue_ms=round(f.queue_s * 1e3, 3),
                batch_rows=f.batch_rows,
            )
        if call.context.get("user"):
            fields["user"] = call.context["user"]
        trace = call.context.get("trace")
        if trace is not None:
            fields["trace_id"] = trace.trace_id  # type: ignore[attr-defined]
        if call.error is not None:
            fields["reason"] = call.error.reason
            fields["error"] = call.error.message[:500]
        cause = call.error.__cause__ if call.error is not None else None
        info = (
            (type(cause), cause, cause.__traceback__) if cause and level == logging.ERROR else None
        )
        self._log.log(level, "", extra={"fields": fields}, exc_info=info)


class UsageRecording:
    """Every call of an inference method, once, whatever its end."""

    def __init__(self, ledger: UsageLedger) -> None:
        self._ledger = ledger

    def begin(self, calls: Sequence[Call]) -> None:
        """Nothing to count yet."""

    def end(self, call: Call) -> None:
        """Append the call's counters, before its answer is sent."""
        if call.method.scope != "infer":
            return
        f = call.facts
        failed = call.code not in ("OK", "CANCELLED")
        self._ledger.record(
            call.principal.key_id,
            f.model,
            f.version,
            (
                1,
                f.items,
                f.tokens,
                f.cached,
                int(failed),
                int(call.code == "CANCELLED"),
                round(f.engine_s * 1e3, 3),
                call.context.get("cost", 0.0),  # type: ignore[arg-type]
            ),
        )


class Authentication:
    """Who calls, and whether the key holds the method's scope."""

    def __init__(self, keys: KeyStore) -> None:
        self._keys = keys

    def begin(self, calls: Sequence[Call]) -> None:
        """Set the principal, or end the call."""
        for call in calls:
            if call.method.scope == "public":
                continue
            try:
                principal = self._keys.authenticate(call.metadata.get("authorization", ""))
                call.principal = principal or ANONYMOUS
                require_scope(call.principal, call.method.scope)
            except ForebayError as e:
                call.fail(e)

    def end(self, call: Call) -> None:
        """Nothing was opened."""


class Admission:
    """Draining, and the limits of keys."""

    def __init__(self, keys: KeyStore, limiter: Limiter, budgets: Budgets) -> None:
        self._keys = keys
        self._limiter = limiter
        self._budgets = budgets
        self.draining = False

    def begin(self, calls: Sequence[Call]) -> None:
        """Take the key's permits, or end the call."""
        for call in calls:
            if call.method.scope == "public":
                continue
            if self.draining:
                call.fail(
                    Unavailable("the server is shutting down", reason="DRAINING", retry_after_s=1.0)
                )
                continue
            limits = self._keys.limits(call.principal.key_id)
            if limits is None or _without_budget(limits) == _NO_LIMITS:
                continue
            try:
                standing = self._limiter.acquire(call.principal.key_id, limits)
            except LimitSpent as e:
                call.trailers.extend(e.standing.headers())
                call.fail(e)
                continue
            call.context["permit"] = limits
            call.trailers.extend(standing.headers())

    def end(self, call: Call) -> None:
        """Give the permit back, and take what was used from the tokens' bucket."""
        self._budgets.settle(call)
        limits = call.context.pop("permit", None)
        if isinstance(limits, Limits):
            used = call.facts.tokens or call.facts.items
            self._limiter.release(call.principal.key_id, limits, used)


_NO_LIMITS = Limits()


def _without_budget(limits: Limits) -> Limits:
    """The limits that the limiter knows; budgets are the Budgets' own."""
    return Limits(
        limits.requests_per_second,
        limits.burst,
        limits.tokens_per_minute,
        limits.max_concurrency,
    )


def standard_stages(
    tracer: Tracer, metrics: Metrics, keys: KeyStore, admission: Admission, ledger: UsageLedger
) -> list[Stage]:
    """All stages, outermost first. Errors are mapped by the transport around all of them."""
    return [
        Tracing(tracer),
        Measuring(metrics),
        AccessLog(),
        UsageRecording(ledger),
        Authentication(keys),
        admission,
    ]
