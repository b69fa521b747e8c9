"""UsageService: what was used."""

from __future__ import annotations

import csv
import datetime
import io
from collections.abc import AsyncIterator
from typing import cast

from forebay.errors import InvalidArgument
from forebay.v1 import usage_pb2 as pb

from forebay_server.access.budgets import Budgets
from forebay_server.access.keys import require_scope
from forebay_server.access.usage import COUNTERS, Counters, UsageLedger, UsageRow
from forebay_server.core.call import Call
from forebay_server.services.base import Service
from forebay_server.services.paging import Page

#: Rows of one piece of a table.
PIECE = 1000


class UsageService(Service):
    """See protos/forebay/v1/usage.proto."""

    name = "forebay.v1.UsageService"

    def __init__(self, ledger: UsageLedger, budgets: Budgets) -> None:
        self._ledger = ledger
        self._budgets = budgets

    async def get_usage(self, call: Call) -> pb.GetUsageResponse:
        """GetUsage."""
        request = cast(pb.GetUsageRequest, call.request)
        key_id = request.key_id or call.principal.key_id
        if key_id != call.principal.key_id:
            require_scope(call.principal, "admin")
        today = self._ledger.today()
        first = _day(request.from_day, "from_day") or today
        last = _day(request.to_day, "to_day") or today
        if last < first:
            raise InvalidArgument.at("to_day", f"is {last}, before from_day, {first}")
        total = await self._ledger.total(key_id, first, last)
        return pb.GetUsageResponse(key_id=key_id, total=_message(total))

    async def get_budget(self, call: Call) -> pb.GetBudgetResponse:
        """GetBudget."""
        request = cast(pb.GetBudgetRequest, call.request)
        key_id = request.key_id or call.principal.key_id
        if key_id != call.principal.key_id:
            require_scope(call.principal, "admin")
        limits = self._budgets.limits(key_id)
        now = await self._budgets.standing(key_id)
        return pb.GetBudgetResponse(
            key_id=key_id,
            budget_tokens=limits.budget_tokens,
            budget_money=limits.budget_money,
            spent_tokens=now.tokens,
            spent_money=now.money,
            reserved_tokens=now.reserved_tokens,
            reserved_money=now.reserved_money,
            from_day=now.since,
        )

    async def list_usage(self, call: Call) -> pb.ListUsageResponse:
        """ListUsage."""
        request = cast(pb.ListUsageRequest, call.request)
        key_id = _whose(call, request.key_id)
        page = Page(request, 100, str, str, str, int, str)
        rows = await self._ledger.rows(
            key_id,
            request.model or None,
            _day(request.from_day, "from_day"),
            _day(request.to_day, "to_day"),
            page.behind,
            page.size + 1,
            request.user or None,
        )
        chosen, following = page.cut(rows, UsageRow.place)
        response = pb.ListUsageResponse(next_page_token=following)
        for row in chosen:
            response.rows.add(
                key_id=row.key_id,
                model=row.model,
                version=row.version,
                day=row.day,
                user=row.user,
                counters=_message(row.counters),
            )
        return response

    async def export_usage(self, call: Call) -> AsyncIterator[pb.ExportUsageResponse]:
        """ExportUsage."""
        request = cast(pb.ExportUsageRequest, call.request)
        key_id = _whose(call, request.key_id)
        first, last = _day(request.from_day, "from_day"), _day(request.to_day, "to_day")
        behind = None
        while True:
            text = io.StringIO()
            table = csv.writer(text)
            if behind is None:
                table.writerow(("day", "key_id", "user", "model", "version", *COUNTERS))
            rows = await self._ledger.rows(
                key_id, request.model or None, first, last, behind, PIECE, request.user or None
            )
            for row in rows:
                counters = (getattr(row.counters, name) for name in COUNTERS)
                words = (_inert(w) for w in (row.day, row.key_id, row.user, row.model))
                table.writerow((*words, row.version, *counters))
            if text.tell():
                yield pb.ExportUsageResponse(data=text.getvalue().encode())
            if len(rows) < PIECE:
                return
            behind = rows[-1].place()


def _whose(call: Call, asked: str) -> str | None:
    """The key whose rows are given; None = all keys'. Raises PermissionDenied."""
    mine = call.principal.key_id
    key_id = asked or (None if "admin" in call.principal.scopes else mine)
    if key_id not in (None, mine):
        require_scope(call.principal, "admin")
    return key_id


def _inert(word: str) -> str:
    """Users' names are callers' words: a spreadsheet must not run one as a formula."""
    return f"'{word}" if word.startswith(("=", "+", "-", "@", "\t", "\r")) else word


def _day(text: str, path: str) -> str | None:
    if not text:
        return None
    try:
        return datetime.date.fromisoformat(text).isoformat()
    except ValueError:
        raise InvalidArgument.at(path, f"is {text!r}; a day is YYYY-MM-DD") from None


def _message(counters: Counters) -> pb.UsageCounters:
    return pb.UsageCounters(**{name: getattr(counters, name) for name in COUNTERS})
