"""Work that outlives its call: whose it is, and what it used, counted with its result or not at all.

A call's usage is journalled by the transport. Work that runs later and may run again after a crash
is counted in the very transaction that stores its result: what has a result is charged once, what
was cut off is not charged.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from forebay.methods import Method
from sqlalchemy.ext.asyncio import AsyncConnection

from forebay_server.access.budgets import SPENDING, Budgets
from forebay_server.access.keys import KeyStore, require_scope
from forebay_server.access.usage import UsageKey, UsageLedger
from forebay_server.core.call import Call


class DeferredWork:
    """See the module. Lives on one event loop."""

    def __init__(self, keys: KeyStore, budgets: Budgets, ledger: UsageLedger) -> None:
        self._keys = keys
        self._budgets = budgets
        self._ledger = ledger

    async def call(
        self,
        method: Method,
        key_id: str,
        request_id: str,
        on_end: Callable[[Call], None] = lambda _: None,
    ) -> Call:
        """A call of the server's own in the name of a key.

        Raises:
            Unauthenticated, PermissionDenied: the key may no longer do this.
        """
        call = Call(method, {}, started=time.monotonic(), on_end=on_end)
        call.principal = self._keys.principal(key_id)
        call.request_id = request_id
        require_scope(call.principal, method.scope)
        # Budgets are in memory from here on, so that `settle` neither misses nor doubles anything.
        await self._budgets.standing(key_id)
        return call

    def check(self, key_id: str) -> None:
        """Raise Unauthenticated when the key may no longer do anything."""
        self._keys.principal(key_id)

    def admit(self, call: Call) -> None:
        """Raise RateLimited when the call takes tokens and none are left of its key's budget."""
        key_id = call.principal.key_id
        limits = self._budgets.limits(key_id)
        refusal = self._budgets.refusal(key_id, limits) if call.method.path in SPENDING else None
        if refusal is not None:
            raise refusal

    def settle(self, call: Call) -> None:
        """The work has ended: give back what its budget had reserved and not used."""
        self._budgets.settle(call)

    async def count(self, db: AsyncConnection, call: Call, code: str, calls: int = 1) -> None:
        """Count what the work used, in the transaction that stores its result."""
        f = call.facts
        user = str(call.context.get("user") or "")
        key: UsageKey = (call.principal.key_id, f.model, f.version, user)
        cost = float(call.context.get("cost", 0.0))  # type: ignore[arg-type]
        cancelled = code == "CANCELLED"
        failed = code != "OK" and not cancelled
        await self._ledger.add(
            db,
            key,
            (calls, f.items, f.tokens, f.cached, failed, cancelled, f.engine_s * 1e3, cost),
        )
