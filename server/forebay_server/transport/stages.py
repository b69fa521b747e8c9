"""The cross-cutting stages in the order of `standard_stages`: see pipeline.py for how they run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence

from forebay.errors import ForebayError

from forebay_server.access.budgets import SPENDING, Budgets
from forebay_server.access.keys import KeyStore, Limits, require_scope
from forebay_server.access.limits import Limiter
from forebay_server.access.usage import UsageKey, UsageLedger
from forebay_server.core.call import ANONYMOUS, Call, Principal
from forebay_server.observability.logs import ACCESS, AccessLines, access_record
from forebay_server.observability.metrics import Metrics
from forebay_server.observability.tracing import Tracer, new_request_ids, parse_traceparent
from forebay_server.transport.pipeline import REQUEST_ID, Stage, given_id

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
        enabled = self._tracer.enabled
        for call, request_id in zip(calls, new_request_ids(len(calls)), strict=True):
            given = given_id(call) if REQUEST_ID in call.metadata else ""
            call.request_id = given or request_id
            parent = call.metadata.get("traceparent")
            trace = parse_traceparent(parent) if parent else None
            if trace is not None:
                call.note("trace", trace)
            if enabled:
                span = self._tracer.start(call.method.path.lstrip("/"), trace)
                span.set_attribute("rpc.system", "grpc")
                span.set_attribute("rpc.service", call.method.service)
                span.set_attribute("rpc.method", call.method.name)
                call.note("span", span)

    def end(self, runs: Sequence[Sequence[Call]]) -> None:
        """Close the spans with what is known of the calls."""
        if not self._tracer.enabled:
            return
        for run in runs:
            for call in run:
                self._close(call)

    def _close(self, call: Call) -> None:
        span = call.context.get("span")
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
        self._metrics.rpc.started([call.method.path for call in calls])

    def end(self, runs: Sequence[Sequence[Call]]) -> None:
        """Observe durations and outcomes."""
        now = self._clock()
        self._count((run[0], [now - c.started for c in run]) for run in runs)

    def answered(self, like: Call, seconds: Sequence[float]) -> None:
        """Calls like this one were answered by the transport; how long each took."""
        self._metrics.leased.labels(like.method.path).inc(len(seconds))
        self._metrics.rpc.started({like.method.path: len(seconds)})
        self._count([(like, seconds)])

    def _count(self, runs: Iterable[tuple[Call, Sequence[float]]]) -> None:
        """Runs: the first call, and the seconds of each."""
        durations: dict[tuple[str, str], list[float]] = {}
        items: dict[str, int] = {}
        tokens: dict[str, int] = {}
        for first, took in runs:
            code = first.code or "UNKNOWN"
            durations.setdefault((first.method.path, code), []).extend(took)
            if code == "OK":
                f = first.facts
                if f.items:
                    items[f.model] = items.get(f.model, 0) + f.items * len(took)
                if f.tokens:
                    tokens[f.model] = tokens.get(f.model, 0) + f.tokens * len(took)
            elif code in REFUSALS and first.error:
                self._metrics.rejected.labels(first.error.reason).inc(len(took))
        for (path, code), seconds in durations.items():
            self._metrics.rpc.ended(path, code, seconds)
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

    def end(self, runs: Sequence[Sequence[Call]]) -> None:
        """Write the lines: the server's faults as errors, all else as information."""
        now = self._clock()
        if self._log.isEnabledFor(logging.INFO):
            lines = []
            for run in runs:
                if run[0].code in OUR_FAULTS:
                    continue
                each = [(round((now - c.started) * 1e3, 3), c.request_id, c.peer) for c in run]
                lines.append(AccessLines(self._shared(run[0]), each))
            if lines:
                self._log.handle(access_record(lines))
        for call in (c for run in runs if run[0].code in OUR_FAULTS for c in run):
            if self._log.isEnabledFor(logging.ERROR):
                cause = call.error.__cause__ if call.error is not None else None
                info = (type(cause), cause, cause.__traceback__) if cause else None
                each = [(round((now - call.started) * 1e3, 3), call.request_id, call.peer)]
                lines = [AccessLines(self._shared(call), each)]
                self._log.error("", extra={"access": lines}, exc_info=info)

    def answered(self, like: Call, each: str) -> None:
        """Calls like this one were answered by the transport; `each` as AccessLines has it."""
        if self._log.isEnabledFor(logging.INFO):
            self._log.handle(access_record([AccessLines(self._shared(like), each)]))

    def _shared(self, call: Call) -> dict[str, object]:
        """What calls of a run say alike."""
        f = call.facts
        fields: dict[str, object] = {
            "method": call.method.path,
            "code": call.code,
            "key": call.principal.key_id,
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

    def end(self, runs: Sequence[Sequence[Call]]) -> None:
        """Append the calls' counters, before their answers are sent."""
        sums: dict[UsageKey, list[float]] = {}
        for run in runs:
            call, n = run[0], len(run)
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
            total[0] += n
            total[1] += f.items * n
            total[2] += f.tokens * n
            total[3] += f.cached * n
            if call.code == "CANCELLED":
                total[5] += n
            elif call.code != "OK":
                total[4] += n
            total[6] += f.engine_s * 1e3 * n
            total[7] += call.context.get("cost", 0.0)  # type: ignore[operator]
        if sums:
            self._ledger.record(sums)


def bearer(call: Call) -> str:
    """What a call says of who makes it, as `authorization` does."""
    given = call.metadata.get("authorization") or ""
    if not given and (key := call.metadata.get("x-api-key")):
        given = f"Bearer {key}"  # as Anthropic's clients send it
    return given


class Authentication:
    """Who calls, and whether the key holds the method's scope."""

    def __init__(self, keys: KeyStore) -> None:
        self._keys = keys

    def begin(self, calls: Sequence[Call]) -> None:
        """Set the principal, or end the call."""
        # One look at a key, however many of its calls came.
        known: dict[tuple[str, str], Principal] = {}
        for call in calls:
            scope = call.method.scope
            if scope == "public":
                continue
            given = bearer(call)
            principal = known.get((given, scope))
            if principal is not None:
                call.principal = principal
                continue
            try:
                principal = self._keys.authenticate(given) or ANONYMOUS
                call.principal = principal
                require_scope(principal, scope)
            except ForebayError as e:
                call.fail(e)
                continue
            known[given, scope] = principal

    def end(self, runs: Sequence[Sequence[Call]]) -> None:
        """Nothing was opened."""


class Admission:
    """The limits of keys, and of their budgets what the methods themselves do not see to."""

    def __init__(self, keys: KeyStore, limiter: Limiter, budgets: Budgets) -> None:
        self._keys = keys
        self._limiter = limiter
        self._budgets = budgets

    def begin(self, calls: Sequence[Call]) -> None:
        """Take the keys' permits, or end the calls: the youngest of a key's, when not all fit."""
        by_key: dict[str, list[Call]] = {}
        for call in calls:
            if call.method.scope != "public":
                by_key.setdefault(call.principal.key_id, []).append(call)
        for key_id, own in by_key.items():
            limits = self._keys.limits(key_id)
            if limits is None:
                continue
            if limits.budget_tokens is not None:
                own = self._covered(key_id, limits, own)
            if not own or _without_budget(limits) == _NO_LIMITS:
                continue
            admitted = self._limiter.admit(key_id, limits, len(own))
            headers = tuple(admitted.standing.headers())
            for call in own:
                call.trailers = headers
            for call in own[: admitted.calls]:
                call.permit = limits
            for call in own[admitted.calls :]:
                assert admitted.refusal is not None
                call.fail(admitted.refusal)

    def _covered(self, key_id: str, limits: Limits, calls: list[Call]) -> list[Call]:
        """End the calls that take tokens where none are left; gives the others."""
        spending = [c for c in calls if c.method.path in SPENDING]
        refusal = self._budgets.refusal(key_id, limits) if spending else None
        if refusal is None:
            return calls
        for call in spending:
            call.fail(refusal)
        return [c for c in calls if c.code is None]

    def end(self, runs: Sequence[Sequence[Call]]) -> None:
        """Give the permits back, and take what was used from the tokens' bucket."""
        permits: dict[tuple[str, int], tuple[Limits, list[int]]] = {}
        for run in runs:
            first = run[0]
            if first.context or first.facts.tokens:
                for call in run:
                    self._budgets.settle(call)
            used = first.facts.tokens or first.facts.items
            used += first.context.get("part_tokens", 0)  # type: ignore[operator]  # language models
            for call in run:
                limits = call.permit
                if isinstance(limits, Limits):
                    key = (call.principal.key_id, id(limits))
                    permits.setdefault(key, (limits, []))[1].append(used)
        for (key_id, _), (limits, used) in permits.items():
            self._limiter.release(key_id, limits, sum(used), len(used))


_NO_LIMITS = Limits()


def _without_budget(limits: Limits) -> Limits:
    """The limits that the limiter knows; budgets are the Budgets' own."""
    return Limits(
        limits.requests_per_second,
        limits.burst,
        limits.tokens_per_minute,
        limits.max_concurrency,
    )


#: How many of the standard stages only watch: tracing, metrics, access log.
WATCHING = 3


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
