"""The request queue: which items make the next batch. A plain data structure without threads.

The rules (docs/concepts.md has them with a picture):

- Work-conserving: `cut` gives a batch whenever anything waits.
- The highest priority goes first; among equals, the group with the oldest waiting item.
- When one batch takes all of a group, it takes all, in order. When more waits, the oldest
  `sort_window` batches' worth become a window. Its first batch is the oldest item with those whose
  lengths are nearest; the rest is sorted by length and sliced, and the slices go out by age: little
  padding, without a timer. Newer items wait until the window is through, so nothing starves; they
  only fill up the room that its last slice leaves.
- padded length x rows stays within `max_batch_tokens`, rows within `max_batch_size`. An item that
  is larger than that runs alone.
- Cancelled and expired requests are dropped at the cut, and counted out of the bound at once.
- A request that would wait out most of its deadline is refused at once: to serve those that came
  in time, and not, first come first served, those whose callers are about to leave.

Each item is sorted once or twice and moved a few times, whatever the queue's length.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import count

from forebay.errors import QueueFull

from forebay_server.core.completion import RequestCompletion
from forebay_server.core.interfaces import Batch, BatchPolicy, Item

#: Bounds of the retry delay that a refusal names, seconds.
MIN_RETRY_S, MAX_RETRY_S = 0.01, 30.0
#: Share of the time left until a request's deadline that it may wait. The rest is for its batch,
#: its way back, and for what the throughput's estimate is off.
MOST_WAIT = 0.65


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


@dataclass(slots=True)
class Cut:
    """The next batch with the owners of its items, in the batch's order."""

    batch: Batch
    entries: list[Entry]


class RequestQueue:
    """See the module. Not thread-safe: the batcher holds its lock around every call."""

    def __init__(self, policy: BatchPolicy) -> None:
        self.policy = policy
        self._lanes: dict[tuple[int, str], _Lane] = {}
        #: One (-priority, order of the oldest item at most, lane) for each lane that has entries.
        self._ready: list[tuple[int, int, _Lane]] = []
        self._deadlines: list[tuple[float, int, RequestCompletion]] = []
        self._deadlines_bound = 256
        self._expired: list[RequestCompletion] = []
        self._orders = count()
        #: Rows and tokens that wait.
        self.waiting_rows = 0
        self.waiting_tokens = 0

    def __len__(self) -> int:
        """Rows that wait."""
        return self.waiting_rows

    def push(
        self,
        completion: RequestCompletion,
        tokens_per_second: float = 0.0,
        now: float = float("-inf"),
    ) -> None:
        """Queue a request's items.

        Args:
            tokens_per_second: what the engines work off when they are busy (tensors: rows); 0 = not
                known, then no request is refused for its deadline.
            now: for the time that is left until the request's deadline.

        Raises:
            QueueFull: it does not fit, or not before its deadline; `retry_after_s` is the time
                until it would. A request that is larger than the bound fits an empty queue.
        """
        request = completion.request
        rows = tokens = 0
        for item in request.items:
            rows += item.rows
            tokens += item.rows * item.length
        full = self.refusal(rows, request.deadline, tokens_per_second, now)
        if full is not None:
            raise full
        completion.waiting_rows = rows
        completion.waiting_tokens = tokens
        self.waiting_rows += rows
        self.waiting_tokens += tokens
        orders = self._orders
        for index, item in enumerate(request.items):
            entry = Entry(completion, index, item, next(orders))
            key = (request.priority, item.group)
            lane = self._lanes.get(key)
            if lane is None:
                lane = self._lanes[key] = _Lane(self.policy, key)
                heappush(self._ready, (-request.priority, entry.order, lane))
            lane.add(entry)
        if request.deadline is not None:
            heappush(self._deadlines, (request.deadline, next(orders), completion))
            if len(self._deadlines) > self._deadlines_bound:
                self._forget_deadlines()

    def refusal(
        self, rows: int, deadline: float | None, tokens_per_second: float, now: float
    ) -> QueueFull | None:
        """Why a request of so many rows would be refused now; see `push`."""
        wait = self.waiting_tokens / tokens_per_second if tokens_per_second > 0 else 0.0
        if wait and deadline is not None:
            left = deadline - now
            if self.waiting_tokens > self.policy.max_batch_tokens:
                # What the oldest has waited tells of engines that became slower than they were.
                oldest = self.oldest_enqueued()
                wait = wait if oldest is None else max(wait, now - oldest)
            if 0 < MOST_WAIT * left < wait:
                return QueueFull(
                    f"what waits takes {wait:.2f} s, too much of the {left:.2f} s that the deadline "
                    "leaves",
                    retry_after_s=min(MAX_RETRY_S, max(MIN_RETRY_S, wait - MOST_WAIT * left)),
                    metadata={"waiting": str(self.waiting_rows)},
                )
        if self.waiting_rows and self.waiting_rows + rows > self.policy.max_queue_size:
            delay = wait or 1.0
            return QueueFull(
                f"the queue holds {self.waiting_rows} of {self.policy.max_queue_size} rows; "
                f"{rows} more do not fit",
                retry_after_s=min(MAX_RETRY_S, max(MIN_RETRY_S, delay)),
                metadata={
                    "waiting": str(self.waiting_rows),
                    "limit": str(self.policy.max_queue_size),
                },
            )
        return None

    def discard(self, completion: RequestCompletion) -> None:
        """Count a request out that is done before its time; its entries are skipped at the cut."""
        self.waiting_rows -= completion.waiting_rows
        self.waiting_tokens -= completion.waiting_tokens
        completion.waiting_rows = completion.waiting_tokens = 0

    def expire(self, now: float) -> list[RequestCompletion]:
        """Take out, once, the requests whose deadline passed while items of theirs waited."""
        self._sweep(now)
        out, self._expired = self._expired, []
        return out

    def next_deadline(self) -> float | None:
        """When to call `expire` next."""
        if self._expired:
            return float("-inf")
        while self._deadlines:
            deadline, _, completion = self._deadlines[0]
            if completion.waiting_rows:
                return deadline
            heappop(self._deadlines)
        return None

    def oldest_enqueued(self) -> float | None:
        """When the oldest waiting request came; None when nothing waits."""
        if not self.waiting_rows:
            return None
        heads = [e.owner.enqueued for lane in self._lanes.values() if (e := lane.oldest())]
        return min(heads, default=None)

    def full_batch_waits(self) -> bool:
        """Whether a batch that is cut now would be full, so that cutting early loses nothing."""
        return bool(self._ready) and self.waiting_rows > 0 and self._ready[0][2].full()

    def cut(self, now: float = float("-inf")) -> Cut | None:
        """The next batch; None when nothing waits.

        Args:
            now: requests whose deadline is not after it are dropped; ask `expire` for them.
        """
        self._sweep(now)
        ready = self._ready
        while ready:
            priority, order, lane = heappop(ready)
            oldest = lane.oldest()
            if oldest is None:
                del self._lanes[lane.key]
                continue
            if oldest.order > order and ready and ready[0] < (priority, oldest.order):
                heappush(ready, (priority, oldest.order, lane))  # its oldest were dropped
                continue
            chosen = lane.take()
            if lane.entries:
                heappush(ready, (priority, lane.order(), lane))
            else:
                del self._lanes[lane.key]
            return self._take(chosen)
        return None

    def padded(self, length: int) -> int:
        """The length that items of at most `length` are padded to."""
        return padded(self.policy, length)

    def _sweep(self, now: float) -> None:
        deadlines = self._deadlines
        while deadlines and deadlines[0][0] <= now:
            completion = heappop(deadlines)[2]
            if completion.waiting_rows:
                self.discard(completion)
                self._expired.append(completion)

    def _forget_deadlines(self) -> None:
        """Drop requests that were served: with long deadlines they would pile up, results and all."""
        self._deadlines = [d for d in self._deadlines if d[2].waiting_rows]
        heapify(self._deadlines)
        self._deadlines_bound = 2 * len(self._deadlines) + 256

    def _take(self, chosen: list[Entry]) -> Cut:
        rows = longest = tokens = 0
        items = []
        for entry in chosen:
            item = entry.item
            entry.owner.waiting_rows -= item.rows
            entry.owner.waiting_tokens -= item.rows * item.length
            rows += item.rows
            tokens += item.rows * item.length
            if item.length > longest:
                longest = item.length
            items.append(item)
        self.waiting_rows -= rows
        self.waiting_tokens -= tokens
        return Cut(Batch(items, padded(self.policy, longest), rows), chosen)


