"""What waits of one priority and group: a window of the oldest that is cut into slices, by length.

queue.py has the rules. A plain data structure without threads.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from math import inf

from forebay_server.core.completion import RequestCompletion
from forebay_server.core.interfaces import BatchPolicy, Item

#: Of entries together: the longest's padded length, rows, and the tokens that they would be padded
#: to if each were a batch of its own.
Size = tuple[int, int, int]
NOTHING: Size = (0, 0, 0)


@dataclass(slots=True, eq=False)
class Entry:
    """One waiting item of a request. `order` counts the queue's items: lower is older."""

    owner: RequestCompletion
    index: int
    item: Item
    order: int = 0

    def wanted(self) -> bool:
        """Whether anybody still waits for it."""
        return self.owner.waiting_rows > 0 and not self.owner.done()


def padded(policy: BatchPolicy, length: int) -> int:
    """The length that items of at most `length` are padded to: the next bucket, else itself."""
    buckets = policy.length_buckets
    if not buckets:
        return length
    at = bisect_left(buckets, length)
    return buckets[at] if at < len(buckets) else length


class Lane:
    """The items of one priority and group: a window that is cut into slices, and those behind it.

    `entries`, `rows` and `tokens` count all that is held, dropped ones included until met.
    """

    __slots__ = ("_pending", "_plan", "_policy", "entries", "key", "rows", "tokens")

    def __init__(self, policy: BatchPolicy, key: tuple[int, str]) -> None:
        self.key = key
        self._policy = policy
        self._pending: deque[Entry] = deque()
        #: Slices of the window, next last; the first is the remainder, with room to fill up.
        self._plan: list[list[Entry]] = []
        self.entries = 0
        self.rows = 0
        self.tokens = 0

    def __lt__(self, other: Lane) -> bool:
        return self.key < other.key  # never decides: orders differ

    def add(self, entry: Entry) -> None:
        """Append the newest item."""
        self._pending.append(entry)
        item = entry.item
        self.entries += 1
        self.rows += item.rows
        self.tokens += item.length * item.rows

    def order(self) -> int:
        """The order of the oldest item held, dropped ones included."""
        plan = self._plan
        if plan:  # slices are by age but for the remainder, which goes last
            return min(_age(plan[0]), _age(plan[-1]))
        return self._pending[0].order

    def oldest(self) -> Entry | None:
        """The oldest item that is wanted. Forgets dropped ones on the way."""
        plan = self._plan
        while plan:
            heads = [min(s, key=_order) for s in (plan[0], plan[-1])]
            head = min(heads, key=_order)
            if head.wanted():
                return head
            at = 0 if head is heads[0] else -1
            plan[at].remove(head)
            self._forget(head)
            if not plan[at]:
                del plan[at]
            plan[1:] = sorted(plan[1:], key=_age, reverse=True)  # without it, it may be younger
        while self._pending:
            if self._pending[0].wanted():
                return self._pending[0]
            self._forget(self._pending.popleft())
        return None

    def full(self) -> bool:
        """Whether the next batch is full."""
        return (
            len(self._plan) > 1
            or self.rows >= self._policy.max_batch_size
            or self.tokens >= self._policy.max_batch_tokens
        )

    def take(self) -> list[Entry]:
        """The next batch's items; only called when `oldest` gave one."""
        plan = self._plan
        seed: list[Entry] = []
        if len(plan) > 1 and _age(plan[0]) < _age(plan[-1]):
            # The remainder's turn has come: a full batch around its oldest, from the same window.
            entries = self._live([e for part in plan for e in part])
            entries.sort(key=_order)
            self._plan = []
            seed = self._around([], entries)
        while self._plan and not seed:
            seed = self._live(self._plan.pop())
            if seed and not self._plan and self._pending and self._room(seed):
                seed = self._around(seed, self._window())
        if not seed:
            seed = self._around([], self._window())
        for entry in seed:
            self._forget(entry)
        return seed

    def _forget(self, entry: Entry) -> None:
        item = entry.item
        self.entries -= 1
        self.rows -= item.rows
        self.tokens -= item.length * item.rows

    def _live(self, entries: list[Entry]) -> list[Entry]:
        live = [e for e in entries if e.wanted()]
        if len(live) < len(entries):
            for entry in entries:
                if not entry.wanted():
                    self._forget(entry)
        return live

    def _size(self, entries: Iterable[Entry], size: Size = NOTHING) -> Size:
        """`size` with these entries."""
        policy = self._policy
        longest, rows, apart = size
        for entry in entries:
            item = entry.item
            length = padded(policy, item.length)
            longest = max(longest, length)
            rows += item.rows
            apart += item.rows * length
        return longest, rows, apart

    def _fits(self, size: Size) -> bool:
        policy = self._policy
        longest, rows, apart = size
        together = longest * rows
        if rows > policy.max_batch_size or together > policy.max_batch_tokens:
            return False
        most = policy.max_padding_tokens
        return most is None or together - apart <= most

    def _room(self, entries: list[Entry]) -> bool:
        longest, rows, apart = self._size(entries)
        return self._fits((longest, rows + 1, apart + longest))

    def _around(self, seed: list[Entry], window: list[Entry]) -> list[Entry]:
        """A batch with `seed`, else with the window's first; what is left becomes the plan."""
        every = seed + window
        if self._fits(self._size(every)):
            return every
        if not seed:
            seed, window = window[:1], window[1:]
        keys = {id(e): padded(self._policy, e.item.length) for e in window}
        chosen = self._nearest(seed, window, keys)
        taken = set(map(id, chosen))
        rest = [e for e in window if id(e) not in taken]
        rest.sort(key=lambda e: keys[id(e)])
        self._slice(rest)
        return chosen

    def _window(self) -> list[Entry]:
        """The oldest entries that are wanted, a few batches' worth."""
        policy = self._policy
        most_rows = policy.max_batch_size * policy.sort_window
        most_tokens = policy.max_batch_tokens * policy.sort_window
        pending = self._pending
        out: list[Entry] = []
        rows = tokens = 0
        while pending:
            entry = pending[0]
            item = entry.item
            if not entry.wanted():
                self._forget(pending.popleft())
                continue
            rows += item.rows
            tokens += item.length * item.rows
            if out and (rows > most_rows or tokens > most_tokens):
                break
            out.append(pending.popleft())
        return out

    def _nearest(self, seed: list[Entry], window: list[Entry], keys: dict[int, int]) -> list[Entry]:
        """`seed` filled up with what brings least padding, oldest first among equals."""
        chosen, size = list(seed), self._size(seed)
        # Next last.
        shorter = [e for e in window if keys[id(e)] <= size[0]]
        shorter.sort(key=lambda e: (keys[id(e)], -e.order))
        longer = [e for e in window if keys[id(e)] > size[0]]
        longer.sort(key=lambda e: (-keys[id(e)], -e.order))
        while shorter or longer:
            longest, rows, _ = size
            # A shorter one is padded itself, a longer one has all the others padded.
            down = longest - keys[id(shorter[-1])] if shorter else inf
            up = (keys[id(longer[-1])] - longest) * rows if longer else inf
            entry = (shorter if down <= up else longer).pop()
            size = self._size((entry,), size)
            if not self._fits(size):
                break
            chosen.append(entry)
        return chosen

    def _slice(self, rest: list[Entry]) -> None:
        """Cut what is sorted by length into batches: full ones by age, the remainder last."""
        slices: list[list[Entry]] = []
        part: list[Entry] = []
        size = NOTHING
        for entry in rest:
            grown = self._size((entry,), size)
            if part and not self._fits(grown):
                slices.append(part)
                part, grown = [], self._size((entry,))
            part.append(entry)
            size = grown
        slices.sort(key=_age, reverse=True)
        self._plan = ([part] if part else []) + slices


def _order(entry: Entry) -> int:
    return entry.order


def _age(entries: list[Entry]) -> int:
    return min(e.order for e in entries)
