"""Pages of lists. A token holds the sort key of the page's last row, so that rows which come and go
meanwhile neither repeat nor hide another. It is opaque to callers, and good for one list.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import orjson
from forebay.errors import InvalidArgument
from google.protobuf.message import Message

T = TypeVar("T")
#: Values by which a list is sorted, ascending or descending; no two rows have the same.
Key = tuple[Any, ...]
#: Fields of a request that do not say which list it asks for.
_PLACE = ("page_size", "page_token", "after")


class Page:
    """The page that a request asks for.

    Args:
        request: has `page_size` and `page_token`.
        default: rows, where none are asked for.
        kinds: types of the values of the list's sort key.

    Attributes:
        size: rows at most.
        behind: sort key of the row before the page; None = the list's first page.

    Raises:
        InvalidArgument: the token was not made for this list.
    """

    def __init__(self, request: Message, default: int, *kinds: type) -> None:
        asked: Any = request
        self.size: int = asked.page_size or default
        self._list = _fingerprint(request)
        self.behind: Key | None = None
        if asked.page_token:
            self.behind = self._read(asked.page_token, kinds)

    def cut(self, rows: Sequence[T], key: Callable[[T], Key]) -> tuple[Sequence[T], str]:
        """The page of rows that begin with it, and the next one's token: empty where no row follows."""
        page = rows[: self.size]
        return page, self._token(key(page[-1])) if len(rows) > self.size else ""

    def of(self, values: Sequence[T], key: Callable[[T], Key]) -> tuple[Sequence[T], str]:
        """The page of a whole list, which is sorted by the key; and the next one's token."""
        behind = self.behind
        return self.cut(values if behind is None else [v for v in values if key(v) > behind], key)

    def _token(self, key: Key) -> str:
        text = orjson.dumps((self._list, *key))
        return base64.urlsafe_b64encode(text).decode().rstrip("=")

    def _read(self, token: str, kinds: tuple[type, ...]) -> Key:
        try:
            found = orjson.loads(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)))
            key = tuple(found[1:])
            known = found[0] == self._list and tuple(map(type, key)) == kinds
            if known and self._token(key) == token and all(map(_storable, key)):
                return key
        except (ValueError, TypeError, KeyError, IndexError):
            pass  # refused below
        raise InvalidArgument.at("page_token", "is not a next_page_token of this list")


def _fingerprint(request: Message) -> str:
    """Which list it is: the method's request without what says where in the list."""
    named: Any = type(request)()
    named.CopyFrom(request)
    for field in named.DESCRIPTOR.fields:
        if field.name in _PLACE:
            named.ClearField(field.name)
    text = named.DESCRIPTOR.full_name.encode() + named.SerializeToString(deterministic=True)
    return hashlib.sha256(text).hexdigest()[:16]


def _storable(value: Any) -> bool:
    """Whether a database can compare with it: a token is a caller's words, after all."""
    if type(value) is int:
        return abs(value) < 2**63
    return "\0" not in value if type(value) is str else True
