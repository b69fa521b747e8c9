"""Conditions on points, free of any protocol, and their keys for caching."""

from __future__ import annotations

from dataclasses import dataclass

#: Depth of nested conditions at most.
MAX_DEPTH = 16
Scalar = str | float | bool


@dataclass(frozen=True, slots=True)
class AllOf:
    """Every one holds."""

    filters: tuple[Filter, ...]


@dataclass(frozen=True, slots=True)
class AnyOf:
    """At least one holds."""

    filters: tuple[Filter, ...]


@dataclass(frozen=True, slots=True)
class NoneOf:
    """None holds."""

    filters: tuple[Filter, ...]


@dataclass(frozen=True, slots=True)
class OneOf:
    """A key has one of these values. Numbers are floats; types do not mix."""

    key: str
    values: tuple[tuple[str, Scalar], ...]


@dataclass(frozen=True, slots=True)
class InRange:
    """A key's number lies between `low` and `high`; open bounds exclude their own value."""

    key: str
    low: float
    high: float
    low_open: bool = False
    high_open: bool = False


@dataclass(frozen=True, slots=True)
class DateRange:
    """A key's date lies in [since, until), seconds since 1970."""

    key: str
    since: float
    until: float


@dataclass(frozen=True, slots=True)
class Exists:
    """A key is there and not null."""

    key: str


@dataclass(frozen=True, slots=True)
class Words:
    """A text field holds all words, one after another where `phrase`."""

    key: str
    text: str
    phrase: bool = False


@dataclass(frozen=True, slots=True)
class Ids:
    """The point's id is one of these."""

    ids: frozenset[str]


Filter = AllOf | AnyOf | NoneOf | OneOf | InRange | DateRange | Exists | Words | Ids


def tagged(value: Scalar) -> tuple[str, Scalar]:
    """A value with its type: Python's True equals 1, a payload's does not."""
    if isinstance(value, bool):
        return ("bool", value)
    if isinstance(value, int | float):
        return ("number", float(value))
    return ("string", value)
