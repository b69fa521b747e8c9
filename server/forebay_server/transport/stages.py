"""The cross-cutting stages in the order of `standard_stages`: see pipeline.py for how they run."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Sequence

from forebay.errors import ForebayError

from forebay_server.access.budgets import Budgets
from forebay_server.access.keys import KeyStore, Limits, require_scope
from forebay_server.access.limits import Limiter, LimitSpent
from forebay_server.access.usage import UsageKey, UsageLedger
from forebay_server.core.call import ANONYMOUS, Call, Principal
from forebay_server.observability.logs import ACCESS
from forebay_server.observability.metrics import Metrics
from forebay_server.observability.tracing import Tracer, new_request_id, parse_traceparent
from forebay_server.transport.pipeline import Stage

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
#: Codes of calls that were refused before any work.
REFUSALS = ("RESOURCE_EXHAUSTED", "UNAUTHENTICATED", "PERMISSION_DENIED")
#: Codes that are the server's fault, and so errors in the log; the rest are the caller's.
OUR_FAULTS = ("INTERNAL", "UNKNOWN", "DATA_LOSS", "UNIMPLEMENTED")


class Tracing:
    """Request ids and spans."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    def begin(self, calls: Sequence[Call]) -> None:
        """Take the caller's ids, or make some."""
        for call in calls:
            given = call.metadata.get("x-request-id")
            good = given is not None and _REQUEST_ID.fullmatch(given)
            call.request_id = given if given and good else new_request_id()
            call.trailers.append(("x-request-id", call.request_id))
            parent = call.metadata.get("traceparent")
            trace = parse_traceparent(parent) if parent else None
            if trace is not None:
                call.context["trace"] = trace
            if self._tracer.enabled:
                span = self._tracer.start(call.method.path.lstrip("/"), trace)
                span.set_attribute("rpc.system", "grpc")
                span.set_attribute("rpc.service", call.method.service)
                span.set_attribute("rpc.method", call.method.name)
                call.context["span"] = span

    def end(self, calls: Sequence[Call]) -> None:
        """Close the spans with what is known of the calls."""
        if not self._tracer.enabled:
            return
        for call in calls:
            self._close(call)

    def _close(self, call: Call) -> None:
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
        self._metrics.rpc.started(call.method.path for call in calls)

    def end(self, calls: Sequence[Call]) -> None:
        """Observe durations and outcomes."""
        now = self._clock()
        self._metrics.rpc.ended(
            (call.method.path, call.code or "UNKNOWN", now - call.started) for call in calls
        )
        items: dict[str, int] = {}
        tokens: dict[str, int] = {}
        for call in calls:
            if call.code == "OK":
                f = call.facts
                if f.items:
                    items[f.model] = items.get(f.model, 0) + f.items
                if f.tokens:
                    tokens[f.model] = tokens.get(f.model, 0) + f.tokens
            elif call.code in REFUSALS and call.error:
                self._metrics.rejected.labels(call.error.reason).inc()
        for model, n in items.items():
            self._metrics.items.labels(model).inc(n)
        for model, n in tokens.items():
            self._metrics.tokens.labels(model).inc(n)


class AccessLog:
    """One line a call, at its end."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._log = logging.getLogger(ACCESS)

    def begin(self, calls: Sequence[Call]) -> None:
        """Nothing to say yet."""

    def end(self, calls: Sequence[Call]) -> None:
        """Write the lines: the server's faults as errors, all else as information."""
        if self._log.isEnabledFor(logging.INFO):
            now = self._clock()
            lines = [self._fields(c, now) for c in calls if c.code not in OUR_FAULTS]
            if lines:
                self._log.info("", extra={"lines": lines})
        for call in calls:
            if call.code in OUR_FAULTS and self._log.isEnabledFor(logging.ERROR):
                cause = call.error.__cause__ if call.error is not None else None
                info = (type(cause), cause, cause.__traceback__) if cause else None
                lines = [self._fields(call, self._clock())]
                self._log.error("", extra={"lines": lines}, exc_info=info)

    def _fields(self, call: Call, now: float) -> dict[str, object]:
        f = call.facts
        fields: dict[str, object] = {
            "method": call.method.path,
            "code": call.code,
            "ms": round((now - call.started) * 1e3, 3),
            "request_id": call.request_id,
            "key": call.principal.key_id,
            "peer": call.peer,
        }
        if f.model:
            fields["model"] = f"{f.model}@{f.version}"
            fields["items"] = f.items
            fields["tokens"] = f.tokens
            fields["cached"] = f.cached
            fields["queue_ms"] = round(f.queue_s * 1e3, 3)
            fields["batch_rows"] = f.batch_rows
        if call.context.get("user"):
            fields["user"] = call.context["user"]
        trace = call.context.get("trace")
        if trace is not None:
            fields["trace_id"] = trace.trace_id  # type: ignore[attr-defined]
        if call.error is not None:
            fields["reason"] = call.error.reason
            fields["error"] = call.error.message[:500]
        return fields


class UsageRecording:
    """Every call of an inference method, once, whatever its end."""

    def __init__(self, ledger: UsageLedger) -> None:
        self._ledger = ledger

    def begin(self, calls: Sequence[Call]) -> None:
        """Nothing to count yet."""

    def end(self, calls: Sequence[Call]) -> None:
        """Append the calls' counters, before their answers are sent."""
        sums: dict[UsageKey, list[float]] = {}
        for call in calls:
            if call.method.scope != "infer":
                continue
            f = call.facts
            user = call.context.get("user")
            key: UsageKey = (call.principal.key_id, f.model, f.version)
            if user:
                key = (*key[:3], str(user))
            total = sums.get(key)
            if total is None:
                total = sums[key] = [0, 0, 0, 0, 0, 0, 0.0, 0.0]
            total[0] += 1
            total[1] += f.items
            total[2] += f.tokens
            total[3] += f.cached
            if call.code == "CANCELLED":
                total[5] += 1
            elif call.code != "OK":
                total[4] += 1
            total[6] += f.engine_s * 1e3
            total[7] += call.context.get("cost", 0.0)  # type: ignore[operator]
        if sums:
            self._ledger.record(sums)


class Authentication:
    """Who calls, and whether the key holds the method's scope."""

    def __init__(self, keys: KeyStore) -> None:
        self._keys = keys

    def begin(self, calls: Sequence[Call]) -> None:
        """Set the principal, or end the call."""
        known: dict[str, Principal] = {}  # one look at a key, however many of its calls came
        for call in calls:
            if call.method.scope == "public":
                continue
            given = call.metadata.get("authorization", "")
            try:
                principal = known.get(given)
                if principal is None:
                    principal = known[given] = self._keys.authenticate(given) or ANONYMOUS
                call.principal = principal
                require_scope(principal, call.method.scope)
            except ForebayError as e:
                call.fail(e)

    def end(self, calls: Sequence[Call]) -> None:
        """Nothing was opened."""


class Admission:
    """The limits of keys."""

    def __init__(self, keys: KeyStore, limiter: Limiter, budgets: Budgets) -> None:
        self._keys = keys
        self._limiter = limiter
        self._budgets = budgets

    def begin(self, calls: Sequence[Call]) -> None:
        """Take the key's permits, or end the call."""
        for call in calls:
            if call.method.scope == "public":
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

    def end(self, calls: Sequence[Call]) -> None:
        """Give the permits back, and take what was used from the tokens' bucket."""
        for call in calls:
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
