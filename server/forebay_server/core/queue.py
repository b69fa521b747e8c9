"""The request queue: which items make the next batch. A plain data structure without threads.

The rules (docs/concepts.md has them with a picture):

- Work-conserving: `cut` gives a batch whenever anything waits.
- The highest priority goes first; among equals, the group with the oldest waiting item.
- When one batch takes all of a group, it takes all, in order. When it does not, the oldest
  `sort_window` batches' worth become a window. Its first batch is the oldest item with those whose
  lengths are nearest; the rest is sorted by length and sliced, and the slices go out by age: little
  padding, without a timer. Newer items wait until the window is through, so nothing starves; they
  only fill up the room that its last slice leaves.
- padded length x rows stays within `max_batch_tokens`, rows within `max_batch_size`, the tokens that
  a batch pads within `max_padding_tokens`. An item that is larger than that runs alone.
- Cancelled and expired requests are dropped at the cut, and counted out of the bound at once.
- A request that would be answered after most of its deadline is refused at once: to serve those that
  came in time, and not, first come first served, those whose callers are about to leave.

Each item is sorted once or twice and moved a few times, whatever the queue's length.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import count

from forebay.errors import QueueFull

from forebay_server.core.completion import RequestCompletion
from forebay_server.core.interfaces import Batch, BatchPolicy
from forebay_server.core.lane import Entry, Lane, padded

#: Bounds of the retry delay that a refusal names, seconds.
MIN_RETRY_S, MAX_RETRY_S = 0.01, 30.0
#: Share of the time left until a request's deadline within which its answer must be likely. The rest
#: is for its way back, and for what the throughput's estimate is off.
MOST_OF_DEADLINE = 0.65
#: A refusal holds for all that comes as late: for so long, and while a full batch waits for half of the
#: time that what waits will take, since calls come in again long before engines want for any.
LEAST_HOLD_S, MOST_HOLD_S = 0.025, 0.1
#: Of the time that engines take for a call: where rows fill the queue, calls come in so far apart after a
#: hold. Tables come in faster than Python reads them; where it is small calls that are late, they do not.
GAP_SHARE = 0.65


def _hold(wait_s: float) -> float:
    return min(MOST_HOLD_S, max(LEAST_HOLD_S, wait_s / 2))


@dataclass(slots=True)
class Cut:
    """The next batch with the owners of its items, in the batch's order."""

    batch: Batch
    entries: list[Entry]


