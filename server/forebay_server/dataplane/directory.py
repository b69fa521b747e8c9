"""The collections that are open, by name and by id."""

from __future__ import annotations

import difflib
from dataclasses import replace

from forebay.errors import NotFound

from forebay_server.dataplane.upkeep import OpenCollection


class Directory:
    """See the module. Changed on one event loop; `get` may be called from any thread.

    Where servers share a database, a name may go from one collection to another while this server
    knows the former by it: then it is the latter's, and the former stays known by its id.

    Attributes:
        making: names of collections that are being made here: they are in the database, and will be
            here when that is known.
    """

    def __init__(self) -> None:
        self.making: list[str] = []
        self._by_name: dict[str, OpenCollection] = {}
        self._by_id: dict[int, OpenCollection] = {}

    def get(self, name: str) -> OpenCollection:
        """The collection. Raises NotFound, naming the nearest."""
        c = self._by_name.get(name)
        if c is None:
            nearest = difflib.get_close_matches(name, list(self._by_name), n=3)
            raise NotFound("collection", name, nearest=nearest)
        return c

    def knows(self, name: str) -> bool:
        """Whether `get` finds one."""
        return name in self._by_name

    def by_id(self, collection_id: int) -> OpenCollection | None:
        """The collection; None when it is not open."""
        return self._by_id.get(collection_id)

    def has(self, c: OpenCollection, name: str) -> bool:
        """Whether a collection goes by a name."""
        return self._by_name.get(name) is c

    def every(self) -> list[OpenCollection]:
        """All, in no order."""
        return list(self._by_id.values())

    def named(self) -> list[OpenCollection]:
        """All that can be called, by name."""
        return [c for _, c in sorted(self._by_name.copy().items())]

    def put(self, c: OpenCollection) -> None:
        """Take one up."""
        self._by_id[c.row.id] = c
        self._by_name[c.name] = c

    def rename(self, c: OpenCollection, name: str) -> None:
        """Give one its new name."""
        if self.has(c, c.name):
            del self._by_name[c.name]
        c.row = replace(c.row, name=name)
        self._by_name[name] = c

    def drop(self, c: OpenCollection) -> None:
        """Take one away: it is deleted."""
        c.deleted = True
        self._by_id.pop(c.row.id, None)
        if self.has(c, c.name):
            del self._by_name[c.name]
