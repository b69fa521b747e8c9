"""Domain errors and the one table that maps them to gRPC, HTTP and the OpenAI error object.

Raise these anywhere; only transports turn them into statuses. They carry a gRPC code by name and a
reason, never an HTTP status. The rich error model is google.rpc (error_details.proto); the HTTP
column follows google.rpc.Code's documented mapping, with 400 for FAILED_PRECONDITION.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from google.protobuf import duration_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

DOMAIN = "forebay"

#: gRPC code name -> (HTTP status, OpenAI error type). The only such table in the project.
HTTP_BY_CODE: Mapping[str, tuple[int, str]] = {
    "OK": (200, ""),
    "CANCELLED": (499, "request_cancelled"),
    "UNKNOWN": (500, "server_error"),
    "INVALID_ARGUMENT": (400, "invalid_request_error"),
    "DEADLINE_EXCEEDED": (504, "timeout_error"),
    "NOT_FOUND": (404, "invalid_request_error"),
    "ALREADY_EXISTS": (409, "conflict_error"),
    "PERMISSION_DENIED": (403, "permission_error"),
    "RESOURCE_EXHAUSTED": (429, "rate_limit_error"),
    "FAILED_PRECONDITION": (400, "invalid_request_error"),
    "ABORTED": (409, "conflict_error"),
    "OUT_OF_RANGE": (400, "invalid_request_error"),
    "UNIMPLEMENTED": (501, "invalid_request_error"),
    "INTERNAL": (500, "server_error"),
    "UNAVAILABLE": (503, "service_unavailable_error"),
    "DATA_LOSS": (500, "server_error"),
    "UNAUTHENTICATED": (401, "authentication_error"),
}

#: Reasons whose HTTP status differs from that of their gRPC code.
HTTP_BY_REASON: Mapping[str, int] = {"TOO_LARGE": 413}


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One bad field: its path from the request's root (`texts[3]`), what is wrong, what is allowed."""

    field: str
    description: str


class ForebayError(Exception):
    """Base of every error that a caller may see.

    Args:
        message: one sentence for the caller; says what to do. Never holds secrets or internals.
        reason: stable UPPER_SNAKE reason (google.rpc.ErrorInfo.reason).
        metadata: further facts for ErrorInfo.metadata.
        retry_after_s: seconds after which a retry may succeed (google.rpc.RetryInfo).
    """

    code: str = "INTERNAL"
    reason: str = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        if reason is not None:
            self.reason = reason
        self.metadata: dict[str, str] = dict(metadata or {})
        self.retry_after_s = retry_after_s

    def details(self) -> list[Message]:
        """The google.rpc detail messages of this error, ErrorInfo first."""
        out: list[Message] = [
            error_details_pb2.ErrorInfo(reason=self.reason, domain=DOMAIN, metadata=self.metadata)
        ]
        if self.retry_after_s is not None:
            delay = duration_pb2.Duration()
            delay.FromNanoseconds(int(self.retry_after_s * 1e9))
            out.append(error_details_pb2.RetryInfo(retry_delay=delay))
        return out

    def to_status(self) -> status_pb2.Status:
        """The google.rpc.Status that travels in `grpc-status-details-bin`."""
        status = status_pb2.Status(code=code_pb2.Code.Value(self.code), message=self.message)
        for detail in self.details():
            status.details.add().Pack(detail)
        return status


