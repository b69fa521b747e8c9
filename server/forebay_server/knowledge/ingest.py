"""Documents from stored to found: parse, cut, embed, write; several at once, large ones in turn.

Where a document stands is in the database, so that work that was cut off goes on at the next start,
or, where servers share the database, on one of them (claims.py). A document's chunks are written in one transaction together with the removal of those of an earlier
ingest: searches see the old ones or the new ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from forebay.errors import ForebayError, NotFound
from forebay.methods import methods

from forebay_server.core.call import ANONYMOUS, Call
from forebay_server.dataplane.collections import NewPoint
from forebay_server.dataplane.embedding import Embedded, TextEmbedder
from forebay_server.dataplane.models import ModelAccess, ServedModel
from forebay_server.knowledge.bases import (
    Base,
    KnowledgeBases,
    chunk_id,
    chunk_ids,
    chunks_of,
)
from forebay_server.knowledge.chunking import ChunkSpan, chunk
from forebay_server.knowledge.claims import Claims
from forebay_server.knowledge.parsers import Parsed, ParseError
from forebay_server.knowledge.parsing import DocumentParser, ParseLimits
from forebay_server.storage.knowledge import DocumentRow

log = logging.getLogger("forebay.knowledge")

#: Chunks that are embedded between two notes of progress.
GROUP = 256
#: Documents that are parsed at once; each may take ParseLimits.memory_bytes.
PARSED_AT_ONCE = 2
#: Characters from which on a document is cut and embedded alone: its points are all in memory.
LARGE = 2_000_000


class Ingest:
    """See the module. `workers` documents are worked on at once."""

    def __init__(
        self,
        bases: KnowledgeBases,
        access: ModelAccess,
        embedder: TextEmbedder,
        on_embedded: Callable[[str, Embedded, int], None] = lambda key, e, n: None,
        on_end: Callable[[str], None] = lambda status: None,
        limits: ParseLimits | None = None,
        workers: int = 8,
    ) -> None:
        self._bases = bases
        self._access = access
        self._embedder = embedder
        self._on_embedded = on_embedded
        self._on_end = on_end
        self._parser = DocumentParser(limits)
        self._parsing = asyncio.Semaphore(PARSED_AT_ONCE)
        self._large = asyncio.Lock()
        self._workers = workers
        self._queue: asyncio.Queue[DocumentRow] = asyncio.Queue()
        self._passwords: dict[str, str] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._claims = Claims(bases.store, self._able, self.put)

    async def start(self) -> None:
        """Begin to work, with what was left unfinished first."""
        if self._bases.store.owner is not None:
            self._claims.start()
        else:
            for row in await self._bases.store.unfinished():
                self.put(row)
        self._tasks = [asyncio.create_task(self._run()) for _ in range(self._workers)]

    async def close(self) -> None:
        """Stop; what is not done goes on at the next start."""
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await self._claims.close()
        await self._parser.close()

    def put(self, row: DocumentRow, password: str = "") -> None:
        """Queue a document that this server has claimed. Passwords are kept in memory alone."""
        if password:
            self._passwords[row.id] = password
        self._claims.hold(row.id)
        self._queue.put_nowait(row)

    async def _able(self, row: DocumentRow) -> bool:
        """Whether a document's file is here, and its base's model."""
        base = await self._bases.by_id(row.base_id)
        if base is None or not await self._bases.reachable(row):
            return False
        try:
            await self._served(base)
        except ForebayError:
            return False
        return True

    async def _run(self) -> None:
        while True:
            row = await self._queue.get()
            try:
                await self._document(row)
            except Exception:
                log.exception("ingest of document %s failed", row.id)
                await self._failed(row, "CRASHED", "internal error; the log has more")
            finally:
                self._claims.drop(row.id)

    async def _document(self, row: DocumentRow) -> None:
        password = self._passwords.pop(row.id, "")
        try:
            base = await self._bases.by_id(row.base_id)
            if base is None or not await self._note(row, status="parsing", progress=0.0):
                return  # removed meanwhile, or another server's
            path = self._bases.file_path(row)
            async with self._parsing:
                parsed = await self._parser.parse(path, row.name, password)
            text = self._bases.texts.path(row.base_id, row.id)
            await asyncio.to_thread(_write, text, parsed.text)
            self._bases.texts.forget(row.base_id, row.id)
            if not await self._note(row, media_type=parsed.media_type):
                await self._lost(base, row)
                return
            async with self._large if len(parsed.text) >= LARGE else contextlib.nullcontext():
                if await self._found(base, row, parsed):
                    self._on_end("ready")
        except ParseError as e:
            await self._failed(row, e.reason, str(e))
        except ForebayError as e:
            if e.reason == "STORAGE_AWAY" and self._bases.store.owner is not None:
                return  # it begins again when its claim has run out
            await self._failed(row, "EMBEDDING", e.message)

    async def _found(self, base: Base, row: DocumentRow, parsed: Parsed) -> bool:
        """Make a parsed document one that is found; False when it was removed meanwhile, or another
        server has claimed it."""
        chunks = await self._chunks(base, parsed)
        if not chunks:
            raise ParseError("NO_TEXT", "no text was found")
        await self._note(
            row,
            status="embedding",
            progress=0.1,
            media_type=parsed.media_type,
            pages=parsed.pages if parsed.paged else [],
            characters=len(parsed.text),
        )
        points = await self._embedded(base, row, parsed, chunks)
        return await self._store(base, row, points)

    async def _chunks(self, base: Base, parsed: Parsed) -> list[ChunkSpan]:
        served = await self._served(base)
        encoder = served.encoder
        prompt = served.manifest.embedding_head.prompts.get("document", "")
        special = encoder.count([prompt])[0]  # special tokens, and the prompt's
        tokenizer = encoder.tokenizer

        def spans(text: str) -> list[tuple[int, int]]:
            return tokenizer.encode(text, add_special_tokens=False).offsets

        most = max(1, encoder.max_tokens - special)
        return await asyncio.to_thread(chunk, parsed, base.config.chunks, spans, most)

    async def _served(self, base: Base) -> ServedModel:
        """The base's embedding model. Raises ForebayError."""
        return await self._access.resolve_async(
            internal_call(), base.config.embedding_model, ("embedding",)
        )

    async def _embedded(
        self, base: Base, row: DocumentRow, parsed: Parsed, chunks: list[ChunkSpan]
    ) -> list[NewPoint]:
        """The chunks as points, with vectors."""
        points: list[NewPoint] = []
        generation = row.generation + 1
        for start in range(0, len(chunks), GROUP):
            group = chunks[start : start + GROUP]
            texts = [parsed.text[c.start : c.end] for c in group]
            found = await self._embedder.embed(internal_call(), base.config.embedding_model, texts)
            self._on_embedded(row.key_id, found, len(texts))
            for i, (c, text, vector) in enumerate(zip(group, texts, found.vectors, strict=True)):
                payload = {
                    "text": text,
                    "document": row.id,
                    "name": row.name,
                    "page": c.page,
                    "start": c.start,
                    "end": c.end,
                    "headings": list(c.headings),
                    "parent": [c.parent_start, c.parent_end],
                    "metadata": dict(row.metadata),
                }
                points.append(NewPoint(chunk_id(row.id, generation, start + i), vector, payload))
            if start + len(group) < len(chunks):
                await self._note(row, progress=0.1 + 0.8 * (start + len(group)) / len(chunks))
        return points

    async def _store(self, base: Base, row: DocumentRow, points: list[NewPoint]) -> bool:
        collection = self._bases.collections.get(base.collection)
        labels = await asyncio.to_thread(collection.index.matching_labels, chunks_of(row.id))
        slots = collection.index.slots_of(labels)
        # Those that another server has written may not be in this one's index yet.
        old = {collection.index.ids[s] for s in slots}.union(chunk_ids(row))
        old.difference_update(p.id for p in points)
        await self._bases.collections.upsert(
            internal_call(), base.collection, points, gone=sorted(old)
        )
        done = await self._note(
            row, status="ready", progress=1.0, reason="", message="",
            chunks=len(points), generation=row.generation + 1,
        )  # fmt: skip
        if not done:
            await self._lost(base, row, [p.id for p in points])
        return done

    async def _lost(self, base: Base, row: DocumentRow, written: Sequence[str] = ()) -> None:
        """The document was removed, by this server or another: leave no trace. Or another server
        has claimed it: it writes the same chunks, unless it has done so and begun anew."""
        now = await self._bases.store.get(row.base_id, row.id)
        if written and (now is None or now.generation > row.generation + 1):
            with contextlib.suppress(NotFound):  # its base was removed
                await self._bases.collections.remove(base.collection, written, None)
        if now is None:
            await self._bases.leave_no_file(row)

    async def _note(self, row: DocumentRow, **values: object) -> bool:
        return await self._bases.store.update(row.id, **values)

    async def _failed(self, row: DocumentRow, reason: str, message: str) -> None:
        # Not noted, it begins again at the next start, or when its claim has run out.
        with contextlib.suppress(ForebayError):
            await self._note(row, status="failed", reason=reason, message=message[:1000])
        self._on_end("failed")


def internal_call() -> Call:
    """A call of the server's own."""
    method = methods()["/forebay.v1.KnowledgeService/UploadDocument"]
    call = Call(method, {}, started=time.monotonic(), on_end=lambda _: None)
    call.principal = ANONYMOUS
    call.request_id = "ingest"
    return call


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)  # it may have gone with its base, and goes again then
    temporary = path.with_suffix(".txt.new")
    with temporary.open("wb") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
