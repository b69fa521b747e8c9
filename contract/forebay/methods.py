"""Facts about the contract's methods, read from the descriptors: kinds, scopes, message classes."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, cast

from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message

from forebay.options.v1 import constraints_pb2

Kind = Literal["unary", "server_stream", "client_stream", "bidi_stream"]

#: Packages of the generated contract that may hold services; every module of them is looked at.
SERVICE_PACKAGES = ("forebay.v1", "forebay.oip")


@dataclass(frozen=True, slots=True)
class Method:
    """One method of the contract.

    Attributes:
        path: `/forebay.v1.EmbeddingService/Embed`, as on the wire.
        scope: `public`, `infer`, `read` or `admin`.
        batched: short unary call that the transport hands over in batches.
        mutates: honours `idempotency-key`.
        content_type: REST answers with the bytes of the stream's `data` fields; empty = no such.
    """

    path: str
    service: str
    name: str
    kind: Kind
    scope: str
    batched: bool
    mutates: bool
    request: type[Message]
    response: type[Message]
    content_type: str = ""


def _kind(method: MethodDescriptor) -> Kind:
    if method.client_streaming:
        return "bidi_stream" if method.server_streaming else "client_stream"
    return "server_stream" if method.server_streaming else "unary"


def _method(service: ServiceDescriptor, method: MethodDescriptor) -> Method:
    rules = method.GetOptions().Extensions[cast(Any, constraints_pb2.method)]
    if rules.scope == constraints_pb2.SCOPE_UNSPECIFIED:
        raise ValueError(
            f"{method.full_name} names no scope in its forebay.options.v1.method option"
        )
    return Method(
        path=f"/{service.full_name}/{method.name}",
        service=service.full_name,
        name=method.name,
        kind=_kind(method),
        scope=constraints_pb2.Scope.Name(rules.scope).removeprefix("SCOPE_").lower(),
        batched=rules.batched,
        mutates=rules.mutates,
        request=message_factory.GetMessageClass(method.input_type),
        response=message_factory.GetMessageClass(method.output_type),
        content_type=rules.content_type,
    )


def service_descriptors() -> Iterator[ServiceDescriptor]:
    """The services of the contract."""
    for package in SERVICE_PACKAGES:
        for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
            if module.name.endswith("_pb2"):
                loaded = importlib.import_module(f"{package}.{module.name}")
                yield from loaded.DESCRIPTOR.services_by_name.values()


@cache
def methods() -> dict[str, Method]:
    """Every method by its path. Raises ValueError for a method without a scope."""
    out = {}
    for service in service_descriptors():
        for method in service.methods:
            m = _method(service, method)
            out[m.path] = m
    return out
