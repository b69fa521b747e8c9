"""Knowledge bases and documents in the database."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson
import sqlalchemy as sa
from forebay.errors import AlreadyExists, NotFound
from sqlalchemy.exc import IntegrityError

from forebay_server.storage.database import Database
from forebay_server.storage.tables import knowledge_bases, knowledge_documents

#: Statuses of documents whose work is not done.
UNFINISHED = ("queued", "parsing", "embedding")
#: Times that a document is stored whose duplicate is there when it comes and gone when it is looked for.
ATTEMPTS = 10


@dataclass(frozen=True, slots=True)
class BaseRow:
    """A knowledge base. `config` is JSON."""

    id: int
    name: str
    config: str
    created_at: float


@dataclass(frozen=True, slots=True)
class DocumentRow:
    """A document. `metadata` is a JSON object, `pages` where each page begins (none = unpaged)."""

    id: str
    base_id: int
    name: str
    media_type: str
    size_bytes: int
    sha256: str
    metadata: Mapping[str, Any]
    key_id: str
    status: str
    progress: float
    reason: str
    message: str
    pages: list[int]
    characters: int
    chunks: int
    generation: int
    created_at: float
    updated_at: float


class KnowledgeStore:
    """One per database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create_base(self, name: str, config: str) -> BaseRow:
        """A new knowledge base. Raises AlreadyExists."""
        now = time.time()
        new = knowledge_bases.insert().values(name=name, config=config, created_at=now)
        try:
            async with self._database.begin() as db:
                key = (await db.execute(new)).inserted_primary_key
        except IntegrityError:
            raise AlreadyExists(f"there is a knowledge base {name!r} already") from None
        assert key is not None
        return BaseRow(key[0], name, config, now)

    async def bases(self) -> list[BaseRow]:
        """All, by name."""
        query = sa.select(knowledge_bases).order_by(knowledge_bases.c.name)
        async with self._database.read() as db:
            return [BaseRow(r.id, r.name, r.config, r.created_at) for r in await db.execute(query)]

    async def delete_base(self, base_id: int) -> int:
        """Remove a knowledge base and its documents' rows; gives their number."""
        d, b = knowledge_documents, knowledge_bases
        async with self._database.begin() as db:
            # The base first: documents that are being added hold it, and those after them see it gone.
            await db.execute(sa.delete(b).where(b.c.id == base_id))
            gone = await db.execute(sa.delete(d).where(d.c.base_id == base_id))
            return gone.rowcount

    async def add(self, row: DocumentRow) -> DocumentRow | None:
        """Store a new document; when its content is there already, that document is given.

        Raises:
            NotFound: its knowledge base is gone.
        """
        values = {name: getattr(row, name) for name in DocumentRow.__slots__}
        values["metadata"] = orjson.dumps(row.metadata).decode()
        values["pages"] = orjson.dumps(row.pages).decode()
        b, d = knowledge_bases, knowledge_documents
        # A row of a base that is being removed would stay for ever: the base's own is held meanwhile.
        base = sa.select(b.c.name).where(b.c.id == row.base_id).with_for_update(read=True)
        for left in reversed(range(ATTEMPTS)):
            try:
                async with self._database.begin() as db:
                    if (await db.execute(base)).first() is None:
                        raise NotFound("knowledge base", str(row.base_id))
                    await db.execute(d.insert().values(values))
                return None
            except IntegrityError:
                same = await self._select(d.c.base_id == row.base_id, d.c.sha256 == row.sha256)
                if same:
                    return same[0]
                if not left:
                    raise
                # Its duplicate has been removed meanwhile: there is room for this one.
        raise AssertionError

    async def get(self, base_id: int, document: str) -> DocumentRow | None:
        """The document; None when there is none."""
        d = knowledge_documents
        found = await self._select(d.c.base_id == base_id, d.c.id == document)
        return found[0] if found else None

    async def ids(self, base_id: int) -> list[str]:
        """Ids of a knowledge base's documents."""
        d = knowledge_documents
        async with self._database.read() as db:
            query = sa.select(d.c.id).where(d.c.base_id == base_id)
            return list((await db.execute(query)).scalars())

    async def unfinished(self) -> list[DocumentRow]:
        """Documents whose work is not done, oldest first."""
        found = await self._select(knowledge_documents.c.status.in_(UNFINISHED))
        return found[::-1]

    async def page(
        self, base_id: int, status: str, behind: tuple[float, str] | None, limit: int
    ) -> list[DocumentRow]:
        """Documents, newest first, behind a time and id, or from the first."""
        d = knowledge_documents
        conditions = [d.c.base_id == base_id]
        if status:
            conditions.append(d.c.status == status)
        if behind is not None:
            here = sa.tuple_(d.c.created_at, d.c.id)
            conditions.append(here < sa.tuple_(*map(sa.literal, behind)))
        return await self._select(*conditions, limit=limit)

    async def count(self, base_id: int) -> int:
        """Documents of a knowledge base."""
        d = knowledge_documents
        query = sa.select(sa.func.count()).select_from(d).where(d.c.base_id == base_id)
        async with self._database.read() as db:
            return (await db.execute(query)).scalar_one()

    async def update(self, document: str, **values: Any) -> bool:
        """Change a document; False when it is gone."""
        if "pages" in values:
            values["pages"] = orjson.dumps(values["pages"]).decode()
        d = knowledge_documents
        change = sa.update(d).where(d.c.id == document).values(updated_at=time.time(), **values)
        async with self._database.begin() as db:
            return (await db.execute(change)).rowcount > 0

    async def delete(self, document: str) -> None:
        """Remove a document's row."""
        d = knowledge_documents
        async with self._database.begin() as db:
            await db.execute(sa.delete(d).where(d.c.id == document))

    async def _select(
        self, *conditions: sa.ColumnElement[bool], limit: int | None = None
    ) -> list[DocumentRow]:
        d = knowledge_documents
        query = (
            sa.select(d)
            .where(*conditions)
            .order_by(d.c.created_at.desc(), d.c.id.desc())
            .limit(limit)
        )
        async with self._database.read() as db:
            rows = [dict(r._mapping) for r in await db.execute(query)]
        return [
            DocumentRow(
                **{
                    **row,
                    "metadata": orjson.loads(row["metadata"]),
                    "pages": orjson.loads(row["pages"]),
                }
            )
            for row in rows
        ]
