"""Items that crash engines, remembered by hash, so that a retry of theirs hurts nobody."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict

from forebay_server.core.interfaces import Item, TokenInput


def fingerprint(item: Item) -> bytes:
    """Hash of an item's input. Computed only once something has crashed: it costs a microsecond."""
    if item.fingerprint:
        return item.fingerprint
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(item.inputs, TokenInput):
        digest.update(item.inputs.ids.tobytes())
    else:
        for name, array in sorted(item.inputs.items()):
            digest.update(name.encode())
            # Object arrays hold pointers: their text is what they mean.
            digest.update(
                repr(array.tolist()).encode() if array.dtype == object else array.tobytes()
            )
    item.fingerprint = digest.digest()
    return item.fingerprint


class Quarantine:
    """Bounded memory of guilty items (refused) and suspects (run alone once more)."""

    def __init__(self, limit: int = 1024) -> None:
        self._limit = limit
        self._guilty: OrderedDict[bytes, str] = OrderedDict()
        self._suspects: OrderedDict[bytes, None] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def empty(self) -> bool:
        """True when no item need be looked up."""
        return not self._guilty and not self._suspects

    def blame(self, item: Item, reason: str) -> None:
        """Refuse this item from now on."""
        with self._lock:
            key = fingerprint(item)
            self._suspects.pop(key, None)
            self._guilty[key] = reason
            while len(self._guilty) > self._limit:
                self._guilty.popitem(last=False)

    def suspect(self, item: Item) -> None:
        """Run this item alone the next time."""
        with self._lock:
            self._suspects[fingerprint(item)] = None
            while len(self._suspects) > self._limit:
                self._suspects.popitem(last=False)

    def acquit(self, item: Item) -> None:
        """The item ran well."""
        with self._lock:
            self._suspects.pop(fingerprint(item), None)

    def verdict(self, item: Item) -> str | None:
        """Why the item is refused; None when it is not."""
        return self._guilty.get(fingerprint(item))

    def is_suspect(self, item: Item) -> bool:
        """Whether the item must run alone."""
        return fingerprint(item) in self._suspects
