"""Conditions, payloads and vectors between the contract's messages and the data plane."""

from __future__ import annotations

import math
from typing import Any

from forebay.errors import InvalidArgument
from forebay.v1 import collection_pb2 as pb
from google.protobuf.struct_pb2 import Struct, Value

from forebay_server.indexes import filters as f


def to_python(value: Value) -> Any:
    """A JSON value."""
    kind = value.WhichOneof("kind")
    if kind == "struct_value":
        return to_dict(value.struct_value)
    if kind == "list_value":
        return [to_python(v) for v in value.list_value.values]
    if kind == "number_value":
        number = value.number_value
        return int(number) if number.is_integer() and abs(number) < 2**53 else number
    return getattr(value, kind) if kind not in (None, "null_value") else None


def to_dict(struct: Struct, path: str = "") -> dict[str, Any]:
    """A JSON object. Raises InvalidArgument at `path` for numbers that JSON has not."""
    out = {key: to_python(value) for key, value in struct.fields.items()}
    if path:
        _check_numbers(out, path)
    return out


def _check_numbers(value: Any, path: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise InvalidArgument.at(path, f"is {value}; a finite number is needed")
    if isinstance(value, dict):
        for key, inner in value.items():
            _check_numbers(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            _check_numbers(inner, f"{path}[{i}]")


def condition(message: pb.Filter, path: str = "filter", depth: int = 0) -> f.Filter:
    """The condition of a message. Raises InvalidArgument with the path of what is wrong."""
    if depth > f.MAX_DEPTH:
        raise InvalidArgument.at(path, f"is nested deeper than {f.MAX_DEPTH} levels")
    kind = message.WhichOneof("condition")
    if kind is None:
        raise InvalidArgument.at(path, "has no condition")
    at = f"{path}.{kind}"
    m: Any = getattr(message, kind)
    if kind in ("all_of", "any_of", "none_of"):
        inner = tuple(
            condition(c, f"{at}.filters[{i}]", depth + 1) for i, c in enumerate(m.filters)
        )
        return {"all_of": f.AllOf, "any_of": f.AnyOf, "none_of": f.NoneOf}[kind](inner)
    if kind == "equals":
        return f.OneOf(m.key, (_scalar(m.value, f"{at}.value"),))
    if kind == "one_of":
        return f.OneOf(
            m.key, tuple(_scalar(v, f"{at}.values[{i}]") for i, v in enumerate(m.values))
        )
    if kind == "range":
        return _range(m, at)
    if kind == "date":
        if not m.HasField("from") and not m.HasField("until"):
            raise InvalidArgument.at(at, "needs from or until")
        since = getattr(m, "from").ToNanoseconds() / 1e9 if m.HasField("from") else -math.inf
        until = m.until.ToNanoseconds() / 1e9 if m.HasField("until") else math.inf
        return f.DateRange(m.key, since, until)
    if kind == "exists":
        return f.Exists(m.key)
    if kind == "text":
        return f.Words(m.key, m.text, m.phrase)
    return f.Ids(frozenset(m.ids))


def _scalar(value: Value, path: str) -> tuple[str, f.Scalar]:
    kind = value.WhichOneof("kind")
    if kind not in ("number_value", "string_value", "bool_value"):
        raise InvalidArgument.at(path, "must be a number, string or boolean")
    return f.tagged(getattr(value, kind))


def _range(m: pb.RangeFilter, path: str) -> f.InRange:
    if m.HasField("gt") and m.HasField("gte"):
        raise InvalidArgument.at(f"{path}.gt", "and gte exclude each other")
    if m.HasField("lt") and m.HasField("lte"):
        raise InvalidArgument.at(f"{path}.lt", "and lte exclude each other")
    low = m.gt if m.HasField("gt") else m.gte if m.HasField("gte") else -math.inf
    high = m.lt if m.HasField("lt") else m.lte if m.HasField("lte") else math.inf
    if low == -math.inf and high == math.inf:
        raise InvalidArgument.at(path, "needs at least one of gt, gte, lt and lte")
    return f.InRange(m.key, low, high, m.HasField("gt"), m.HasField("lt"))
