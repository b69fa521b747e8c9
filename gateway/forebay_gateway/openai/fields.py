"""Reading JSON bodies whose shape is somebody else's: strict about types, clear about paths."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

from forebay.errors import InvalidArgument
from starlette.requests import Request

T = TypeVar("T")


def only(body: dict[str, Any], known: Collection[str], at: str = "") -> None:
    """Refuse fields that are not supported, by name: they must not be ignored in silence. `at` is the
    path of the object that has them, as everywhere here."""
    for name, value in body.items():
        if name not in known and value is not None:
            raise InvalidArgument.at(
                _path(at, name), f"is not supported here; supported are {', '.join(sorted(known))}"
            )


def text(body: dict[str, Any], name: str, default: str | None = None, at: str = "") -> str:
    """A string field."""
    value = body.get(name)
    if value is None:
        if default is None:
            raise InvalidArgument.at(_path(at, name), "is required")
        return default
    if not isinstance(value, str):
        raise InvalidArgument.at(_path(at, name), f"is a {kind(value)}; a string is needed")
    return value


def number(body: dict[str, Any], name: str) -> int | None:
    """A whole number, None when it is not given."""
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not -(2**31) <= value < 2**31:
        raise InvalidArgument.at(name, f"is {value!r:.40}; a whole number is needed")
    return value


def flag(body: dict[str, Any], name: str, default: bool = False, at: str = "") -> bool:
    """A boolean."""
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise InvalidArgument.at(_path(at, name), f"is a {kind(value)}; true or false is needed")
    return value


def items(body: dict[str, Any], name: str, at: str = "") -> list[Any]:
    """A list; empty when it is not given."""
    value = body.get(name)
    if value is None:
        return []
    if not isinstance(value, list):
        raise InvalidArgument.at(_path(at, name), f"is a {kind(value)}; a list is needed")
    return value


def named(table: Mapping[str, T], value: Any) -> T | None:
    """What a word stands for; None for what is no word of the table, or no word at all."""
    return table.get(value) if isinstance(value, str) else None


def _path(at: str, name: str) -> str:
    return f"{at}.{name}" if at else name


def texts(body: dict[str, Any], name: str, at: str = "") -> list[str]:
    """A string, or a list of strings."""
    value, path = body.get(name), _path(at, name)
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise InvalidArgument.at(path, "must be a string or a list of strings that is not empty")
    for i, one in enumerate(value):
        if not isinstance(one, str):
            raise InvalidArgument.at(f"{path}[{i}]", f"is a {kind(one)}; a string is needed")
    return value


def kind(value: Any) -> str:
    """JSON's word for a value's type."""
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def metadata(body: dict[str, Any]) -> dict[str, str]:
    """Facts of the caller's own: strings by name."""
    value = body.get("metadata")
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InvalidArgument.at("metadata", f"is a {kind(value)}; an object is needed")
    for name, one in value.items():
        if not isinstance(one, str):
            raise InvalidArgument.at(f"metadata.{name}", f"is a {kind(one)}; a string is needed")
    return value


def query(request: Request, known: Collection[str]) -> dict[str, str]:
    """The query's parameters; refuses those that are not supported, by name."""
    for name in request.query_params:
        if name not in known:
            raise InvalidArgument.at(
                name, f"is not supported here; supported are {', '.join(sorted(known))}"
            )
    return dict(request.query_params)


def limit(given: dict[str, str], most: int, default: int = 20) -> int:
    """`limit` of a list."""
    text_ = given.get("limit")
    if text_ is None:
        return default
    if not text_.isascii() or not text_.isdigit() or not 1 <= int(text_[:9]) <= most:
        raise InvalidArgument.at("limit", f"is {text_!r:.20}; allowed is from 1 to {most}")
    return int(text_)


def order(given: dict[str, str]) -> bool:
    """`order` of a list: whether the oldest comes first."""
    value = given.get("order", "desc")
    if value not in ("asc", "desc"):
        raise InvalidArgument.at("order", f"is {value!r:.20}; allowed are asc, desc")
    return value == "asc"


def listed(found: Sequence[dict[str, Any]], more: bool) -> dict[str, Any]:
    """A page of a list."""
    return {
        "object": "list",
        "data": found,
        "first_id": found[0]["id"] if found else None,
        "last_id": found[-1]["id"] if found else None,
        "has_more": more,
    }
