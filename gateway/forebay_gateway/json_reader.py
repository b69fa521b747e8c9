"""JSON to messages by functions that are compiled once for each type of message.

`json_format.ParseDict` knows every rule of ProtoJSON, and looks each of them up for each value: it takes
four to seven times as long. Here are the plain shapes alone: fields by the contract's own names,
values in JSON's own types. All else is `Odd`, and left to it; so are all errors.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor

MAX_FLOAT32 = 3.4028234663852886e38
STRUCT = "google.protobuf.Struct"
Reader = Callable[[dict[str, Any], Any], None]
_Kinds = tuple[type, ...]
_F = FieldDescriptor
_INTEGERS = (_F.CPPTYPE_INT32, _F.CPPTYPE_INT64, _F.CPPTYPE_UINT32, _F.CPPTYPE_UINT64)


class Odd(Exception):
    """A shape that is not read here."""


def read(data: dict[str, Any], message: Any) -> None:
    """Fill an empty message from a JSON object.

    Raises:
        Odd: json_format.ParseDict has to say what it is; the message is half filled.
    """
    try:
        _reader(message.DESCRIPTOR)(data, message)
    except (ValueError, TypeError, OverflowError):  # such as a number that its type cannot hold
        raise Odd from None


@cache
def _reader(descriptor: Descriptor) -> Reader:
    if descriptor.full_name == STRUCT:
        return _read_struct
    if descriptor.full_name.startswith("google.protobuf."):
        return _refuse  # timestamps and their like have forms of their own
    setters = {f.name: _setter(f) for f in descriptor.fields}
    choices = {
        f.name: f.containing_oneof.name
        for f in descriptor.fields
        if f.containing_oneof is not None and len(f.containing_oneof.fields) > 1
    }

    def run(data: dict[str, Any], message: Any) -> None:
        for name, value in data.items():
            setter = setters.get(name)
            if setter is None:
                raise Odd
            setter(value, message)
        if choices:
            taken = [choices[name] for name in data if name in choices]
            if len(taken) != len(set(taken)):
                raise Odd

    return run


def _refuse(data: dict[str, Any], message: Any) -> None:
    raise Odd


def _read_struct(data: dict[str, Any], message: Any) -> None:
    fields = message.fields
    for name, value in data.items():
        kind = type(value)
        if kind is float or kind is int:
            fields[name].number_value = value
        elif kind is str:
            fields[name].string_value = value
        elif kind is bool:
            fields[name].bool_value = value
        elif value is None:
            fields[name].null_value = 0
        else:
            raise Odd


def _setter(field: FieldDescriptor) -> Callable[[Any, Any], None]:
    name = field.name
    if field.message_type is not None:
        # Filters within filters: how deep they may be, ParseDict knows.
        if field.message_type.GetOptions().map_entry or _recursive(field.message_type):
            return _odd
        return (_messages if field.is_repeated else _message)(name, field.message_type)
    if field.enum_type is not None:
        if field.is_repeated:
            return _odd
        numbers = {v.name: v.number for v in field.enum_type.values}

        def enum(value: Any, message: Any) -> None:
            if type(value) is not str or value not in numbers:
                raise Odd
            setattr(message, name, numbers[value])

        return enum
    kinds = _kinds(field)
    if not kinds:
        return _odd
    narrow = field.cpp_type == _F.CPPTYPE_FLOAT
    return (_scalars if field.is_repeated else _scalar)(name, kinds, narrow)


def _recursive(descriptor: Descriptor) -> bool:
    """Whether a message of the type may hold another of it, at any depth."""
    seen: set[str] = set()
    left = [descriptor]
    while left:
        for field in left.pop().fields:
            inner = field.message_type
            if inner is None or inner.full_name in seen or inner.full_name == STRUCT:
                continue
            if inner.full_name == descriptor.full_name:
                return True
            seen.add(inner.full_name)
            left.append(inner)
    return False


def _odd(value: Any, message: Any) -> None:
    raise Odd


def _kinds(field: FieldDescriptor) -> _Kinds:
    """Python's types of a field's JSON values; none for those with forms of their own."""
    if field.type == _F.TYPE_STRING:
        return (str,)
    if field.cpp_type == _F.CPPTYPE_BOOL:
        return (bool,)
    if field.cpp_type in _INTEGERS:
        return (int,)
    if field.cpp_type in (_F.CPPTYPE_FLOAT, _F.CPPTYPE_DOUBLE):
        return (float, int)
    return ()


def _message(name: str, descriptor: Descriptor) -> Callable[[Any, Any], None]:
    def run(value: Any, message: Any) -> None:
        if type(value) is not dict:
            raise Odd
        inner = getattr(message, name)
        inner.SetInParent()
        _reader(descriptor)(value, inner)

    return run


def _messages(name: str, descriptor: Descriptor) -> Callable[[Any, Any], None]:
    def run(value: Any, message: Any) -> None:
        if type(value) is not list:
            raise Odd
        add, fill = getattr(message, name).add, _reader(descriptor)
        for one in value:
            if type(one) is not dict:
                raise Odd
            fill(one, add())

    return run


def _scalar(name: str, kinds: _Kinds, narrow: bool) -> Callable[[Any, Any], None]:
    def run(value: Any, message: Any) -> None:
        if type(value) not in kinds or (narrow and abs(value) > MAX_FLOAT32):
            raise Odd
        setattr(message, name, value)

    return run


def _scalars(name: str, kinds: _Kinds, narrow: bool) -> Callable[[Any, Any], None]:
    allowed = set(kinds)

    def run(value: Any, message: Any) -> None:
        if type(value) is not list or not set(map(type, value)) <= allowed:
            raise Odd
        if narrow and value and max(max(value), -min(value)) > MAX_FLOAT32:
            raise Odd
        getattr(message, name).extend(value)

    return run
