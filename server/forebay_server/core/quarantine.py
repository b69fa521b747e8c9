"""Items that crash engines, remembered by hash, so that a retry of theirs hurts nobody."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict

from forebay_server.core.interfaces import Clock, Item, TokenInput


def fingerprint(item: Item) -> bytes:
    """Hash of an item's input. Computed only once something has crashed: it costs a microsecond."""
    if item.fingerprint:
        return item.fingerprint
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(item.inputs, TokenInput):
        digest.update(item.inputs.ids.tobytes())
        if item.inputs.type_ids is not None:
            digest.update(b"types")
            digest.update(item.inputs.type_ids.tobytes())
    else:
        for name, array in sorted(item.inputs.items()):
            digest.update(f"{name}:{array.dtype.str}:{array.shape};".encode())
            # Object arrays hold pointers: their text is what they mean.
            digest.update(
                repr(array.tolist()).encode() if array.dtype == object else array.tobytes()
            )
    item.fingerprint = digest.digest()
    return item.fingerprint


class Quarantine:
    """Bounded memory of guilty items (refused) and suspects (run alone once more).

    Args:
        limit: items of each kind that are remembered; the oldest are forgotten.
        ttl_s: seconds after which a guilty item gets another chance: what failed may have been
            the machine's fault, and a valid input must not be refused for good.
    """

    def __init__(
        self, limit: int = 1024, ttl_s: float = 300.0, clock: Clock = time.monotonic
    ) -> None:
        self._limit = limit
        self._ttl_s = ttl_s
        self._clock = clock
        self._guilty: OrderedDict[bytes, tuple[str, float]] = OrderedDict()
        self._suspects: OrderedDict[bytes, None] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def empty(self) -> bool:
        """True when no item need be looked up."""
        return not self._guilty and not self._suspects

    def blame(self, item: Item, reason: str) -> None:
        """Refuse this item from now on."""
        key = fingerprint(item)
        with self._lock:
            self._suspects.pop(key, None)
            self._guilty.pop(key, None)
            self._guilty[key] = (reason, self._clock() + self._ttl_s)
            while len(self._guilty) > self._limit:
                self._guilty.popitem(last=False)

    def suspect(self, item: Item) -> None:
        """Run this item alone the next time."""
        key = fingerprint(item)
        with self._lock:
            self._suspects[key] = None
            self._suspects.move_to_end(key)
            while len(self._suspects) > self._limit:
                self._suspects.popitem(last=False)

    def acquit(self, item: Item) -> None:
        """The item ran well."""
        with self._lock:
            self._suspects.pop(fingerprint(item), None)

    def verdict(self, item: Item) -> str | None:
        """Why the item is refused; None when it is not."""
        with self._lock:
            now = self._clock()
            while self._guilty:  # all live equally long: the first are the oldest
                key, (_, until) = next(iter(self._guilty.items()))
                if until > now:
                    break
                del self._guilty[key]
            if not self._guilty:
                return None
            found = self._guilty.get(fingerprint(item))
            return None if found is None else found[0]

    def is_suspect(self, item: Item) -> bool:
        """Whether the item must run alone."""
        return bool(self._suspects) and fingerprint(item) in self._suspects
