"""The request queue: which items make the next batch. A plain data structure without threads.

The rules (docs/concepts.md has them with a picture):

- Work-conserving: `cut` gives a batch whenever anything waits.
- Every batch holds the oldest waiting item of the highest priority, so nothing starves: an item
  with k older ones waits for k batches at most.
- When more waits than one batch takes, the batch is filled with the window's items whose lengths
  are nearest below the oldest item's, then above: little padding, without a timer.
- padded length x rows stays within `max_batch_tokens`, rows within `max_batch_size`. An item that
  is larger than that runs alone.
- Cancelled and expired requests are dropped at the cut, and counted out of the bound at once.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections import deque
from dataclasses import dataclass
from itertools import count

from forebay.errors import QueueFull

from forebay_server.core.completion import RequestCompletion
from forebay_server.core.interfaces import Batch, BatchPolicy, Item

#: Bounds of the retry delay that a refusal names, seconds.
MIN_RETRY_S, MAX_RETRY_S = 0.01, 30.0


@dataclass(slots=True, eq=False)
class Entry:
    """One waiting item of a request."""

    owner: RequestCompletion
    index: int
    item: Item


@dataclass(slots=True)
class Cut:
    """The next batch with the owners of its items, in the batch's order."""

    batch: Batch
    entries: list[Entry]


