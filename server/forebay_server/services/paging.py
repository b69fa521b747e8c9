"""Pages of lists. A token is the offset of the next page, opaque to callers."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import TypeVar

from forebay.errors import InvalidArgument

T = TypeVar("T")


def page_size(asked: int, default: int) -> int:
    """The size in force."""
    return asked or default


def offset(token: str) -> int:
    """Where a page begins. Raises InvalidArgument for a token that we did not make."""
    if not token:
        return 0
    try:
        text = base64.urlsafe_b64decode(token.encode()).decode("ascii")
        kind, _, number = text.partition(":")
        if kind == "offset" and number.isdigit() and len(number) < 16:
            return int(number)
    except ValueError:
        pass  # refused below
    raise InvalidArgument.at("page_token", "is not a next_page_token of this method")


def token(position: int) -> str:
    """The token of a page that begins there."""
    return base64.urlsafe_b64encode(f"offset:{position}".encode()).decode()


def page(values: Sequence[T], page_token: str, size: int) -> tuple[Sequence[T], str]:
    """A page, and the token of the next one (empty at the end)."""
    start = offset(page_token)
    end = start + size
    return values[start:end], token(end) if end < len(values) else ""
