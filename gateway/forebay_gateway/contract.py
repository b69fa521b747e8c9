"""The contract as the gateway sees it: HTTP bindings and comments, from the descriptor set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import forebay
from forebay.methods import Method, methods, service_descriptors
from google.api import annotations_pb2
from google.protobuf import descriptor_pb2


@dataclass(frozen=True, slots=True)
class Binding:
    """One method's place in HTTP. `body` is True when the request's body is the message."""

    method: Method
    verb: str
    path: str
    body: bool


@cache
def bindings() -> tuple[Binding, ...]:
    """Every method with a google.api.http annotation."""
    out = []
    for service in service_descriptors():
        for descriptor in service.methods:
            options = descriptor.GetOptions()
            http = cast(Any, annotations_pb2.http)  # the stub's type is not protobuf's own
            if not options.HasExtension(http):
                continue
            rule = options.Extensions[http]
            verb = rule.WhichOneof("pattern")
            out.append(
                Binding(
                    methods()[f"/{service.full_name}/{descriptor.name}"],
                    verb.upper(),
                    getattr(rule, verb),
                    rule.body == "*",
                )
            )
    return tuple(out)


@cache
def comments() -> Mapping[str, str]:
    """Leading comment of every service, method, message, field, enum and value, by full name."""
    files = descriptor_pb2.FileDescriptorSet.FromString(
        (Path(forebay.__file__).parent / "contract.binpb").read_bytes()
    )
    out: dict[str, str] = {}
    for file in files.file:
        for location in file.source_code_info.location:
            if location.leading_comments:
                name = _name_at(file, list(location.path))
                if name:
                    out[name] = " ".join(location.leading_comments.split())
    return out


#: Field numbers of the repeated fields of descriptor.proto that hold named things.
_CHILDREN = {
    "FileDescriptorProto": {4: "message_type", 5: "enum_type", 6: "service"},
    "DescriptorProto": {2: "field", 3: "nested_type", 4: "enum_type"},
    "EnumDescriptorProto": {2: "value"},
    "ServiceDescriptorProto": {2: "method"},
}


def _name_at(file: descriptor_pb2.FileDescriptorProto, path: list[int]) -> str:
    """The full name of what a path of source locations leads to; empty for parts of things."""
    at: Any = file
    names = [file.package]
    while path:
        children = _CHILDREN.get(at.DESCRIPTOR.name, {})
        field = children.get(path[0])
        if field is None or len(path) < 2:
            return ""
        at = getattr(at, field)[path[1]]
        names.append(at.name)
        path = path[2:]
    return ".".join(names)