class InvalidArgument(ForebayError):
    """A bad field. Give every violation that was found, each with its path."""

    code = "INVALID_ARGUMENT"
    reason = "INVALID_ARGUMENT"

    def __init__(
        self,
        violations: Sequence[FieldViolation] | FieldViolation,
        *,
        message: str | None = None,
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.violations = (
            [violations] if isinstance(violations, FieldViolation) else list(violations)
        )
        text = message or "; ".join(f"{v.field}: {v.description}" for v in self.violations[:5])
        super().__init__(text, reason=reason, metadata=metadata)

    @property
    def description(self) -> str:
        """What is wrong, without the paths: for whoever knows a better one."""
        return "; ".join(v.description for v in self.violations[:5]) or self.message

    @classmethod
    def at(cls, path: str, description: str, **kwargs: str | None) -> InvalidArgument:
        """One violation at `path`."""
        return cls(FieldViolation(path, description), **kwargs)  # type: ignore[arg-type]

    def details(self) -> list[Message]:
        bad = error_details_pb2.BadRequest()
        for v in self.violations[:100]:
            bad.field_violations.add(field=v.field, description=v.description)
        return [*super().details(), bad]


class TooLarge(InvalidArgument):
    """An input above a size limit; says the limit and the size."""

    reason = "TOO_LARGE"

    def __init__(self, path: str, *, size: int, limit: int, unit: str) -> None:
        super().__init__(
            FieldViolation(path, f"has {size} {unit}; the limit is {limit} {unit}"),
            metadata={"size": str(size), "limit": str(limit), "unit": unit},
        )


class MessageTooLarge(ForebayError):
    """A message above gRPC's own limit, with the code that gRPC's libraries give it. Its reason tells it
    from a queue that is full: to send it again is of no use."""

    code = "RESOURCE_EXHAUSTED"
    reason = "TOO_LARGE"

    def __init__(self, limit: int) -> None:
        super().__init__(
            f"the message has more than {limit} bytes, which is the limit",
            metadata={"limit": str(limit), "unit": "bytes"},
        )


class Unauthenticated(ForebayError):
    """No key, or a key that is not known, revoked or expired."""

    code = "UNAUTHENTICATED"
    reason = "UNAUTHENTICATED"


class PermissionDenied(ForebayError):
    """A good key that lacks the scope, or may not use this model."""

    code = "PERMISSION_DENIED"
    reason = "PERMISSION_DENIED"


class NotFound(ForebayError):
    """An unknown resource; the message names the nearest known ones, else some that there are, or is
    one of its own."""

    code = "NOT_FOUND"
    reason = "NOT_FOUND"

    def __init__(
        self,
        kind: str,
        name: str,
        *,
        nearest: Sequence[str] = (),
        known: Sequence[str] = (),
        reason: str | None = None,
        message: str = "",
    ) -> None:
        hint = f" Known are {', '.join(known)}." if known else ""
        hint = f" Did you mean {', '.join(nearest)}?" if nearest else hint
        super().__init__(message or f"{kind} {name!r} was not found.{hint}", reason=reason)
        self.kind = kind
        self.name = name

    def details(self) -> list[Message]:
        info = error_details_pb2.ResourceInfo(
            resource_type=self.kind, resource_name=self.name, description=self.message
        )
        return [*super().details(), info]


class AlreadyExists(ForebayError):
    """A resource with that name is already there."""

    code = "ALREADY_EXISTS"
    reason = "ALREADY_EXISTS"


class FailedPrecondition(ForebayError):
    """The call is well formed but does not fit the state, e.g. WRONG_TASK or MODEL_REJECTED."""

    code = "FAILED_PRECONDITION"
    reason = "FAILED_PRECONDITION"


class Aborted(ForebayError):
    """A concurrent change won, or the same idempotency key is in progress."""

    code = "ABORTED"
    reason = "ABORTED"


@dataclass(frozen=True, slots=True)
class QuotaViolation:
    """What was exceeded, for QuotaFailure: `subject` as `key:<id>` or `model:<name>`."""

    subject: str
    description: str


class RateLimited(ForebayError):
    """A per-key limit or budget is spent."""

    code = "RESOURCE_EXHAUSTED"
    reason = "RATE_LIMITED"

    def __init__(
        self, message: str, *, violations: Sequence[QuotaViolation], retry_after_s: float
    ) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.violations = list(violations)

    def details(self) -> list[Message]:
        quota = error_details_pb2.QuotaFailure()
        for v in self.violations:
            quota.violations.add(subject=v.subject, description=v.description)
        return [*super().details(), quota]


class QueueFull(ForebayError):
    """The model's queue is at its bound; the caller should come back after `retry_after_s`."""

    code = "RESOURCE_EXHAUSTED"
    reason = "QUEUE_FULL"
    #: For so long all such calls would be refused as well; 0 = it says nothing of others. Excepted are
    #: those that have more time left than `within_s` (None: none are), and smaller ones if `by_size`.
    #: For some time after it, more than one in `gap_s` would be too many.
    holds_s: float = 0.0
    gap_s: float = 0.0
    within_s: float | None = None
    by_size: bool = False


class DeadlineExceeded(ForebayError):
    """Too late; `stage` says where the call ended: queue, prepare, execute, ..."""

    code = "DEADLINE_EXCEEDED"
    reason = "DEADLINE_EXCEEDED"

    def __init__(self, message: str, *, stage: str) -> None:
        super().__init__(message, metadata={"stage": stage})
        self.stage = stage

    @classmethod
    def during_call(cls) -> DeadlineExceeded:
        """Of a call that ends by its deadline before a stage could say so."""
        return cls("the deadline passed during the call", stage="server")


class Cancelled(ForebayError):
    """The client is gone or took the call back."""

    code = "CANCELLED"
    reason = "CANCELLED"


class Unavailable(ForebayError):
    """Not ready, draining, or the engine died: MODEL_NOT_READY, DRAINING, ENGINE_DIED."""

    code = "UNAVAILABLE"
    reason = "UNAVAILABLE"


class Unimplemented(ForebayError):
    """A feature this server or model does not have."""

    code = "UNIMPLEMENTED"
    reason = "UNIMPLEMENTED"


class Internal(ForebayError):
    """Our fault. The message is safe for strangers; the log holds the rest under the request id."""


@dataclass(frozen=True, slots=True)
class HttpError:
    """An error as HTTP doors show it."""

    status: int
    type: str
    reason: str
    message: str
    param: str | None = None
    retry_after_s: float | None = None
    violations: list[FieldViolation] = field(default_factory=list)


def http_error(status: status_pb2.Status) -> HttpError:
    """Project a google.rpc.Status onto HTTP by the table above."""
    code = code_pb2.Code.Name(status.code)
    http, kind = HTTP_BY_CODE[code]
    reason, retry, violations = code, None, []
    info = error_details_pb2.ErrorInfo()
    bad = error_details_pb2.BadRequest()
    delay = error_details_pb2.RetryInfo()
    for detail in status.details:
        if detail.Unpack(info):
            reason = info.reason
        elif detail.Unpack(bad):
            violations = [FieldViolation(v.field, v.description) for v in bad.field_violations]
        elif detail.Unpack(delay):
            retry = delay.retry_delay.ToNanoseconds() / 1e9
    return HttpError(
        status=HTTP_BY_REASON.get(reason, http),
        type=kind,
        reason=reason,
        message=status.message,
        param=violations[0].field if violations else None,
        retry_after_s=retry,
        violations=violations,
    )