class RequestQueue:
    """See the module. Not thread-safe: the batcher holds its lock around every call."""

    def __init__(self, policy: BatchPolicy) -> None:
        self.policy = policy
        self._lanes: dict[int, deque[Entry]] = {}
        self._priorities: list[int] = []
        self._deadlines: list[tuple[float, int, RequestCompletion]] = []
        self._sequence = count()
        self.waiting_rows = 0
        self.waiting_tokens = 0

    def __len__(self) -> int:
        """Rows that wait."""
        return self.waiting_rows

    def push(self, completion: RequestCompletion, rows_per_second: float = 0.0) -> None:
        """Queue a request's items.

        Args:
            rows_per_second: the engine's throughput, for a truthful retry delay; 0 = not known.

        Raises:
            QueueFull: it does not fit. A request that is larger than the bound fits an empty queue.
        """
        request = completion.request
        rows = sum(item.rows for item in request.items)
        if self.waiting_rows and self.waiting_rows + rows > self.policy.max_queue_size:
            excess = self.waiting_rows + rows - self.policy.max_queue_size
            delay = excess / rows_per_second if rows_per_second > 0 else 1.0
            raise QueueFull(
                f"the queue holds {self.waiting_rows} of {self.policy.max_queue_size} rows; "
                f"{rows} more do not fit",
                retry_after_s=min(MAX_RETRY_S, max(MIN_RETRY_S, delay)),
                metadata={
                    "waiting": str(self.waiting_rows),
                    "limit": str(self.policy.max_queue_size),
                },
            )
        lane = self._lanes.get(request.priority)
        if lane is None:
            lane = self._lanes[request.priority] = deque()
            self._priorities = sorted(self._lanes, reverse=True)
        for index, item in enumerate(request.items):
            lane.append(Entry(completion, index, item))
            self.waiting_tokens += item.length * item.rows
        completion.waiting_rows = rows
        self.waiting_rows += rows
        if request.deadline is not None:
            heapq.heappush(self._deadlines, (request.deadline, next(self._sequence), completion))

    def discard(self, completion: RequestCompletion) -> None:
        """Count a request out that is done before its time; its entries are skipped at the cut."""
        self.waiting_rows -= completion.waiting_rows
        completion.waiting_rows = 0

    def expire(self, now: float) -> list[RequestCompletion]:
        """Take out the requests whose deadline has passed while items of theirs wait."""
        out = []
        while self._deadlines and self._deadlines[0][0] <= now:
            completion = heapq.heappop(self._deadlines)[2]
            if completion.waiting_rows and not completion.done():
                self.discard(completion)
                out.append(completion)
        return out

    def next_deadline(self) -> float | None:
        """When to call `expire` next."""
        while self._deadlines:
            deadline, _, completion = self._deadlines[0]
            if completion.waiting_rows and not completion.done():
                return deadline
            heapq.heappop(self._deadlines)
        return None

    def oldest_enqueued(self) -> float | None:
        """When the oldest waiting request came; None when nothing waits."""
        heads = [lane[0].owner.enqueued for lane in self._lanes.values() if lane]
        return min(heads) if heads else None

    def full_batch_waits(self) -> bool:
        """Whether a batch that is cut now would be full, so that cutting early loses nothing."""
        return (
            self.waiting_rows >= self.policy.max_batch_size
            or self.waiting_tokens >= 2 * self.policy.max_batch_tokens
        )

    def cut(self) -> Cut | None:
        """The next batch; None when nothing waits."""
        for priority in self._priorities:
            lane = self._lanes[priority]
            window = self._window(lane)
            if window:
                chosen = self._choose(window)
                taken = set(map(id, chosen))
                lane.extendleft(e for e in reversed(window) if id(e) not in taken)
                return self._take(chosen)
        return None

    def _window(self, lane: deque[Entry]) -> list[Entry]:
        """The oldest entries that still matter, a few batches' worth."""
        policy = self.policy
        most_rows = policy.max_batch_size * policy.sort_window
        most_tokens = policy.max_batch_tokens * policy.sort_window
        out: list[Entry] = []
        rows = tokens = 0
        while lane and rows < most_rows and tokens < most_tokens:
            entry = lane.popleft()
            item = entry.item
            if entry.owner.done() or not entry.owner.waiting_rows:
                self.waiting_tokens -= item.length * item.rows
                continue
            out.append(entry)
            rows += item.rows
            tokens += item.length * item.rows
        return out

    def padded(self, length: int) -> int:
        """The length that items of at most `length` are padded to."""
        buckets = self.policy.length_buckets
        at = bisect_left(buckets, length)
        return buckets[at] if at < len(buckets) else length

    def _fits(self, longest: int, rows: int) -> bool:
        policy = self.policy
        return (
            rows <= policy.max_batch_size and self.padded(longest) * rows <= policy.max_batch_tokens
        )

    def _choose(self, window: list[Entry]) -> list[Entry]:
        """The oldest entry and those that go best with it."""
        oldest = window[0]
        group = oldest.item.group
        same = [e for e in window if e.item.group == group]
        lengths = [e.item.length for e in same]
        longest, rows = max(lengths), sum(e.item.rows for e in same)
        if self._fits(longest, rows):
            return same
        if longest == min(lengths):
            return self._fill([same[0]], same[1:])
        order = sorted(range(len(same)), key=lengths.__getitem__)
        at = order.index(0)
        chosen = self._fill([oldest], [same[i] for i in reversed(order[:at])])
        if len(chosen) == at + 1:  # all the shorter ones fit: go on with longer ones
            chosen = self._fill(chosen, [same[i] for i in order[at + 1 :]])
        return chosen

    def _fill(self, chosen: list[Entry], candidates: list[Entry]) -> list[Entry]:
        longest = max(e.item.length for e in chosen)
        rows = sum(e.item.rows for e in chosen)
        for entry in candidates:
            longest = max(longest, entry.item.length)
            rows += entry.item.rows
            if not self._fits(longest, rows):
                break
            chosen.append(entry)
        return chosen

    def _take(self, chosen: list[Entry]) -> Cut:
        rows = longest = 0
        items = []
        for entry in chosen:
            item = entry.item
            entry.owner.waiting_rows -= item.rows
            self.waiting_tokens -= item.length * item.rows
            rows += item.rows
            longest = max(longest, item.length)
            items.append(item)
        self.waiting_rows -= rows
        return Cut(Batch(items, self.padded(longest), rows), chosen)
