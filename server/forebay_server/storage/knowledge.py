"""Knowledge bases and documents in the database."""

from __future__ import annotations

import secrets
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import orjson
import sqlalchemy as sa
from forebay.errors import AlreadyExists, NotFound
from sqlalchemy.exc import IntegrityError

from forebay_server.storage.collections import parts
from forebay_server.storage.database import Database
from forebay_server.storage.tables import knowledge_bases, knowledge_documents

#: Statuses of documents whose work is not done.
UNFINISHED = ("queued", "parsing", "embedding")
#: Seconds for which a server's word holds that it works on a document.
OWNED_S = 10.0
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
    owner: str | None = None
    owned_until: float | None = None


class KnowledgeStore:
    """One per database.

    Attributes:
        owner: this server's name in claims of documents; None where no other server shares the
            database (SQLite): nothing is claimed there.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self.owner = secrets.token_hex(8) if database.dialect == "postgresql" else None

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
        """Remove a knowledge base and its documents' rows; gives their number. Raises NotFound."""
        d, b = knowledge_documents, knowledge_bases
        async with self._database.begin() as db:
            # The base first: documents that are being added hold it, and those after them see it gone.
            if not (await db.execute(sa.delete(b).where(b.c.id == base_id))).rowcount:
                raise NotFound("knowledge base", str(base_id))
            gone = await db.execute(sa.delete(d).where(d.c.base_id == base_id))
            return gone.rowcount

    async def add(self, row: DocumentRow) -> DocumentRow | None:
        """Store a new document, as one that this server works on; when its content is there already,
        that document is given.

        Raises:
            NotFound: its knowledge base is gone.
        """
        values = {name: getattr(row, name) for name in DocumentRow.__slots__}
        values["metadata"] = orjson.dumps(row.metadata).decode()
        values["pages"] = orjson.dumps(row.pages).decode()
        values |= self._claimed()
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
        """Change a document that this server works on; False when it is gone, or another server has
        claimed it meanwhile. With a status of work that is done, it is given back."""
        if "pages" in values:
            values["pages"] = orjson.dumps(values["pages"]).decode()
        d = knowledge_documents
        mine = [d.c.id == document]
        if self.owner is not None:
            mine.append(d.c.owner == self.owner)
            if values.get("status", "queued") not in UNFINISHED:
                values |= {"owner": None, "owned_until": None}
        return await self._change(mine, values)

    async def queue_again(self, document: str, mine: bool = True) -> bool:
        """Have a document that is done ingested anew; False when it is gone or not done.

        Args:
            mine: by this server; else by one that claims it.
        """
        d = knowledge_documents
        done = [d.c.id == document, d.c.status.not_in(UNFINISHED)]
        values: dict[str, Any] = {"status": "queued", "progress": 0.0, "reason": "", "message": ""}
        return await self._change(done, values | (self._claimed() if mine else {}))

    async def delete(self, document: str) -> None:
        """Remove a document's row."""
        d = knowledge_documents
        async with self._database.begin() as db:
            await db.execute(sa.delete(d).where(d.c.id == document))

    # Claims, where servers share the database.

    async def free(self, behind: tuple[float, str], limit: int) -> list[DocumentRow]:
        """Documents whose work is not done and that no server works on, oldest first, behind a time
        and id."""
        d = knowledge_documents
        here = sa.tuple_(d.c.created_at, d.c.id)
        conditions = (*_free(), here > sa.tuple_(*map(sa.literal, behind)))
        return await self._select(*conditions, limit=limit, oldest=True)

    async def claim(self, document: str) -> DocumentRow | None:
        """Say that this server works on a document; None when it is gone, done, or another's."""
        d = knowledge_documents
        take = sa.update(d).where(d.c.id == document, *_free()).values(self._claimed())
        async with self._database.begin() as db:
            row = (await db.execute(take.returning(d))).first()
            return None if row is None else _document(row)

    async def renew(self, documents: Collection[str]) -> None:
        """Say again that this server works on these documents."""
        d = knowledge_documents
        async with self._database.begin() as db:
            for some in parts(sorted(documents)):
                mine = sa.update(d).where(d.c.id.in_(some), d.c.owner == self.owner)
                await db.execute(mine.values(self._claimed()))

    async def release(self) -> None:
        """Give back all documents that this server works on."""
        d = knowledge_documents
        async with self._database.begin() as db:
            mine = sa.update(d).where(d.c.owner == self.owner)
            await db.execute(mine.values(owner=None, owned_until=None))

    def _claimed(self) -> dict[str, Any]:
        until = None if self.owner is None else time.time() + OWNED_S
        return {"owner": self.owner, "owned_until": until}

    async def _change(
        self, conditions: Collection[sa.ColumnElement[bool]], values: dict[str, Any]
    ) -> bool:
        change = sa.update(knowledge_documents).where(*conditions)
        async with self._database.begin() as db:
            return (await db.execute(change.values(updated_at=time.time(), **values))).rowcount > 0

    async def _select(
        self,
        *conditions: sa.ColumnElement[bool],
        limit: int | None = None,
        oldest: bool = False,
    ) -> list[DocumentRow]:
        d = knowledge_documents
        order = [d.c.created_at, d.c.id] if oldest else [d.c.created_at.desc(), d.c.id.desc()]
        query = sa.select(d).where(*conditions).order_by(*order).limit(limit)
        async with self._database.read() as db:
            return [_document(row) for row in await db.execute(query)]


def _free() -> tuple[sa.ColumnElement[bool], ...]:
    d = knowledge_documents
    unclaimed = d.c.owner.is_(None) | (d.c.owned_until < time.time())
    return d.c.status.in_(UNFINISHED), unclaimed


def _document(row: sa.Row[Any]) -> DocumentRow:
    values = dict(row._mapping)
    for name in ("metadata", "pages"):
        values[name] = orjson.loads(values[name])
    return DocumentRow(**values)
