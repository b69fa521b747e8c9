"""JSON schemas that no value can have, and those of which the grammar engine takes a part alone.

The engine finds out when it compiles a grammar, which stops all answers of a model on this machine,
or never: then the answer breaks its schema. So both are refused beforehand, with their place.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from forebay_server.core.expressions import MAX_COUNT

#: Keywords of which the engine reads the first that a schema has and passes over all others, but
#: `type`, which says the same again where it is there.
_HOLDERS = ("$ref", "const", "enum", "anyOf", "oneOf", "allOf")
_COUNTS = tuple(
    f"{end}{what}" for what in ("Length", "Items", "Properties") for end in ("min", "max")
)
_NUMBERS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")
_STRINGS = ("minLength", "maxLength", "pattern", "format")
_ARRAYS = ("items", "prefixItems", "additionalItems")
_OBJECTS = ("properties", "additionalProperties", "patternProperties")
#: Keywords that hold for one type and do not tell the engine which: it takes any value then.
_TYPED = (*_NUMBERS, *_STRINGS)
_TYPED_ARRAYS = ("minItems", "maxItems")
_TYPED_OBJECTS = ("required", "minProperties", "maxProperties")
_VALUES = {
    "type",
    *_HOLDERS,
    *_COUNTS,
    *_NUMBERS,
    *_STRINGS,
    *_ARRAYS,
    *_OBJECTS,
    "required",
}
#: Whole numbers are 64 bits wide in the engine.
_WHOLE = (-(2**63), 2**63 - 1)

Refuse = Callable[[str, str], None]


def check_values(schema: Mapping[str, Any], refuse: Refuse) -> None:
    """Call `refuse` with the first keyword that leaves no value, or that the engine passes over
    because of another one beside it. Subschemas are not looked at."""
    _check_holders(schema, refuse)
    _check_types(schema, refuse)
    for name in _COUNTS:
        count = schema.get(name, 0)
        if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= MAX_COUNT:
            refuse(name, f"is {count!r:.40}; allowed are whole numbers from 0 to {MAX_COUNT}")
    for low, high in zip(_COUNTS[::2], _COUNTS[1::2], strict=True):
        if schema.get(low, 0) > schema.get(high, MAX_COUNT):
            refuse(low, f"is more than {high}; no value can have both")
    _check_numbers(schema, refuse)
    _check_strings(schema, refuse)
    _check_arrays(schema, refuse)
    _check_objects(schema, refuse)


def _check_holders(schema: Mapping[str, Any], refuse: Refuse) -> None:
    holder = next((name for name in _HOLDERS if name in schema), None)
    if holder is None:
        return
    for name in schema:
        if name in _VALUES and name not in (holder, "type"):
            refuse(name, f"the engine cannot enforce it beside {holder}")
    if holder in ("const", "enum"):
        values = [schema["const"]] if holder == "const" else schema["enum"]
        if not isinstance(values, list) or not values:
            refuse(holder, "must be a list of at least one value")
        kinds = _types(schema)
        for value in values:
            if kinds and not any(_is(value, kind) for kind in kinds):
                refuse(holder, f"has {json.dumps(value):.40}, which is not of the type beside it")
    elif "type" in schema:
        parts = [] if holder == "$ref" else schema[holder]
        if not parts or not all(_within(part, _types(schema)) for part in parts):
            each = "; state it in each part" if parts else ""
            refuse("type", f"the engine cannot enforce it beside {holder}{each}")


def _within(part: Any, kinds: Iterable[str]) -> bool:
    """Whether a part's own words hold it to some types."""
    if not isinstance(part, Mapping):
        return False
    if "const" in part or isinstance(part.get("enum"), list):
        values = [part["const"]] if "const" in part else part["enum"]
        return all(any(_is(value, kind) for kind in kinds) for value in values)
    own = _types(part) or [
        kind for kind, names in (("array", _ARRAYS), ("object", _OBJECTS)) if {*names} & {*part}
    ]
    wider = {*kinds, *(("integer",) if "number" in kinds else ())}
    return bool(own) and {*own} <= wider


def _types(schema: Mapping[str, Any]) -> list[str]:
    kinds = schema.get("type", [])
    return kinds if isinstance(kinds, list) else [kinds]


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool) or value is None:
        return kind == ("null" if value is None else "boolean")
    if isinstance(value, (int, float)):
        return kind == "number" or (kind == "integer" and float(value).is_integer())
    return kind == {str: "string", list: "array", dict: "object"}[type(value)]


def _check_types(schema: Mapping[str, Any], refuse: Refuse) -> None:
    if "type" in schema:
        return
    typed = (
        *_TYPED,
        *(() if {*_ARRAYS} & {*schema} else _TYPED_ARRAYS),
        *(() if {*_OBJECTS} & {*schema} else _TYPED_OBJECTS),
    )
    for name in typed:
        if name in schema:
            refuse(name, "the engine cannot enforce it without a type beside it")


def _check_numbers(schema: Mapping[str, Any], refuse: Refuse) -> None:
    given = {name: schema[name] for name in _NUMBERS if name in schema}
    whole = "integer" in _types(schema)
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            refuse(name, "must be a number")
        if whole and not (_WHOLE[0] <= value <= _WHOLE[1] and float(value).is_integer()):
            refuse(name, f"is {value!r:.40}; allowed for integers are whole numbers of 64 bits")
    step = 1 if whole else 0
    lows = [("minimum", 0), ("exclusiveMinimum", step)]
    highs = [("maximum", 0), ("exclusiveMaximum", step)]
    for low, more in lows:
        for high, less in highs:
            if low not in given or high not in given:
                continue
            first, last = given[low] + more, given[high] - less
            open_ends = not whole and (low, high) != ("minimum", "maximum")
            if first > last or (open_ends and first == last):
                refuse(low, f"leaves no value beside {high}")


