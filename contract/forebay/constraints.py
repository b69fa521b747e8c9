"""The contract's field constraints, compiled once into plain closures and checked per message.

The options stand in protos/forebay/options/v1/constraints.proto. A message type without any
constraint in its whole tree compiles to nothing and costs nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any, cast

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from forebay.errors import FieldViolation, InvalidArgument, TooLarge
from forebay.options.v1 import constraints_pb2

#: Checks a value at a path and adds what is wrong.
Check = Callable[[Any, str, list[FieldViolation]], None]

_NUMBERS = {
    FieldDescriptor.CPPTYPE_INT32,
    FieldDescriptor.CPPTYPE_INT64,
    FieldDescriptor.CPPTYPE_UINT32,
    FieldDescriptor.CPPTYPE_UINT64,
    FieldDescriptor.CPPTYPE_DOUBLE,
    FieldDescriptor.CPPTYPE_FLOAT,
}
#: Violations that are listed at most; one bad list should not make a huge answer.
MAX_VIOLATIONS = 20
#: Characters of a wrong value that an error repeats.
MAX_SHOWN = 60


def options_of(field: FieldDescriptor) -> constraints_pb2.FieldConstraints | None:
    """The constraints of a field, None when it has none."""
    options = field.GetOptions()
    # The generated stub says FieldDescriptor where protobuf's typing wants its own handle.
    extension = cast(Any, constraints_pb2.field)
    return options.Extensions[extension] if options.HasExtension(extension) else None


def _length_check(rule: constraints_pb2.FieldConstraints, unit: str) -> Check | None:
    low = rule.min_len if rule.HasField("min_len") else None
    high = rule.max_len if rule.HasField("max_len") else None
    pattern = re.compile(rule.pattern) if rule.pattern else None
    if low is None and high is None and pattern is None:
        return None

    def check(value: Any, path: str, out: list[FieldViolation]) -> None:
        n = len(value)
        if low is not None and n < low:
            out.append(FieldViolation(path, f"has {n} {unit}; at least {low} are needed"))
        if high is not None and n > high:
            raise TooLarge(path, size=n, limit=high, unit=unit)
        if pattern is not None and value and not pattern.fullmatch(value):
            out.append(FieldViolation(path, f"is {_shown(value)}; it must match {pattern.pattern}"))

    return check


def _shown(value: str | bytes) -> str:
    return repr(value[:MAX_SHOWN]) + ("..." if len(value) > MAX_SHOWN else "")


def _number_check(rule: constraints_pb2.FieldConstraints) -> Check | None:
    low = rule.gte if rule.HasField("gte") else None
    high = rule.lte if rule.HasField("lte") else None
    finite = rule.finite
    if low is None and high is None and not finite:
        return None
    bounds = (
        f"from {low:g} to {high:g}"
        if low is not None and high is not None
        else f"at least {low:g}"
        if low is not None
        else f"at most {high:g}"
        if high is not None
        else "a finite number"
    )

    def check(value: Any, path: str, out: list[FieldViolation]) -> None:
        wrong = (low is not None and value < low) or (high is not None and value > high)
        if wrong or (finite and not math.isfinite(value)):
            out.append(FieldViolation(path, f"is {value:g}; allowed is {bounds}"))

    return check


def _enum_check(field: FieldDescriptor) -> Check:
    names = cast(Any, field.enum_type).values_by_number

    def check(value: Any, path: str, out: list[FieldViolation]) -> None:
        if value not in names:
            allowed = ", ".join(v.name for v in names.values())
            out.append(FieldViolation(path, f"is {value}; allowed are {allowed}"))

    return check


def _element_check(field: FieldDescriptor, rule: constraints_pb2.FieldConstraints) -> Check | None:
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        text = field.type == FieldDescriptor.TYPE_STRING
        return _length_check(rule, "characters" if text else "bytes")
    if field.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
        return _enum_check(field) if rule.defined_only else None
    if field.cpp_type in _NUMBERS:
        return _number_check(rule)
    return None


def _packed_bounds(rule: constraints_pb2.FieldConstraints) -> Check | None:
    """Bounds of a repeated number: min() and max() run in C, so long lists stay cheap."""
    single = _number_check(rule)
    if single is None:
        return None
    bounded = rule.HasField("gte") or rule.HasField("lte")
    finite = rule.finite

    def check(values: Any, path: str, out: list[FieldViolation]) -> None:
        if not values:
            return
        before = len(out)
        if bounded:
            single(min(values), path, out)
            if len(out) == before:
                single(max(values), path, out)
        # min() and max() pass over NaN; a sum does not.
        if len(out) > before or (finite and not math.isfinite(sum(values))):
            del out[before:]
            for i, value in enumerate(values):
                single(value, f"{path}[{i}]", out)
                if len(out) >= MAX_VIOLATIONS:
                    return

    return check


def _timestamp(value: Any, path: str, out: list[FieldViolation]) -> None:
    """Years 1 to 9999, as protobuf's JSON has them: any other bits can be sent, but mean no time."""
    if not -62135596800 <= value.seconds <= 253402300799 or not 0 <= value.nanos <= 999_999_999:
        out.append(FieldViolation(path.rstrip("."), "is no time between the years 1 and 9999"))


