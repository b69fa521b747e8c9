"""JSON Schema and the OpenAPI page, from the contract's messages, comments and constraints."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, cast

import forebay
from forebay.constraints import options_of
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from forebay_gateway.contract import Binding, bindings, comments

_SCALARS: dict[int, dict[str, Any]] = {
    FieldDescriptor.TYPE_STRING: {"type": "string"},
    FieldDescriptor.TYPE_BYTES: {"type": "string", "format": "byte"},
    FieldDescriptor.TYPE_BOOL: {"type": "boolean"},
    FieldDescriptor.TYPE_FLOAT: {"type": "number", "format": "float"},
    FieldDescriptor.TYPE_DOUBLE: {"type": "number", "format": "double"},
    FieldDescriptor.TYPE_INT32: {
        "type": "integer",
        "format": "int32",
        "minimum": -(2**31),
        "maximum": 2**31 - 1,
    },
    FieldDescriptor.TYPE_UINT32: {"type": "integer", "minimum": 0, "maximum": 2**32 - 1},
    FieldDescriptor.TYPE_INT64: {
        "type": "integer",
        "format": "int64",
        "minimum": -(2**53),
        "maximum": 2**53,
    },
    FieldDescriptor.TYPE_UINT64: {"type": "integer", "minimum": 0, "maximum": 2**53},
}
_WELL_KNOWN: dict[str, dict[str, Any]] = {
    # Rows hold numbers, strings, booleans and nulls alone; payloads and metadata anything.
    "google.protobuf.Struct": {"type": "object", "additionalProperties": {}},
    "google.protobuf.Timestamp": {"type": "string", "format": "date-time"},
    "google.protobuf.Duration": {"type": "string"},
}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "code": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "details": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {
                            "field": {"type": "string"},
                            "description": {"type": "string"},
                        },
                    },
                },
            },
        }
    },
}
#: Statuses that any call may answer with.
_ERRORS = ("400", "401", "403", "404", "409", "413", "429", "499", "500", "501", "503", "504")


class Schemas:
    """Schemas of requests' messages, or of answers', collected as they are referred to.

    Requests have the contract's constraints. Answers have what `json_codec` always writes: all but
    `optional` fields and messages is there. A message that both have is two schemas, the answers' one
    with `-Output` behind its name.

    Args:
        components: where the schemas go, by name.
        asked: for answers: full names of the messages that requests have; None for requests.
    """

    def __init__(self, components: dict[str, Any], asked: Collection[str] | None = None) -> None:
        self._components = components
        self._asked = asked

    def ref(self, descriptor: Descriptor) -> dict[str, Any]:
        """A reference to a message's schema."""
        name = descriptor.full_name
        if name in _WELL_KNOWN:
            return _WELL_KNOWN[name]
        if self._asked is not None and name in self._asked:
            name += "-Output"
        if name not in self._components:
            self._components[name] = {}
            self._components[name] = self.message(descriptor)
        return {"$ref": f"#/components/schemas/{name}"}

    def message(self, descriptor: Descriptor, without: Collection[str] = ()) -> dict[str, Any]:
        """The schema of a message, without some of its fields."""
        fields = [f for f in descriptor.fields if f.name not in without]
        properties = {f.name: self.field(f) for f in fields}
        if self._asked is None:
            required = [f.name for f in fields if (rule := options_of(f)) and rule.required]
        else:
            required = [f.name for f in fields if not f.has_presence]
        out: dict[str, Any] = {
            "type": "object",
            "properties": properties,
            "additionalProperties": False,
            "description": comments().get(descriptor.full_name, ""),
        }
        if required:
            out["required"] = required
        return out

    def field(self, field: FieldDescriptor) -> dict[str, Any]:
        """The schema of one field, with its comment and bounds."""
        described = {"description": comments().get(field.full_name, "")}
        message = cast(Any, field.message_type)
        if message is not None and message.GetOptions().map_entry:
            value = self._element(message.fields_by_name["value"])
            return {"type": "object", "additionalProperties": value, **described}
        element = self._element(field)
        rule = self._rule(field)
        if not field.is_repeated:
            if rule is not None and rule.required and element.get("type") == "string":
                element = {"minLength": 1, **element}
            return {**element, **described}
        out: dict[str, Any] = {"type": "array", "items": element, **described}
        if rule is not None:
            if rule.HasField("min_items") or rule.required:
                out["minItems"] = max(rule.min_items, 1 if rule.required else 0)
            if rule.HasField("max_items"):
                out["maxItems"] = rule.max_items
        return out

    def _rule(self, field: FieldDescriptor) -> Any:
        """The field's constraints; answers have none."""
        return options_of(field) if self._asked is None else None

    def _element(self, field: FieldDescriptor) -> dict[str, Any]:
        if field.message_type is not None:
            return self.ref(cast(Any, field.message_type))
        if field.enum_type is not None:
            names = [v.name for v in cast(Any, field.enum_type).values]
            return {"type": "string", "enum": names}
        out = dict(_SCALARS[field.type])
        rule = self._rule(field)
        if rule is None:
            return out
        for option, key in (("min_len", "minLength"), ("max_len", "maxLength")):
            if rule.HasField(option):
                out[key] = getattr(rule, option)
        if rule.pattern:
            out["pattern"] = f"^(?:{rule.pattern})?$"
        for option, key in (("gte", "minimum"), ("lte", "maximum")):
            if rule.HasField(option):
                bound = getattr(rule, option)
                out[key] = int(bound) if out["type"] == "integer" else bound
        return out


