"""What must outlive a restart: aliases, traffic, history. Storage implements it; tests use memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class HistoryEvent:
    """A step of the `production` alias. `time` is seconds since the epoch."""

    time: float
    action: str
    from_version: int
    to_version: int
    key_id: str


@dataclass(slots=True)
class Routing:
    """Where a model's names lead.

    Attributes:
        aliases: alias to version.
        shares: version to weight, for the bare name; empty = no split.
        shadow: version and fraction of calls, None = no shadow.
    """

    aliases: dict[str, int] = field(default_factory=dict)
    shares: dict[int, int] = field(default_factory=dict)
    shadow: tuple[int, float] | None = None

    @property
    def versions(self) -> set[int]:
        """Versions that something points to."""
        shadow = {self.shadow[0]} if self.shadow else set()
        return {*self.aliases.values(), *self.shares, *shadow}


class RepositoryState(Protocol):
    """Every write is durable before it returns."""

    async def load(self) -> dict[str, Routing]: ...

    async def set_alias(self, model: str, alias: str, version: int | None) -> None: ...

    async def set_traffic(
        self, model: str, shares: dict[int, int], shadow: tuple[int, float] | None
    ) -> None: ...

    async def promote(self, model: str, event: HistoryEvent) -> None:
        """Point `production` to `event.to_version` and keep the event, in one transaction."""
        ...

    async def history(self, model: str) -> list[HistoryEvent]:
        """Newest first."""
        ...
