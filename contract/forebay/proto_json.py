"""Messages from JSON, by protobuf's own mapping; what is wrong is named by its path.

`json_format.ParseDict` says what it could not read in the words of Python, and seldom where. When it
refuses, the value is walked through beside the message's fields, and the first that does not fit is named.
A field in both its spellings, knowledge_base and knowledgeBase, is refused here: the library takes the last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, cast

from google.protobuf import duration_pb2, json_format, timestamp_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from forebay.errors import FieldViolation, InvalidArgument

_F = FieldDescriptor
_BITS = {
    _F.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    _F.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    _F.CPPTYPE_UINT32: (0, 2**32 - 1),
    _F.CPPTYPE_UINT64: (0, 2**64 - 1),
}
_MAX_FLOAT32 = 3.4028234663852886e38
_REFUSALS = (
    json_format.ParseError,
    ValueError,
    TypeError,
    AttributeError,
    OverflowError,
    RecursionError,
)
#: Characters of a wrong value that an error repeats.
_SHOWN = 60
_TIMES: dict[str, tuple[Callable[[], Any], str]] = {
    "google.protobuf.Timestamp": (timestamp_pb2.Timestamp, "a time like 2026-01-31T12:00:00Z"),
    "google.protobuf.Duration": (duration_pb2.Duration, "a duration in seconds like 1.5s"),
}


def parse(data: Any, message: Message) -> None:
    """Fill an empty message. Raises InvalidArgument with the path of the first value that does not fit."""
    error = _refusal(data, message)
    if error is not None:
        raise InvalidArgument(fault(data, message) or _unknown(data, message, error)) from None
    doubled = next(_doubled(data, cast(Descriptor, message.DESCRIPTOR), ""), None)
    if doubled is not None:
        raise InvalidArgument(doubled)


def fault(data: Any, message: Message) -> FieldViolation | None:
    """The first value that does not fit; None where all do, or they are nested too deep to tell."""
    try:
        return next(_message(data, cast(Descriptor, message.DESCRIPTOR), ""), None)
    except RecursionError:
        return None


def _refusal(data: Any, message: Message) -> Exception | None:
    try:
        json_format.ParseDict(data, message)
    except _REFUSALS as e:
        return e
    return None


def _unknown(data: Any, message: Message, error: Exception) -> FieldViolation:
    """What is wrong beyond single values, such as how deep they are nested: the field is named."""
    names = data if isinstance(data, dict) else ()
    wrong = (n for n in names if _refusal({n: data[n]}, type(message)()) is not None)
    text = str(error).rpartition(": ")[2]
    return FieldViolation(next(wrong, "body"), text[:300])


def _doubled(data: Any, descriptor: Descriptor, path: str) -> Iterator[FieldViolation]:
    """Fields that are given in both their spellings, in a value that fits."""
    if descriptor.full_name.startswith("google.protobuf.") or not isinstance(data, dict):
        return
    spelled: dict[str, str] = {}
    for field in descriptor.fields:
        inner = cast(Any, field.message_type)
        for name in dict.fromkeys((field.name, field.json_name)):
            if name not in data:
                continue
            here, value = f"{path}.{name}" if path else name, data[name]
            if field.name in spelled:
                yield _beside(here, spelled[field.name])
            spelled[field.name] = name
            if inner is None or inner.GetOptions().map_entry:  # maps have plain values
                continue
            if isinstance(value, list):
                for i, one in enumerate(value):
                    yield from _doubled(one, inner, f"{here}[{i}]")
            else:
                yield from _doubled(value, inner, here)


def _beside(path: str, other: str) -> FieldViolation:
    return FieldViolation(path, f"is given beside {other}; one of them is allowed")


def _message(data: Any, descriptor: Descriptor, path: str) -> Iterator[FieldViolation]:
    if not isinstance(data, dict):
        yield _needs(data, path, "an object")
        return
    fields = {
        **{f.name: f for f in descriptor.fields},
        **{f.json_name: f for f in descriptor.fields},
    }
    seen: dict[str, str] = {}
    for name, value in data.items():
        field = fields.get(name)
        here = f"{path}.{name}" if path else name
        if field is None:
            known = ", ".join(f.name for f in descriptor.fields)
            yield FieldViolation(here, f"is no field of this request; known are {known}")
            continue
        one_of = field.containing_oneof
        for slot in (field.name, one_of.name if one_of is not None else field.name):
            if slot in seen and value is not None:
                yield _beside(here, seen[slot])
                return
        if value is None:
            continue  # as left out
        seen[field.name] = name
        if one_of is not None:
            seen[one_of.name] = name
        yield from _field(value, field, here)


def _field(value: Any, field: FieldDescriptor, path: str) -> Iterator[FieldViolation]:
    kind = cast(Any, field.message_type)
    if kind is not None and kind.GetOptions().map_entry:
        if not isinstance(value, dict):
            yield _needs(value, path, "an object")
            return
        for key, one in value.items():
            yield from _element(one, kind.fields_by_name["value"], f"{path}.{key}")
    elif field.is_repeated:
        if not isinstance(value, list):
            yield _needs(value, path, "a list")
            return
        for i, one in enumerate(value):
            yield from _element(one, field, f"{path}[{i}]")
    else:
        yield from _element(value, field, path)


def _element(value: Any, field: FieldDescriptor, path: str) -> Iterator[FieldViolation]:
    kind = cast(Any, field.message_type)
    if kind is None:
        needed = _scalar(value, field)
        if needed:
            yield _needs(value, path, needed)
    elif kind.full_name in _TIMES:
        make, needed = _TIMES[kind.full_name]
        try:
            make().FromJsonString(value)
        except (ValueError, TypeError, AttributeError):
            yield _needs(value, path, needed)
    elif kind.full_name == "google.protobuf.Struct":
        if not isinstance(value, dict):
            yield _needs(value, path, "an object")
    elif kind.full_name == "google.protobuf.ListValue":
        if not isinstance(value, list):
            yield _needs(value, path, "a list")
    elif kind.full_name != "google.protobuf.Value":  # which any JSON is
        yield from _message(value, kind, path)


def _scalar(value: Any, field: FieldDescriptor) -> str:
    """What is needed in the value's place; empty where it fits."""
    if field.enum_type is not None:
        return _enum(value, cast(Any, field.enum_type))
    if field.cpp_type == _F.CPPTYPE_STRING:
        if field.type == _F.TYPE_STRING:
            return "" if isinstance(value, str) else "a string"
        return "" if isinstance(value, str) and _is_base64(value) else "a string in base64"
    if field.cpp_type == _F.CPPTYPE_BOOL:
        return "" if isinstance(value, bool) else "true or false"
    if field.cpp_type in _BITS:
        low, high = _BITS[field.cpp_type]
        whole = _whole(value)
        if whole is None:
            return "an integer"
        return "" if low <= whole <= high else f"an integer from {low} to {high}"
    number = _number(value)
    if number is None:
        return "a number"
    narrow = field.cpp_type == _F.CPPTYPE_FLOAT and math.isfinite(number)
    return "a number that a float32 can hold" if narrow and abs(number) > _MAX_FLOAT32 else ""


def _enum(value: Any, kind: Any) -> str:
    if isinstance(value, str) and value in kind.values_by_name:
        return ""
    low, high = _BITS[_F.CPPTYPE_INT32]
    number = _whole(value)
    if number is not None and low <= number <= high:
        return ""
    return f"one of {', '.join(v.name for v in kind.values)}"


def _whole(value: Any) -> int | None:
    """The integer that JSON's number or string is."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str):
        if " " in value:
            return None
        try:
            return int(value)
        except ValueError:
            pass
    number = _number(value)
    return (
        None
        if number is None or not number.is_integer()
        else int(value if isinstance(value, int) else number)
    )


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def _is_base64(text: str) -> bool:
    import base64

    try:
        base64.urlsafe_b64decode(text.encode() + b"=" * (4 - len(text) % 4))
    except ValueError:
        return False
    return True


def _needs(value: Any, path: str, needed: str) -> FieldViolation:
    return FieldViolation(path or "body", f"is {_what(value)}; {needed} is needed")


def _what(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"the string {value[:_SHOWN]!r}" + ("..." if len(value) > _SHOWN else "")
    if isinstance(value, list):
        return "a list"
    return "an object" if isinstance(value, dict) else f"the number {value}"
