"""Leases: for a moment, the extension answers by itself calls that ask the same as one that was answered
here. See server/native/src/lease.

Nothing that holds for a call is decided there. Who calls, what for, and how often, was decided here for the
call that it is like, and is looked at again every few hundredths of a second while such calls come; what
changes that (a key, a model, where its names lead) ends all leases at once. Calls and tokens of a key's
limits are lent out of its buckets, and taken back before any call is refused for the lack of them. Usage is
in the journal before an answer leaves; metrics, log and statistics follow.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from forebay.errors import ForebayError

from forebay_server.access.keys import KeyStore, Limits
from forebay_server.access.limits import Limiter, Loan
from forebay_server.access.usage import UsageLedger, line_start
from forebay_server.core.call import ANONYMOUS, Call, CallFacts, Principal
from forebay_server.dataplane.recipes import Recipe
from forebay_server.observability.tracing import parse_traceparent
from forebay_server.transport.stages import AccessLog, Measuring, bearer

if TYPE_CHECKING:
    import forebay_native

log = logging.getLogger("forebay.transport")

#: Seconds for which a lease holds unless it is renewed.
HOLD_S = 0.1
#: Seconds after an answer until leases are looked at: what was answered meanwhile is counted together.
GATHER_S = 0.02
#: Calls and items that are lent at once, at most: more than can come in HOLD_S.
MOST_CALLS, MOST_ITEMS = 8192, 65_536
#: Callers that were seen once are remembered, so many: who says something else with each call (a proxy's
#: id, say) is never seen again, and is leased nothing.
SEEN = 1024
#: Metadata that differs from call to call, and that no rule looks at; as in lease/mod.rs.
VARYING = frozenset(("x-request-id", "traceparent", "tracestate", "baggage"))
#: Trailers that count down, and whether they count tokens.
_COUNTS = {"x-ratelimit-remaining-requests": False, "x-ratelimit-remaining-tokens": True}

#: Method, metadata, head and model.
_Key = tuple[str, tuple[tuple[str, str], ...], bytes, int]


@dataclass(slots=True)
class _Lease:
    native: forebay_native.Lease
    recipe: Recipe
    like: Call
    key: _Key
    limits: Limits | None
    day: str
    until: float
    #: Calls that it answered since it was renewed.
    answered: int = 0


class Leasing:
    """See the module. Its methods are called from any thread.

    Args:
        measuring, access_log: hear of what was answered.
    """

    def __init__(
        self,
        keys: KeyStore,
        limiter: Limiter,
        ledger: UsageLedger,
        measuring: Measuring,
        access_log: AccessLog,
    ) -> None:
        self._keys = keys
        self._limiter = limiter
        self._ledger = ledger
        self._measuring = measuring
        self._access_log = access_log
        self._server: forebay_native.Server | None = None
        self._lock = threading.Lock()
        self._leases: dict[_Key, _Lease] = {}
        self._seen: OrderedDict[_Key, None] = OrderedDict()
        #: Counts changes: an offer that began before one comes to nothing.
        self._changes = 0
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="leases", daemon=True)

    def start(self, server: forebay_native.Server) -> None:
        """Begin to lease to this server's transport."""
        self._server = server
        self._ledger.share(server)
        self._thread.start()

    def close(self) -> None:
        """End all leases, and count what they answered."""
        self._ending.set()
        self.recall()
        self._ledger.share(None)

    def offer(self, call: Call) -> None:
        """A call of gRPC was answered well; those like it may be answered by the transport for a while."""
        before = self._changes
        recipe, call.recipe = call.recipe, None
        if not isinstance(recipe, Recipe) or self._server is None or self._ending.is_set():
            return
        lasting = tuple((k, v) for k, v in call.metadata.items() if k not in VARYING)
        key = (call.method.path, lasting, recipe.head, id(recipe.model))
        who, limits = call.principal, self._keys.limits(call.principal.key_id)
        with self._lock:
            if key in self._leases or not self._seen_before(key):
                return
            # Changed while the call was answered? Then it is not what others are to be like.
            if self._changes != before or not self._holds(call, limits, recipe):
                return
            made = recipe.make()
            loan = self._lend(who, limits, MOST_CALLS, MOST_ITEMS) if made is not None else None
            if made is None or loan is None:
                return
            day = self._ledger.today()
            model = recipe.model
            native = self._server.lease(
                cast(Any, call.origin),
                made,
                line_start((who.key_id, model.name, model.version), day),
                loan.calls,
                loan.tokens,
                _hold_s(),
                *_trailers(loan, loan.calls, loan.tokens),
            )
            if native is None:
                self._settle(who, limits, (0, 0), (loan.calls, loan.tokens))
                return
            until = time.monotonic() + HOLD_S
            self._leases[key] = _Lease(native, recipe, _like(call), key, limits, day, until)

    def settle(self, key_id: str) -> None:
        """Count now what the leases of a key have answered."""
        with self._lock:
            for lease in list(self._leases.values()):
                if lease.like.principal.key_id == key_id:
                    self._count(lease)

    def recall(self, key_id: str | None = None) -> None:
        """End the leases of a key, or all: what they rest on has changed, or is wanted elsewhere."""
        with self._lock:
            if key_id is None:
                self._changes += 1
            for lease in list(self._leases.values()):
                if key_id is None or lease.like.principal.key_id == key_id:
                    self._end(lease)

    def _run(self) -> None:
        assert self._server is not None
        while not self._ending.is_set():
            if self._server.wait_leased(HOLD_S if self._leases else 1.0):
                time.sleep(GATHER_S)
            with self._lock:
                now = time.monotonic()
                for lease in list(self._leases.values()):
                    self._look(lease, now)

    def _look(self, lease: _Lease, now: float) -> None:
        """Count what a lease has answered, and renew it if it did, or end it."""
        try:
            self._count(lease)
            if lease.answered:
                lease.answered = 0
                holds = self._renew(lease)
            else:
                holds = now < lease.until
        except Exception:  # a thread that dies would leave the other leases' calls uncounted
            log.exception("looking at a lease failed")
            holds = False
        if not holds:
            self._end(lease)

    def _count(self, lease: _Lease) -> None:
        """Tell everyone what was answered."""
        calls = items = 0
        like, model = lease.like, lease.recipe.model
        for rows, traceparent, each, seconds, engine_s in lease.native.take():
            n = len(seconds)
            like.facts = CallFacts(
                model.name,
                model.version,
                rows,
                compute_s=engine_s / n,
                engine_s=engine_s / n,
                batch_rows=rows,
            )
            trace = parse_traceparent(traceparent)
            like.context = {} if trace is None else {"trace": trace}
            model.client.answered(rows, n, engine_s)
            self._measuring.answered(like, seconds)
            self._access_log.answered(like, each)
            calls += n
            items += rows * n
        self._settle(like.principal, lease.limits, (calls, items), (0, 0))
        lease.answered += calls

    def _renew(self, lease: _Lease) -> bool:
        who, limits = lease.like.principal, lease.limits
        if self._ledger.today() != lease.day or not self._holds(lease.like, limits, lease.recipe):
            return False
        left_calls, left_items = lease.native.left()
        loan = self._lend(who, limits, MOST_CALLS - left_calls, MOST_ITEMS - left_items)
        if loan is None:
            return left_calls > 0 and left_items > 0  # it holds on for as long as it did
        lease.until = time.monotonic() + HOLD_S
        trailers = _trailers(loan, left_calls + loan.calls, left_items + loan.tokens)
        return lease.native.renew(loan.calls, loan.tokens, _hold_s(), *trailers)

    def _holds(self, like: Call, limits: Limits | None, recipe: Recipe) -> bool:
        """Whether a call like this would be admitted now as it was, and mean the same model."""
        who = like.principal
        try:
            now = self._keys.authenticate(bearer(like)) or ANONYMOUS
        except ForebayError:
            return False
        same = now == who and self._keys.limits(who.key_id) == limits
        budget = limits is not None and (limits.budget_tokens or limits.budget_money) is not None
        return same and not budget and recipe.valid(who)

    def _seen_before(self, key: _Key) -> bool:
        if key in self._seen:
            self._seen.move_to_end(key)
            return True
        self._seen[key] = None
        if len(self._seen) > SEEN:
            self._seen.popitem(last=False)
        return False

    def _end(self, lease: _Lease) -> None:
        self._leases.pop(lease.key, None)
        back = lease.native.end()
        try:
            self._count(lease)
        except Exception:
            log.exception("what a lease has answered could not be counted")
        self._settle(lease.like.principal, lease.limits, (0, 0), back)

    def _lend(self, who: Principal, limits: Limits | None, calls: int, items: int) -> Loan | None:
        if limits is None:
            return Loan(calls, items)
        return self._limiter.lend(who.key_id, limits, calls, items)

    def _settle(
        self, who: Principal, limits: Limits | None, used: tuple[int, int], back: tuple[int, int]
    ) -> None:
        if limits is not None:
            self._limiter.settle(who.key_id, limits, used, back)


def _like(call: Call) -> Call:
    """What is said of all calls that are answered like this one."""
    like = Call(call.method, call.metadata, started=0.0, on_end=lambda call: None)
    like.principal, like.code = call.principal, "OK"
    return like


def _hold_s() -> float:
    """Not beyond midnight (UTC): usage is by day."""
    return min(HOLD_S, 86400.0 - time.time() % 86400.0)


def _trailers(
    loan: Loan, calls: int, items: int
) -> tuple[list[tuple[str, str]], list[tuple[str, int, bool]]]:
    """Trailers of answers, and those that count down from what is left of a lease: such and such, and what
    the key has beside."""
    headers = loan.standing.headers()
    counts = [
        (name, int(value) - (items if _COUNTS[name] else calls), _COUNTS[name])
        for name, value in headers
        if name in _COUNTS
    ]
    return [h for h in headers if h[0] not in _COUNTS], counts
