"""Requests taken apart without parsing them: what callers repeat, and what differs.

A caller's requests mostly differ in one repeated field: rows, or raw tensors. The extension takes
all requests of a batch apart at that field; those with the same rest (the head) are handled as one.
Parsing, checking and resolving is then done once for a head, not once for a call.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from forebay_server.core.call import Call

if TYPE_CHECKING:
    import forebay_native

#: The fields of a message that is a table's column: its name, its values as numbers, or as strings.
ColumnFields = tuple[int, int, int]

AVAILABLE = importlib.util.find_spec("forebay_native") is not None


@dataclass(frozen=True, slots=True)
class Records:
    """The differing fields of some requests, unparsed. `members`: their places in `split`."""

    split: forebay_native.Split
    members: list[int]

    def concat(self, index: int, of: int, size: int) -> bytes | None:
        """Record `index` of each request, one after the other; None unless each request has `of`
        records, and this one has `size` bytes."""
        return self.split.concat(self.members, index, of, size)

    def column_sizes(self, fields: ColumnFields) -> list[int]:
        """Of records that are columns: how many values the first of each request has. (If they are not
        what they should be, whoever reads them will see.)"""
        import forebay_native

        return forebay_native.column_sizes(self.split, self.members, fields)

    def only(self, places: Sequence[int]) -> Records:
        """Those of some of the requests, by their places among these."""
        return Records(self.split, [self.members[i] for i in places])


def take_apart(
    calls: Sequence[Call], field: int
) -> tuple[list[tuple[bytes, list[Call], Records]], list[Call]]:
    """Calls by head: the head's bytes, the calls, their records of `field`; and the calls that are
    malformed or have none, for whoever can say so."""
    import forebay_native

    split, groups, odd = forebay_native.split([c.message for c in calls], field)
    taken = [(head, [calls[i] for i in at], Records(split, at)) for head, at in groups]
    return taken, [calls[i] for i in odd]