def _check_strings(schema: Mapping[str, Any], refuse: Refuse) -> None:
    # Lengths beside either are checked when the answer is there: libraries write them of habit.
    if "pattern" in schema and "format" in schema:
        refuse("pattern", "the engine cannot enforce it beside format")


def _check_arrays(schema: Mapping[str, Any], refuse: Refuse) -> None:
    first = len(schema.get("prefixItems", []))
    if schema.get("maxItems", math.inf) < first:
        refuse(
            "maxItems", f"is less than the {first} of prefixItems, all of which the engine gives"
        )
    closed = schema.get("items") is False
    if closed and schema.get("minItems", 0) > first:
        refuse("minItems", f"is more than the {first} of prefixItems, and items allows no others")


def _check_objects(schema: Mapping[str, Any], refuse: Refuse) -> None:
    named = schema.get("properties") or {}
    for name in named:
        if json.dumps(name, ensure_ascii=False) != f'"{name}"':
            refuse("properties", f"the engine cannot enforce the name {json.dumps(name)[:60]}")
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        refuse("required", "must be a list of names")
    for name in required:
        if name not in named:
            refuse("required", f"has {json.dumps(name)[:60]}, which is not among properties")
    if schema.get("maxProperties", math.inf) < len(set(required)):
        refuse("maxProperties", f"is less than the {len(set(required))} that are required")
    closed = schema.get("additionalProperties") is False and not schema.get("patternProperties")
    if closed and schema.get("minProperties", 0) > len(named):
        refuse(
            "minProperties",
            f"is more than the {len(named)} of properties, and no others are allowed",
        )


class Places:
    """A document's subschemas, their places, and which of them some finite value can have.

    `endless` finds those of which each value would hold another one without end. Each subschema
    becomes a node that waits for nodes: all of them (what is required), or one (alternatives).
    """

    def __init__(self) -> None:
        self.places: dict[int, str] = {}
        self._schemas: list[Mapping[str, Any]] = []

    def add(self, schema: Mapping[str, Any], place: str) -> None:
        """One more subschema."""
        self.places[id(schema)] = place
        self._schemas.append(schema)

    def check_references(self, root: Mapping[str, Any], refuse: Refuse) -> None:
        """Call `refuse` with the first reference that leads to no subschema, or to an endless one."""
        targets = {
            id(schema): target
            for schema in self._schemas
            if "$ref" in schema and (target := target_of(root, schema["$ref"])) is not None
        }
        for schema in self._schemas:
            if "$ref" not in schema:
                continue
            dot = f"{self.places[id(schema)]}." if self.places[id(schema)] else ""
            if id(targets.get(id(schema))) not in self.places:
                refuse(
                    f"{dot}$ref",
                    "leads to no schema; allowed are '#' and '#/...' to one, without ~, % or indexes",
                )
        finite = self._finite(targets)
        for schema in self._schemas:
            if id(schema) in targets and id(schema) not in finite:
                dot = f"{self.places[id(schema)]}." if self.places[id(schema)] else ""
                refuse(f"{dot}$ref", "what it leads to holds another one without end; no value can")

    def _finite(self, targets: Mapping[int, Any]) -> set[int]:
        waiting: dict[object, int] = {}
        waiters: dict[object, list[object]] = {}
        ready: list[object] = []

        def node(key: object, parts: list[object], enough: int) -> None:
            waiting[key] = enough
            for part in parts:
                waiters.setdefault(part, []).append(key)
            if enough == 0:
                ready.append(key)

        for schema in self._schemas:
            ways = _ways(schema, targets)
            node(id(schema), [(id(schema), i) for i in range(len(ways))], 1)
            for i, parts in enumerate(ways):
                held = [id(part) for part in parts if isinstance(part, Mapping)]
                node((id(schema), i), list(held), len(held))
        found: set[int] = set()
        while ready:
            key = ready.pop()
            if isinstance(key, int):
                found.add(key)
            for waiter in waiters.get(key, ()):
                waiting[waiter] -= 1
                if waiting[waiter] == 0:
                    ready.append(waiter)
        return found


def target_of(root: Any, reference: Any) -> Any:
    """What a reference within a document leads to; None where the engine does not follow it."""
    if not isinstance(reference, str) or reference[:1] != "#" or {"~", "%"} & {*reference}:
        return None
    if reference == "#":
        return root
    if not reference.startswith("#/"):
        return None
    for name in reference[2:].split("/"):
        if not isinstance(root, Mapping) or name not in root:
            return None
        root = root[name]
    return root


def _ways(schema: Mapping[str, Any], targets: Mapping[int, Any]) -> list[list[Any]]:
    """Ways to a value, each with the subschemas that it takes values of."""
    if "$ref" in schema:
        return [[targets[id(schema)]]]
    if "const" in schema or "enum" in schema:
        return [[]]
    for name in ("anyOf", "oneOf"):
        if name in schema:
            return [[part] for part in schema[name]]
    if "allOf" in schema:
        return [list(schema["allOf"])]
    kinds = _types(schema) or [
        kind for kind, names in (("array", _ARRAYS), ("object", _OBJECTS)) if {*names} & {*schema}
    ]
    ways: list[list[Any]] = []
    for kind in kinds or ["null"]:
        parts: list[Any] = []
        if kind == "object":
            named = schema.get("properties") or {}
            parts = [named[name] for name in set(schema.get("required", []))]
        elif kind == "array":
            parts = list(schema.get("prefixItems", []))
            if schema.get("minItems", 0) > len(parts):
                parts.append(schema.get("items", True))
        ways.append(parts)
    return ways
