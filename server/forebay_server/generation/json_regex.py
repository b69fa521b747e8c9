"""JSON schemas as regular expressions with at most one blank between parts, by outlines-core.

The embedded engine's own JSON grammar allows white space without end, in which small models lose
themselves when a name that they expect is not in the schema. Schemas that the conversion does not
cover whole go to that grammar all the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from typing import Any

from forebay_server.core.schema_values import target_of

KEYWORDS = frozenset(
    {
        "$defs",
        "$schema",
        "additionalProperties",
        "anyOf",
        "const",
        "default",
        "definitions",
        "description",
        "enum",
        "examples",
        "items",
        "maxItems",
        "maxLength",
        "minItems",
        "minLength",
        "optional",
        "pattern",
        "properties",
        "required",
        "title",
        "type",
        "$ref",
    }
)
#: Longer expressions take longer to compile than the answer takes to say.
MAX_LENGTH = 30_000
#: References that the conversion follows one after the other.
MAX_REFERENCES = 4
#: How outlines-core writes a number, and the same without those that no double holds (1e+999).
ANY_NUMBER = r"((-)?(0|[1-9][0-9]*))(\.[0-9]+)?([eE][+-][0-9]+)?"
NUMBER = r"((-)?(0|[1-9][0-9]{0,19}))(\.[0-9]{1,19})?([eE][+-][0-9]{1,2})?"
#: Ranges of whole numbers with so many members become lists.
MAX_RANGE = 1000


def regex_of(schema: Any) -> str | None:
    """The expression; None when the schema is not covered."""
    from outlines_core.json_schema import (  # pyright: ignore[reportMissingImports] - compiled
        build_regex_from_schema,
    )

    listed = _ranges_as_lists(schema)
    if not _covered(listed) or _deep(listed):
        return None
    try:
        regex = build_regex_from_schema(json.dumps(listed), whitespace_pattern=" ?")
    except (ValueError, TypeError, RuntimeError):
        return None
    # The grammar engine reads bytes: what is above 127 in a class would be cut, and warned of.
    regex = regex.replace(r"\x7F-\x9F", r"\x7F").replace(ANY_NUMBER, NUMBER)
    return regex if len(regex) <= MAX_LENGTH else None


def _ranges_as_lists(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_ranges_as_lists(s) for s in schema]
    if not isinstance(schema, dict):
        return schema
    low, high = schema.get("minimum"), schema.get("maximum")
    whole = schema.get("type") == "integer" and "enum" not in schema
    if whole and isinstance(low, int) and isinstance(high, int) and 0 <= high - low < MAX_RANGE:
        return {"enum": list(range(low, high + 1))}
    return {k: _ranges_as_lists(v) for k, v in schema.items()}


def _covered(schema: Any) -> bool:
    if isinstance(schema, bool) or not isinstance(schema, dict):
        return False
    if not set(schema) <= KEYWORDS:
        return False
    kind = schema.get("type")
    if "properties" in schema and (kind != "object" or not schema["properties"]):
        return False
    if kind == "object" and not schema.get("properties"):
        return False
    if kind == "array" and "items" not in schema:
        return False
    if "pattern" in schema and {"minLength", "maxLength"} & set(schema):
        return False
    if schema.get("additionalProperties") not in (None, False, True):
        return False
    if not {"type", "enum", "const", "anyOf", "$ref"} & set(schema):
        return False
    nested = [*schema.get("anyOf", []), *schema.get("properties", {}).values()]
    nested += [*schema.get("$defs", {}).values(), *schema.get("definitions", {}).values()]
    if "items" in schema:
        nested.append(schema["items"])
    return all(_covered(one) for one in nested)


def _deep(schema: Any) -> bool:
    """Whether the conversion would leave out what references lead to, required or not: it follows
    some one after the other, and none that leads back to itself."""
    leads: dict[str, set[str]] = {}
    new = set(_references(schema))
    while new:
        reference = new.pop()
        leads[reference] = set(_references(target_of(schema, reference)))
        new |= leads[reference] - leads.keys()
    depths: dict[str, int] = {}
    try:
        for reference in TopologicalSorter(leads).static_order():
            depths[reference] = 1 + max((depths[r] for r in leads[reference]), default=0)
    except CycleError:
        return True
    return max(depths.values(), default=0) > MAX_REFERENCES


def _references(schema: Any) -> Iterator[str]:
    if isinstance(schema, list):
        for one in schema:
            yield from _references(one)
    elif isinstance(schema, dict):
        if isinstance(schema.get("$ref"), str):
            yield schema["$ref"]
        for one in schema.values():
            yield from _references(one)
