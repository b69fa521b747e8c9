"""Reading JSON bodies whose shape is somebody else's: strict about types, clear about paths."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from forebay.errors import InvalidArgument


def only(body: dict[str, Any], known: Collection[str]) -> None:
    """Refuse fields that are not supported, by name: they must not be ignored in silence."""
    for name, value in body.items():
        if name not in known and value is not None:
            raise InvalidArgument.at(
                name, f"is not supported here; supported are {', '.join(sorted(known))}"
            )


def text(body: dict[str, Any], name: str, default: str | None = None) -> str:
    """A string field."""
    value = body.get(name)
    if value is None:
        if default is None:
            raise InvalidArgument.at(name, "is required")
        return default
    if not isinstance(value, str):
        raise InvalidArgument.at(name, f"is a {kind(value)}; a string is needed")
    return value


def number(body: dict[str, Any], name: str) -> int | None:
    """A whole number, None when it is not given."""
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not -(2**31) <= value < 2**31:
        raise InvalidArgument.at(name, f"is {value!r:.40}; a whole number is needed")
    return value


def flag(body: dict[str, Any], name: str, default: bool = False) -> bool:
    """A boolean."""
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise InvalidArgument.at(name, f"is a {kind(value)}; true or false is needed")
    return value


def texts(body: dict[str, Any], name: str) -> list[str]:
    """A string, or a list of strings."""
    value = body.get(name)
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise InvalidArgument.at(name, "must be a string or a list of strings that is not empty")
    for i, one in enumerate(value):
        if not isinstance(one, str):
            raise InvalidArgument.at(f"{name}[{i}]", f"is a {kind(one)}; a string is needed")
    return value


def kind(value: Any) -> str:
    """JSON's word for a value's type."""
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
