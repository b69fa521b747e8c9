"""Where each model's names lead, and what changes it: aliases, traffic, promotion, rollback.

Lives on one event loop. Every change is durable before it is in force.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace

from forebay.errors import FailedPrecondition, NotFound

from forebay_server.repository.catalogue import Catalogue
from forebay_server.repository.events import Events
from forebay_server.repository.pool import ModelPool
from forebay_server.repository.routing import PRODUCTION
from forebay_server.repository.state import HistoryEvent, RepositoryState, Routing

#: Of models whose names lead nowhere in particular. Never changed.
NOWHERE = Routing()


class RoutingTable:
    """See the module. Other threads read `by_model`: it is replaced as a whole.

    Args:
        state: outlives a restart.
        catalogue: which versions there are.
        pool: loads a version before names lead to it.
        events: hears of changes.
    """

    def __init__(
        self, state: RepositoryState, catalogue: Catalogue, pool: ModelPool, events: Events
    ) -> None:
        self._state = state
        self._catalogue = catalogue
        self._pool = pool
        self._events = events
        self.by_model: dict[str, Routing] = {}

    async def load(self) -> None:
        """Read what was stored."""
        self.by_model = await self._state.load()

    def of(self, name: str) -> Routing:
        """Where a model's names lead."""
        return self.by_model.get(name, NOWHERE)

    def suggest(self, name: str, aliases: Mapping[str, int]) -> None:
        """Aliases that hold until they are set; model.yaml has them."""
        routing = self.of(name)
        self._put(name, replace(routing, aliases={**aliases, **routing.aliases}))

    async def set_alias(self, name: str, alias: str, version: int | None) -> None:
        """Point an alias to a version (loaded first, so that no call waits), or remove it."""
        if version is not None:
            await self._ready(name, version)
        elif alias not in self.of(name).aliases:
            raise NotFound("model alias", f"{name}@{alias}")
        await self._state.set_alias(name, alias, version)
        routing = self.of(name)
        aliases = {a: v for a, v in routing.aliases.items() if a != alias}
        if version is not None:
            aliases[alias] = version
        self._put(name, replace(routing, aliases=aliases))
        self._events.publish("alias", name, version or 0)

    async def set_traffic(
        self, name: str, shares: dict[int, int], shadow: tuple[int, float] | None
    ) -> None:
        """Replace a model's split and shadow. Every version named is loaded first."""
        self._catalogue.folder(name)
        for version in {*shares, *([shadow[0]] if shadow else [])}:
            await self._ready(name, version)
        await self._state.set_traffic(name, shares, shadow)
        self._put(name, replace(self.of(name), shares=shares, shadow=shadow))
        self._events.publish("traffic", name)

    async def promote(self, name: str, version: int, key_id: str, action: str = "promote") -> None:
        """Make a version the production one."""
        await self._ready(name, version)
        before = self.of(name).aliases.get(PRODUCTION, 0)
        event = HistoryEvent(time.time(), action, before, version, key_id)
        await self._state.promote(name, event)
        routing = self.of(name)
        self._put(name, replace(routing, aliases={**routing.aliases, PRODUCTION: version}))
        self._events.publish("alias", name, version)

    async def rollback(self, name: str, key_id: str) -> None:
        """Back to the version that was production before the newest promotion still in force."""
        self._catalogue.folder(name)
        stack: list[int] = []
        for event in reversed(await self.history(name)):
            if event.action == "rollback" and stack:
                stack.pop()
            elif event.action == "promote":
                stack.append(event.from_version)
        if not stack or stack[-1] == 0:
            raise FailedPrecondition(
                f"model {name!r} has no earlier production version", reason="NOTHING_TO_ROLL_BACK"
            )
        await self.promote(name, stack[-1], key_id, "rollback")

    async def history(self, name: str) -> list[HistoryEvent]:
        """Steps of the production alias, newest first."""
        return await self._state.history(name)

    async def _ready(self, name: str, version: int) -> None:
        await self._catalogue.read()
        self._catalogue.folder(name).require(version)
        await self._pool.load((name, version))

    def _put(self, name: str, routing: Routing) -> None:
        self.by_model = {**self.by_model, name: routing}
        self._events.on_change()
