"""Aliases, traffic and promotion history in the database: the repository's RepositoryState."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from forebay_server.repository.routing import PRODUCTION
from forebay_server.repository.state import HistoryEvent, Routing
from forebay_server.storage.database import Database
from forebay_server.storage.tables import (
    model_aliases,
    model_history,
    model_shadows,
    model_traffic,
)


class StoredRoutingState:
    """See repository.state.RepositoryState."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def load(self) -> dict[str, Routing]:
        """All models' routing."""
        out: dict[str, Routing] = {}
        async with self._database.read() as db:
            for row in await db.execute(sa.select(model_aliases)):
                out.setdefault(row.model, Routing()).aliases[row.alias] = row.version
            for row in await db.execute(sa.select(model_traffic)):
                out.setdefault(row.model, Routing()).shares[row.version] = row.weight
            for row in await db.execute(sa.select(model_shadows)):
                out.setdefault(row.model, Routing()).shadow = (row.version, row.fraction)
        return out

    async def set_alias(self, model: str, alias: str, version: int | None) -> None:
        """Point, or remove when `version` is None."""
        async with self._database.begin() as db:
            await _set_alias(db, model, alias, version)

    async def set_traffic(
        self, model: str, shares: dict[int, int], shadow: tuple[int, float] | None
    ) -> None:
        """Replace split and shadow."""
        async with self._database.begin() as db:
            await db.execute(sa.delete(model_traffic).where(model_traffic.c.model == model))
            await db.execute(sa.delete(model_shadows).where(model_shadows.c.model == model))
            for version, weight in shares.items():
                await db.execute(
                    model_traffic.insert().values(model=model, version=version, weight=weight)
                )
            if shadow is not None:
                await db.execute(
                    model_shadows.insert().values(
                        model=model, version=shadow[0], fraction=shadow[1]
                    )
                )

    async def promote(self, model: str, event: HistoryEvent) -> None:
        """Point `production` and keep the event, in one transaction."""
        async with self._database.begin() as db:
            await _set_alias(db, model, PRODUCTION, event.to_version)
            await db.execute(
                model_history.insert().values(
                    model=model,
                    time=event.time,
                    action=event.action,
                    from_version=event.from_version,
                    to_version=event.to_version,
                    key_id=event.key_id,
                )
            )

    async def history(self, model: str) -> list[HistoryEvent]:
        """Newest first."""
        query = (
            sa.select(model_history)
            .where(model_history.c.model == model)
            .order_by(model_history.c.id.desc())
            .limit(1000)
        )
        async with self._database.read() as db:
            return [
                HistoryEvent(r.time, r.action, r.from_version, r.to_version, r.key_id)
                for r in await db.execute(query)
            ]


async def _set_alias(db: AsyncConnection, model: str, alias: str, version: int | None) -> None:
    t = model_aliases
    await db.execute(sa.delete(t).where(t.c.model == model, t.c.alias == alias))
    if version is not None:
        await db.execute(t.insert().values(model=model, alias=alias, version=version))
