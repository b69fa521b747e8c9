"""Messages to JSON and back, by the field names of the contract.

Field names are as in the contract (snake_case); camelCase is understood as well. 64-bit integers
are JSON numbers: the contract's stay far below 2^53. Enums are their names. Every field is written,
set or not, but for `optional` ones and messages that are unset. Vectors are read through the twin
message, where packed floats are bytes, and go from numpy to text without Python floats.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, cast

import numpy as np
import orjson
from forebay import proto_json
from forebay.errors import InvalidArgument
from forebay.twins import ANSWERS
from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from forebay_gateway import json_reader

#: Up to here every whole number is a double.
MAX_WHOLE = 2**53


def parse_json(body: bytes) -> dict[str, Any]:
    """The JSON object of a body. Raises InvalidArgument with the place of the fault."""
    if not body.strip():
        return {}
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as e:
        raise InvalidArgument.at("body", f"is not JSON: {e}") from None
    if not isinstance(value, dict):
        raise InvalidArgument.at("body", f"is a {type(value).__name__}; an object is needed")
    return value


def to_message(kind: type[Message], data: dict[str, Any]) -> Message:
    """A message from JSON. Raises InvalidArgument: unknown fields, wrong types, wrong enums."""
    message = kind()
    try:
        json_reader.read(data, message)
        return message
    except json_reader.Odd:
        message.Clear()
    proto_json.parse(data, message)
    return message


def response_json(kind: type[Message], data: bytes) -> bytes:
    """The JSON text of a response's bytes."""
    twin = ANSWERS.get(kind.DESCRIPTOR.full_name)
    message = (twin or kind).FromString(data)
    return dumps(to_dict(message))


def dumps(value: Any) -> bytes:
    """JSON text; numpy arrays are written as lists, without Python floats."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


def to_dict(message: Message) -> dict[str, Any]:
    """A message as JSON-ready values."""
    return _writer(cast(Descriptor, message.DESCRIPTOR).full_name, message.DESCRIPTOR)(message)


Writer = Callable[[Any], dict[str, Any]]


@cache
def _writer(name: str, descriptor: Any) -> Writer:
    """The function that writes one message type; compiled once."""
    if name == json_reader.STRUCT:
        return _struct
    if name.startswith("google.protobuf."):
        return lambda m: cast(dict[str, Any], json_format.MessageToDict(m))
    in_twin = descriptor.file.package.startswith("forebay.twin")
    fields = [_field(f, in_twin) for f in descriptor.fields]

    def write(message: Any) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for add in fields:
            add(message, out)
        return out

    return write


def _struct(message: Any) -> dict[str, Any]:
    return {name: _any(value) for name, value in message.fields.items()}


def _any(value: Any) -> Any:
    """A google.protobuf.Value. Whole numbers have no point, as callers wrote them: a client that reads
    2026.0 into an integer fails."""
    kind = value.WhichOneof("kind")
    if kind == "number_value":
        number = value.number_value
        return int(number) if number.is_integer() and abs(number) <= MAX_WHOLE else number
    if kind == "struct_value":
        return _struct(value.struct_value)
    if kind == "list_value":
        return [_any(v) for v in value.list_value.values]
    return None if kind in (None, "null_value") else getattr(value, kind)


def _value(field: FieldDescriptor, in_twin: bool) -> Callable[[Any], Any] | None:
    """How one value is written; None = as it is."""
    if field.message_type is not None:
        nested: Any = field.message_type
        # Looked up when it runs: types may refer to themselves.
        return lambda v: _writer(nested.full_name, nested)(v)
    if field.enum_type is not None:
        names = {n: v.name for n, v in cast(Any, field.enum_type).values_by_number.items()}
        return lambda v: names.get(v, v)
    if field.type == FieldDescriptor.TYPE_BYTES:
        if in_twin:
            return lambda v: np.frombuffer(v, np.float32)
        import base64

        return lambda v: base64.b64encode(v).decode()
    if field.cpp_type in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        if field.cpp_type == FieldDescriptor.CPPTYPE_FLOAT:
            return lambda v: np.float32(v)  # written with the digits that a float32 has
        return None
    return None


def _field(field: FieldDescriptor, in_twin: bool) -> Callable[[Any, dict[str, Any]], None]:
    name = field.name
    value = _value(field, in_twin)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        inner = _value(cast(Any, field.message_type).fields_by_name["value"], in_twin)

        def add_map(message: Any, out: dict[str, Any]) -> None:
            entries = getattr(message, name)
            out[name] = {str(k): inner(v) if inner else v for k, v in entries.items()}

        return add_map
    if field.is_repeated:

        def add_list(message: Any, out: dict[str, Any]) -> None:
            values = getattr(message, name)
            out[name] = [value(v) for v in values] if value else list(values)

        return add_list
    presence = field.has_presence

    def add(message: Any, out: dict[str, Any]) -> None:
        if presence and not message.HasField(name):
            return
        v = getattr(message, name)
        out[name] = value(v) if value else v

    return add