class RequestQueue:
    """See the module. Not thread-safe: the batcher holds its lock around every call."""

    def __init__(self, policy: BatchPolicy) -> None:
        self.policy = policy
        self._lanes: dict[tuple[int, str], Lane] = {}
        #: One (-priority, order of the oldest item at most, lane) for each lane that has entries.
        self._ready: list[tuple[int, int, Lane]] = []
        self._deadlines: list[tuple[float, int, RequestCompletion]] = []
        self._deadlines_bound = 256
        self._expired: list[RequestCompletion] = []
        self._orders = count()
        #: Rows and tokens that wait.
        self.waiting_rows = 0
        self.waiting_tokens = 0
        #: Tokens that wait, by priority.
        self._ahead: dict[int, int] = {}

    def __len__(self) -> int:
        """Rows that wait."""
        return self.waiting_rows

    def push(
        self,
        completion: RequestCompletion,
        tokens_per_second: float = 0.0,
        now: float = float("-inf"),
        running_tokens: int = 0,
    ) -> None:
        """Queue a request's items.

        Args:
            tokens_per_second: what the engines work off when they are busy (tensors: rows); 0 = not
                known, then no request is refused for its deadline.
            now: for the time that is left until the request's deadline.
            running_tokens: of batches that were cut and are not answered.

        Raises:
            QueueFull: it does not fit, or not before its deadline; `retry_after_s` is the time
                until it would. A request that is larger than the bound fits an empty queue.
        """
        request = completion.request
        rows = tokens = 0
        for item in request.items:
            rows += item.rows
            tokens += item.rows * item.length
        full = self.refusal(
            rows, request.deadline, tokens_per_second, now, running_tokens, request.priority
        )
        if full is not None:
            raise full
        completion.waiting_rows = rows
        completion.waiting_tokens = tokens
        self.waiting_rows += rows
        self.waiting_tokens += tokens
        self._ahead[request.priority] = self._ahead.get(request.priority, 0) + tokens
        orders = self._orders
        for index, item in enumerate(request.items):
            entry = Entry(completion, index, item, next(orders))
            key = (request.priority, item.group)
            lane = self._lanes.get(key)
            if lane is None:
                lane = self._lanes[key] = Lane(self.policy, key)
                heappush(self._ready, (-request.priority, entry.order, lane))
            lane.add(entry)
        if request.deadline is not None:
            heappush(self._deadlines, (request.deadline, next(orders), completion))
            if len(self._deadlines) > self._deadlines_bound:
                self._forget_deadlines()

    def refusal(
        self,
        rows: int,
        deadline: float | None,
        tokens_per_second: float,
        now: float,
        running_tokens: int = 0,
        priority: int = 0,
        ahead: int = 0,
    ) -> QueueFull | None:
        """Why a request of so many rows would be refused now; see `push`. Its `holds_s` is the time
        for which every request that comes as late would be refused too. `ahead`: so many rows will
        have come before it."""
        policy = self.policy
        waiting = sum(n for p, n in self._ahead.items() if p >= priority)  # the others go behind it
        batch = min(
            policy.max_batch_tokens,
            policy.max_batch_size * self.waiting_tokens // max(1, self.waiting_rows),
        )
        wait = waiting / tokens_per_second if tokens_per_second > 0 else 0.0
        if wait and deadline is not None:
            left = deadline - now
            if waiting > batch:
                # What the oldest has waited tells of engines that became slower than they were.
                oldest = self.oldest_enqueued(priority)
                wait = wait if oldest is None else max(wait, now - oldest)
            # Before it run the batches that are cut, and with it what comes behind it.
            took = wait + (running_tokens + min(waiting, batch)) / tokens_per_second
            late = took - MOST_OF_DEADLINE * left
            if left > 0 and late > 0:
                full = QueueFull(
                    f"the answer would take {took:.2f} s, too much of the {left:.2f} s that the "
                    "deadline leaves",
                    retry_after_s=min(MAX_RETRY_S, max(MIN_RETRY_S, late)),
                    metadata={"waiting": str(self.waiting_rows)},
                )
                full.holds_s = _hold(wait) if waiting > batch else min(LEAST_HOLD_S, late)
                full.within_s = took / MOST_OF_DEADLINE
                return full
        before = self.waiting_rows
        # Emptier, the engine keeps up: it may take those first.
        if 2 * before > policy.max_queue_size:
            before += ahead
        if before and before + rows > policy.max_queue_size:
            full = QueueFull(
                f"the queue holds {before} of {policy.max_queue_size} rows; {rows} more do not fit",
                retry_after_s=min(MAX_RETRY_S, max(MIN_RETRY_S, wait or 1.0)),
                metadata={
                    "waiting": str(before),
                    "limit": str(policy.max_queue_size),
                },
            )
            room = wait * rows / before  # until as many have left; fewer may fit before
            full.gap_s = GAP_SHARE * room
            full.holds_s = _hold(wait) if waiting > batch else min(LEAST_HOLD_S, room)
            full.by_size = True
            return full
        return None

    def discard(self, completion: RequestCompletion) -> None:
        """Count a request out that is done before its time; its entries are skipped at the cut."""
        self.waiting_rows -= completion.waiting_rows
        self.waiting_tokens -= completion.waiting_tokens
        self._ahead[completion.request.priority] -= completion.waiting_tokens
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

    def oldest_enqueued(self, priority: int | None = None) -> float | None:
        """When the oldest waiting request (of that priority or a higher one) came; None when nothing
        waits."""
        if not self.waiting_rows:
            return None
        lanes = self._lanes.items()
        lanes = (lane for key, lane in lanes if priority is None or key[0] >= priority)
        heads = [e.owner.enqueued for lane in lanes if (e := lane.oldest())]
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
            self._ahead[entry.owner.request.priority] -= item.rows * item.length
            rows += item.rows
            tokens += item.rows * item.length
            if item.length > longest:
                longest = item.length
            items.append(item)
        self.waiting_rows -= rows
        self.waiting_tokens -= tokens
        return Cut(Batch(items, padded(self.policy, longest), rows), chosen)