def padded(policy: BatchPolicy, length: int) -> int:
    """The length that items of at most `length` are padded to: the next bucket, else itself."""
    buckets = policy.length_buckets
    if not buckets:
        return length
    at = bisect_left(buckets, length)
    return buckets[at] if at < len(buckets) else length


class _Lane:
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

    def __lt__(self, other: _Lane) -> bool:
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

    def _fits(self, longest: int, rows: int) -> bool:
        policy = self._policy
        return (
            rows <= policy.max_batch_size
            and padded(policy, longest) * rows <= policy.max_batch_tokens
        )

    def _room(self, entries: list[Entry]) -> bool:
        return self._fits(_longest(entries), sum(e.item.rows for e in entries) + 1)

    def _around(self, seed: list[Entry], window: list[Entry]) -> list[Entry]:
        """A batch with `seed`, else with the window's first; what is left becomes the plan."""
        every = seed + window
        if self._fits(_longest(every), sum(e.item.rows for e in every)):
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
        """`seed` filled up with the nearest shorter items, oldest first among equals, then longer."""
        longest = padded(self._policy, _longest(seed))
        shorter = [e for e in window if keys[id(e)] <= longest]
        shorter.sort(key=lambda e: keys[id(e)], reverse=True)
        chosen, full = self._fill(seed, shorter)
        if full or len(shorter) == len(window):
            return chosen
        longer = [e for e in window if keys[id(e)] > longest]
        longer.sort(key=lambda e: keys[id(e)])
        return self._fill(chosen, longer)[0]

    def _fill(self, chosen: list[Entry], candidates: list[Entry]) -> tuple[list[Entry], bool]:
        chosen = list(chosen)
        longest = _longest(chosen)
        rows = sum(e.item.rows for e in chosen)
        for entry in candidates:
            longest = max(longest, entry.item.length)
            rows += entry.item.rows
            if not self._fits(longest, rows):
                return chosen, True
            chosen.append(entry)
        return chosen, False

    def _slice(self, rest: list[Entry]) -> None:
        """Cut what is sorted by length into batches: full ones by age, the remainder last."""
        slices: list[list[Entry]] = []
        part: list[Entry] = []
        rows = longest = 0
        for entry in rest:
            item = entry.item
            longest = max(longest, item.length)
            if part and not self._fits(longest, rows + item.rows):
                slices.append(part)
                part, rows, longest = [], 0, item.length
            part.append(entry)
            rows += item.rows
        slices.sort(key=_age, reverse=True)
        self._plan = ([part] if part else []) + slices


def _order(entry: Entry) -> int:
    return entry.order


def _age(entries: list[Entry]) -> int:
    return min(e.order for e in entries)


def _longest(entries: list[Entry]) -> int:
    return max(e.item.length for e in entries)
