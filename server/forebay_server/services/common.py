"""Pieces that inference services share: usage, timing and truncation in the contract's words."""

from __future__ import annotations

from collections.abc import Mapping

from forebay.errors import InvalidArgument
from forebay.v1 import common_pb2

from forebay_server.core.call import Call
from forebay_server.dataplane.tokenization import Truncate

_TRUNCATE: dict[int, Truncate] = {
    common_pb2.TRUNCATION_UNSPECIFIED: "end",
    common_pb2.TRUNCATION_END: "end",
    common_pb2.TRUNCATION_START: "start",
    common_pb2.TRUNCATION_NONE: "none",
}


def truncation(value: int) -> Truncate:
    """The data plane's word for the contract's enum."""
    return _TRUNCATE[value]


def served_by(call: Call) -> common_pb2.ServedBy:
    """The version that answered."""
    return common_pb2.ServedBy(model=call.facts.model, version=call.facts.version)


def usage(call: Call) -> common_pb2.Usage:
    """What the call consumed."""
    f = call.facts
    return common_pb2.Usage(items=f.items, tokens=f.tokens, truncated=f.truncated, cached=f.cached)


def timing(call: Call) -> common_pb2.Timing:
    """Where its time went."""
    f = call.facts
    return common_pb2.Timing(
        queue_ms=round(f.queue_s * 1e3, 3),
        compute_ms=round(f.compute_s * 1e3, 3),
        batch_rows=f.batch_rows,
    )


def exactly_one(**fields: object) -> str:
    """Name of the one field that is given; InvalidArgument when it is none or several."""
    given = [name for name, value in fields.items() if value]
    if len(given) == 1:
        return given[0]
    names = " and ".join(fields)
    raise InvalidArgument.at(
        given[1] if given else next(iter(fields)), f"exactly one of {names} must be given"
    )


def check_metadata(metadata: Mapping[str, str], path: str) -> None:
    """Facts of the caller's own: short names, short values."""
    for name, value in metadata.items():
        if len(name) > 64:
            raise InvalidArgument.at(path, f"the name {name[:64]!r}... has over 64 characters")
        if len(value) > 512:
            raise InvalidArgument.at(
                f"{path}.{name}", f"has {len(value)} characters; allowed are 512"
            )