_WELL_KNOWN: dict[str, Check] = {"google.protobuf.Timestamp": _timestamp}


class Validator:
    """Compiled constraints of one message type. Recursive types are compiled once."""

    def __init__(self) -> None:
        self._cache: dict[str, Callable[[Any, str, list[FieldViolation]], None] | None] = {}
        self._pending: set[str] = set()

    def check(self, message: Message) -> None:
        """Raise InvalidArgument with every violation (at most 20), TooLarge for sizes."""
        compiled = self.compile(cast(Descriptor, message.DESCRIPTOR))
        if compiled is None:
            return
        out: list[FieldViolation] = []
        compiled(message, "", out)
        if out:
            raise InvalidArgument(out[:MAX_VIOLATIONS])

    def compile(self, descriptor: Descriptor) -> Check | None:
        """The check of a message type; None when nothing in its tree is constrained."""
        name = descriptor.full_name
        if name in self._cache:
            return self._cache[name]
        if name in self._pending:  # recursive: look it up when it runs
            return lambda m, p, o: (c := self._cache[name]) and c(m, p, o)
        self._pending.add(name)
        checks = [c for f in descriptor.fields if (c := self._field(f)) is not None]
        self._pending.discard(name)
        compiled = _all(checks) if checks else None
        self._cache[name] = compiled
        return compiled

    def _field(self, field: FieldDescriptor) -> Check | None:
        rule = options_of(field) or constraints_pb2.FieldConstraints()
        if rule.deferred:
            return None
        name = field.name
        nested = None
        is_map = field.message_type is not None and field.message_type.GetOptions().map_entry
        own = field.message_type is not None and field.message_type.file.package.startswith(
            "forebay"
        )
        if own and not is_map:
            nested = self.compile(cast(Descriptor, field.message_type))
        elif field.message_type is not None:
            nested = _WELL_KNOWN.get(field.message_type.full_name)
        if field.is_repeated:
            return self._repeated(field, rule, nested)
        element = _element_check(field, rule)
        if element is None and nested is None and not rule.required:
            return None
        presence = field.has_presence
        required = rule.required
        # Most fields of most requests are left out: nothing of an empty text can be wrong then.
        text = field.cpp_type == FieldDescriptor.CPPTYPE_STRING
        may_be_empty = text and not presence and not required and not rule.min_len

        def check(message: Any, path: str, out: list[FieldViolation]) -> None:
            value = getattr(message, name)
            if may_be_empty and not value:
                return
            here = f"{path}{name}"
            if presence and not message.HasField(name):
                if required:
                    out.append(FieldViolation(here, "is required"))
                return
            if required and not presence and not value:
                out.append(FieldViolation(here, "is required"))
                return
            if element is not None:
                element(value, here, out)
            if nested is not None:
                nested(value, f"{here}.", out)

        return check

    def _repeated(
        self, field: FieldDescriptor, rule: constraints_pb2.FieldConstraints, nested: Check | None
    ) -> Check | None:
        name = field.name
        low = max(rule.min_items if rule.HasField("min_items") else 0, 1 if rule.required else 0)
        high = rule.max_items if rule.HasField("max_items") else None
        numeric = field.cpp_type in _NUMBERS
        packed = _packed_bounds(rule) if numeric else None
        element = None if numeric else _element_check(field, rule)
        if not low and high is None and packed is None and element is None and nested is None:
            return None

        def check(message: Any, path: str, out: list[FieldViolation]) -> None:
            values = getattr(message, name)
            n = len(values)
            if not n and not low:
                return
            here = f"{path}{name}"
            if n < low:
                out.append(FieldViolation(here, f"has {n} elements; at least {low} are needed"))
            if high is not None and n > high:
                raise TooLarge(here, size=n, limit=high, unit="elements")
            if packed is not None:
                packed(values, here, out)
            if element is None and nested is None:
                return
            for i, value in enumerate(values):
                if element is not None:
                    element(value, f"{here}[{i}]", out)
                if nested is not None:
                    nested(value, f"{here}[{i}].", out)
                if len(out) >= MAX_VIOLATIONS:
                    return

        return check


def _all(checks: Iterable[Check]) -> Check:
    run = tuple(checks)

    def check(message: Any, path: str, out: list[FieldViolation]) -> None:
        for one in run:
            one(message, path, out)

    return check