def openapi(extra_paths: dict[str, Any]) -> dict[str, Any]:
    """The whole page. `extra_paths` are the routes that are not in the contract."""
    components: dict[str, Any] = {"Error": _ERROR}
    requests = Schemas(components)
    asked: set[str] = set()
    for binding in bindings():
        _reach(cast(Any, binding.method.request.DESCRIPTOR), asked)
    answers = Schemas(components, asked)
    paths: dict[str, Any] = {}
    for binding in bindings():
        if binding.method.kind == "bidi_stream":
            continue  # a WebSocket: OpenAPI has no word for it; docs/contract.md describes it
        paths.setdefault(binding.path, {})[binding.verb.lower()] = _operation(
            binding, requests, answers
        )
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Forebay",
            "version": forebay.__version__,
            "description": "The contract's methods as REST, and compatible APIs beside them.",
        },
        "paths": {**paths, **extra_paths},
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }


def _reach(descriptor: Descriptor, names: set[str]) -> None:
    """Add the names of the messages that a message holds, at any depth, and its own."""
    if descriptor.full_name in names:
        return
    names.add(descriptor.full_name)
    for field in descriptor.fields:
        if field.message_type is not None:
            _reach(cast(Any, field.message_type), names)


def _operation(binding: Binding, schemas: Schemas, answers: Schemas) -> dict[str, Any]:
    method = binding.method
    request, response = cast(Any, method.request.DESCRIPTOR), cast(Any, method.response.DESCRIPTOR)
    name = f"{method.service}.{method.name}"
    places = [f.name for f in request.fields if f"{{{f.name}}}" in binding.path]
    text = comments().get(name, "")
    operation: dict[str, Any] = {
        "operationId": name,
        "tags": [method.service.rpartition(".")[2]],
        "summary": text.partition(". ")[0],
        "description": text,
        "parameters": [
            {
                "name": f.name,
                "in": "path",
                "required": True,
                "schema": {"minLength": 1, **schemas.field(f)},
            }
            for f in request.fields
            if f.name in places
        ],
    }
    content = {"application/json": {"schema": answers.ref(response)}}
    if method.content_type:
        media = method.content_type.partition(";")[0]
        content = {media: {"schema": {"type": "string", "format": "binary"}}}
    elif method.kind == "server_stream":
        content = {
            k: {"schema": {"type": "string"}} for k in ("text/event-stream", "application/x-ndjson")
        }
    operation["responses"] = {
        "200": {
            "description": comments().get(response.full_name, "The answer."),
            "content": content,
        },
        **error_responses(),
    }
    if method.kind == "client_stream":
        header = request.fields_by_name["header"].message_type
        form = {
            "type": "object",
            "properties": {
                **{f.name: schemas.field(f) for f in header.fields},
                "files": {"type": "array", "items": {"type": "string", "format": "binary"}},
            },
        }
        operation["requestBody"] = {
            "required": True,
            "content": {"multipart/form-data": {"schema": form}},
        }
    elif binding.body:
        # What the path says need not be said again: a client made from this page would have to.
        schema = schemas.message(request, places) if places else schemas.ref(request)
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schema}},
        }
    else:
        operation["parameters"] += [
            {"name": f.name, "in": "query", "schema": schemas.field(f)}
            for f in request.fields
            if f.name not in places and f.message_type is None
        ]
    return operation


def error_responses() -> dict[str, Any]:
    """The error answers of any operation."""
    schema = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {code: {"description": "An error.", "content": schema} for code in _ERRORS}
