"""Which version a reference means."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable, Mapping

from forebay.errors import InvalidArgument, NotFound

from forebay_server.repository.state import Routing

PRODUCTION = "production"
#: Models that an error names.
MAX_NAMED = 10


def parse(ref: str) -> tuple[str, str]:
    """Name and selector of `name`, `name@3` or `name@alias`; the selector may be empty."""
    name, _, selector = ref.partition("@")
    return name, selector


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """Known names that look like it, best first."""
    return difflib.get_close_matches(name, sorted(known), n=3)


def some(known: Iterable[str]) -> list[str]:
    """The first of the known names, and how many more there are."""
    names = sorted(known)
    more = len(names) - MAX_NAMED
    return [*names[:MAX_NAMED], f"{more} more"] if more > 0 else names


def by_alias(ref: str, routings: Mapping[str, Routing]) -> str | None:
    """`model@alias` for a bare alias that exactly one model has; None when none has it."""
    owners = sorted(m for m, r in routings.items() if ref in r.aliases)
    if len(owners) > 1:
        options = ", ".join(f"{o}@{ref}" for o in owners)
        raise InvalidArgument.at("model", f"the alias {ref!r} is that of several models: {options}")
    return f"{owners[0]}@{ref}" if owners else None


def select(
    name: str, selector: str, versions: Iterable[int], routing: Routing, key: str
) -> int | None:
    """The version that a selector means; None = the model's newest that serves.

    Args:
        key: keeps a caller on one version of a traffic split.

    Raises:
        NotFound: no such version or alias.
    """
    have = sorted(versions)
    if selector:
        if selector.isascii() and selector.isdigit():
            version = int(selector)
            if version not in have:
                raise NotFound(
                    "model version",
                    f"{name}@{selector}",
                    nearest=[f"{name}@{v}" for v in have[-3:]],
                )
            return version
        if selector not in routing.aliases:
            raise NotFound(
                "model alias",
                f"{name}@{selector}",
                nearest=[f"{name}@{a}" for a in nearest(selector, routing.aliases)],
                known=[f"{name}@{a}" for a in some(routing.aliases)],
            )
        return routing.aliases[selector]
    if routing.shares:
        return split(name, key, routing.shares)
    return routing.aliases.get(PRODUCTION)


def split(name: str, key: str, shares: Mapping[int, int]) -> int:
    """A version by weight. The same key gets the same version as long as the weights stay."""
    total = sum(shares.values())
    digest = hashlib.blake2b(f"{name}\0{key}".encode(), digest_size=8).digest()
    point = int.from_bytes(digest, "little") / 2**64 * total
    for version, weight in sorted(shares.items()):
        if point < weight:
            return version
        point -= weight
    return max(v for v, w in shares.items() if w)
