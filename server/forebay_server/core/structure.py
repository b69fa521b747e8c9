"""Forms that answers must have: what grammar engines enforce, and whether an answer has it.

xgrammar, which both engines on this machine use, passes over some keywords of JSON schema in
silence. Such a schema is refused here: an answer must not look as if it were checked when it is not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

from forebay.errors import InvalidArgument

from forebay_server.core.expressions import check_regex
from forebay_server.core.generation import Structure
from forebay_server.core.schema_values import Places, check_values

#: Keywords that hold values for answers and that the grammar does not enforce.
UNENFORCED = frozenset(
    {
        "$dynamicRef",
        "$recursiveRef",
        "contains",
        "contentEncoding",
        "contentMediaType",
        "contentSchema",
        "dependencies",
        "dependentRequired",
        "dependentSchemas",
        "else",
        "if",
        "maxContains",
        "minContains",
        "multipleOf",
        "not",
        "propertyNames",
        "then",
        "unevaluatedItems",
        "unevaluatedProperties",
        "uniqueItems",
    }
)
#: Formats that the grammar knows; others are refused.
FORMATS = frozenset(
    {
        "date",
        "date-time",
        "duration",
        "email",
        "hostname",
        "ipv4",
        "ipv6",
        "json-pointer",
        "relative-json-pointer",
        "time",
        "uri",
        "uri-reference",
        "uri-template",
        "uuid",
    }
)
TYPES = frozenset({"array", "boolean", "integer", "null", "number", "object", "string"})
_SCHEMAS = ("items", "additionalProperties", "additionalItems")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_MAPS = ("properties", "$defs", "definitions", "patternProperties")
MAX_DEPTH = 48


def parse_schema(text: str, path: str) -> dict[str, Any]:
    """A JSON schema that is an object and can be enforced. Raises InvalidArgument at `path`."""
    try:
        schema = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError) as e:
        raise InvalidArgument.at(path, f"is not JSON: {e}") from None
    if not isinstance(schema, dict):
        raise InvalidArgument.at(path, "must be a JSON schema, an object")
    return schema


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def check_enforceable(schema: Any, path: str) -> None:
    """Raise InvalidArgument that names the first keyword the grammar would pass over."""
    places = Places()
    _walk(schema, path, "", 0, places)
    _compile(schema, path)
    places.check_references(schema, partial(_refuse, path))


def enforceable(schema: Any) -> bool:
    """Whether `check_enforceable` has nothing against it."""
    try:
        check_enforceable(schema, "")
    except InvalidArgument:
        return False
    return True


def _fetch(uri: str) -> Any:
    """What a reference out of the schema gets: the library would fetch it, from the network or the
    disk, for whoever may send a schema."""
    raise ValueError("only references within the schema are followed")


def _compile(schema: Any, path: str) -> Any:
    import jsonschema_rs

    try:
        return jsonschema_rs.validator_for(schema, retriever=_fetch)
    except (ValueError, TypeError) as e:
        reason = str(e).strip().splitlines()[0][:200]
        raise InvalidArgument.at(path, f"is no valid JSON schema: {reason}") from None


def _refuse(path: str, at: str, why: str) -> None:
    raise InvalidArgument.at(path, f"{at or 'the schema'}: {why}", reason="SCHEMA_NOT_ENFORCEABLE")


def _walk(schema: Any, path: str, at: str, depth: int, places: Places) -> None:
    if isinstance(schema, bool):
        return
    if not isinstance(schema, Mapping):
        _refuse(path, at, "is no schema")
    if depth > MAX_DEPTH:
        _refuse(path, at, f"is nested more than {MAX_DEPTH} deep")
    dot = f"{at}." if at else ""
    places.add(schema, at)
    if at and "$id" in schema:
        _refuse(path, f"{dot}$id", "the engine follows references from the whole schema alone")
    for keyword in schema:
        if keyword in UNENFORCED:
            _refuse(path, f"{dot}{keyword}", "the engine cannot enforce this keyword")
    kinds = schema.get("type", [])
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        if not isinstance(kind, str) or kind not in TYPES:
            known = ", ".join(sorted(TYPES))
            _refuse(path, f"{dot}type", f"is {kind!r:.40}; allowed are {known}")
    form = schema.get("format")
    if form is not None and (not isinstance(form, str) or form not in FORMATS):
        _refuse(path, f"{dot}format", f"the engine cannot enforce the format {form!r:.40}")
    for name in _LISTS:
        if not isinstance(schema.get(name, []), list):
            _refuse(path, f"{dot}{name}", "must be a list")
    if len(schema.get("allOf", [])) > 1:
        _refuse(path, f"{dot}allOf", "the engine cannot enforce more than one part")
    if isinstance(schema.get("pattern"), str):
        check_regex(schema["pattern"], path)
    reference = schema.get("$ref")
    if isinstance(reference, str) and not reference.startswith("#"):
        _refuse(path, f"{dot}$ref", "only references within the schema are followed")
    for pattern in schema.get("patternProperties") or ():
        check_regex(pattern, path)
    if "patternProperties" in schema and ("properties" in schema or "required" in schema):
        _refuse(path, f"{dot}patternProperties", "the engine cannot enforce it beside properties")
    for name in _SCHEMAS:
        value = schema.get(name)
        if isinstance(value, list):
            for i, one in enumerate(value):
                _walk(one, path, f"{dot}{name}[{i}]", depth + 1, places)
        elif value is not None:
            _walk(value, path, f"{dot}{name}", depth + 1, places)
    for name in _LISTS:
        for i, one in enumerate(schema.get(name, [])):
            _walk_form(one, path, f"{dot}{name}[{i}]", depth + 1, places)
    for name in _MAPS:
        value = schema.get(name) or {}
        if not isinstance(value, Mapping):
            _refuse(path, f"{dot}{name}", "must be an object")
        for key, one in value.items():
            _walk_form(one, path, f"{dot}{name}.{key}", depth + 1, places)
    check_values(schema, lambda keyword, why: _refuse(path, f"{dot}{keyword}", why))


def _walk_form(schema: Any, path: str, at: str, depth: int, places: Places) -> None:
    """Where a value is to have the form: `items` and `additionalProperties` alone may allow none."""
    if schema is False:
        _refuse(path, at, "is false, which the engine cannot enforce; leave it out")
    _walk(schema, path, at, depth, places)


def _matcher(pattern: str) -> Any:
    """Whether a text as a whole matches an expression, in time linear in the text: Python's own `re`
    may take for ever, and holds the interpreter meanwhile. Raises ValueError."""
    import jsonschema_rs

    return jsonschema_rs.validator_for(
        {"type": "string", "pattern": f"^(?s:{pattern})$"},
        pattern_options=jsonschema_rs.RegexOptions(),
    )


def fault_of(structure: Structure, text: str) -> str | None:
    """What is wrong with an answer that ended well; None when it has its form.

    Grammars are not checked again: nothing here reads them but the engine.
    """
    if structure.kind in ("json_schema", "json_object"):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as e:
            return f"the answer is not JSON: {e}"
        if structure.kind == "json_object":
            return None if isinstance(value, dict) else "the answer is no JSON object"
        validator = _compile(json.loads(str(structure.value)), "json_schema")
        error = next(iter(validator.iter_errors(value)), None)
        return None if error is None else f"the answer breaks the schema: {error.message[:200]}"
    if structure.kind == "choice":
        return None if text in structure.value else "the answer is none of the choices"
    if structure.kind == "regex":
        try:
            good = _matcher(str(structure.value)).is_valid(text)
        except ValueError:  # a dialect that it does not read; the engine has enforced it
            return None
        return None if good else "the answer does not match the expression"
    return None
