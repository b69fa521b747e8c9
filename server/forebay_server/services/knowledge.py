"""KnowledgeService: documents in, chunks and cited answers out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any, cast

from forebay.errors import FailedPrecondition, ForebayError, InvalidArgument
from forebay.v1 import knowledge_pb2 as pb

from forebay_server.core.call import Call
from forebay_server.knowledge.answering import Answerer, Done, Question, Stage, Token
from forebay_server.knowledge.bases import Base, BaseConfig, KnowledgeBases, Upload
from forebay_server.knowledge.chunking import ChunkConfig
from forebay_server.knowledge.citations import Citation
from forebay_server.knowledge.evaluation import Judged, figures
from forebay_server.knowledge.ingest import Ingest
from forebay_server.knowledge.retrieval import (
    TOP_K,
    RetrievalSpec,
    Retrieved,
    RetrievedChunk,
    Retriever,
    Step,
)
from forebay_server.services.base import Service
from forebay_server.services.collection_messages import MODES, fusion
from forebay_server.services.common import served_by, usage
from forebay_server.services.filters import condition, to_dict
from forebay_server.services.model import timestamp
from forebay_server.services.paging import offset, page, page_size, token
from forebay_server.storage.knowledge import DocumentRow

_METHODS: dict[int, Any] = {
    0: "tokens",
    1: "tokens",
    2: "sentence",
    3: "heading",
    4: "parent_child",
}
_STATUSES = ("", "queued", "parsing", "embedding", "ready", "failed")
_ANSWERS = {
    "extracted": pb.ANSWER_METHOD_EXTRACTED,
    "written": pb.ANSWER_METHOD_WRITTEN,
    "not_found": pb.ANSWER_METHOD_NOT_FOUND,
}
#: Questions of an evaluation that are asked at once.
AT_ONCE = 16


class KnowledgeService(Service):
    """See protos/forebay/v1/knowledge.proto."""

    name = "forebay.v1.KnowledgeService"

    def __init__(
        self, bases: KnowledgeBases, ingest: Ingest, retriever: Retriever, answerer: Answerer
    ) -> None:
        self._bases = bases
        self._ingest = ingest
        self._retriever = retriever
        self._answerer = answerer

    # Knowledge bases.

    async def create_knowledge_base(self, call: Call) -> pb.CreateKnowledgeBaseResponse:
        """CreateKnowledgeBase."""
        request = cast(pb.CreateKnowledgeBaseRequest, call.request)
        c = request.config.chunks
        chunks = ChunkConfig(
            _METHODS[c.method], c.tokens or 1000, c.overlap if c.HasField("overlap") else None
        )
        config = BaseConfig(request.config.embedding_model, request.config.language, chunks)
        base = await self._bases.create(call, request.knowledge_base, config)
        return pb.CreateKnowledgeBaseResponse(knowledge_base=await self._base(base))

    async def get_knowledge_base(self, call: Call) -> pb.GetKnowledgeBaseResponse:
        """GetKnowledgeBase."""
        request = cast(pb.GetKnowledgeBaseRequest, call.request)
        base = self._bases.get(request.knowledge_base)
        return pb.GetKnowledgeBaseResponse(knowledge_base=await self._base(base))

    async def list_knowledge_bases(self, call: Call) -> pb.ListKnowledgeBasesResponse:
        """ListKnowledgeBases."""
        request = cast(pb.ListKnowledgeBasesRequest, call.request)
        size = page_size(request.page_size, 100)
        chosen, following = page(self._bases.all(), request.page_token, size)
        return pb.ListKnowledgeBasesResponse(
            knowledge_bases=[await self._base(b) for b in chosen], next_page_token=following
        )

    async def delete_knowledge_base(self, call: Call) -> pb.DeleteKnowledgeBaseResponse:
        """DeleteKnowledgeBase."""
        request = cast(pb.DeleteKnowledgeBaseRequest, call.request)
        count = await self._bases.delete(request.knowledge_base)
        return pb.DeleteKnowledgeBaseResponse(documents=count)

    async def _base(self, base: Base) -> pb.KnowledgeBase:
        chunks = base.config.chunks
        config = pb.KnowledgeBaseConfig(
            embedding_model=base.config.embedding_model,
            language=base.config.language,
            chunks=pb.ChunkConfig(
                method=f"CHUNK_METHOD_{chunks.method.upper()}",
                tokens=chunks.tokens,
                overlap=chunks.tokens // 5 if chunks.overlap is None else chunks.overlap,
            ),
        )
        return pb.KnowledgeBase(
            name=base.name,
            config=config,
            documents=await self._bases.store.count(base.row.id),
            chunks=len(self._bases.collections.get(base.collection).index),
            created_at=timestamp(base.row.created_at),
        )

    # Documents.

    async def upload_document(
        self, call: Call, requests: AsyncIterator[pb.UploadDocumentRequest]
    ) -> pb.UploadDocumentResponse:
        """UploadDocument."""
        first = await anext(requests, None)
        if first is None or first.WhichOneof("part") != "header":
            raise InvalidArgument.at("header", "must be the first message of the stream")
        header = first.header
        base = self._bases.get(header.knowledge_base)
        metadata = to_dict(header.metadata, "header.metadata")
        uploads: list[Upload] = []
        kept = 0
        try:
            async for request in requests:
                if request.WhichOneof("part") != "chunk":
                    raise InvalidArgument.at("chunk", "must be every message after the first")
                if not uploads or uploads[-1].name != request.chunk.path:
                    uploads.append(self._bases.upload(base, request.chunk.path))
                await asyncio.to_thread(uploads[-1].write, request.chunk.data)
            if not uploads:
                raise InvalidArgument.at("chunk", "is missing: the upload has no file")
            out = pb.UploadDocumentResponse()
            for upload in uploads:
                row, known = await self._bases.add(base, upload, metadata, call.principal.key_id)
                kept += 1
                if not known:
                    self._ingest.put(row, header.password)
                out.documents.add(document=_document(row), duplicate=known)
            call.facts.items = len(uploads)
            return out
        except BaseException:
            for upload in uploads[kept:]:
                upload.abort()
            raise

    async def ingest_text(self, call: Call) -> pb.IngestTextResponse:
        """IngestText."""
        request = cast(pb.IngestTextRequest, call.request)
        base = self._bases.get(request.knowledge_base)
        name = request.name or "text"
        metadata = to_dict(request.metadata, "metadata")
        if "." not in name:
            name = f"{name}.md"  # so that headings are seen
        upload = self._bases.upload(base, name)
        try:
            await asyncio.to_thread(upload.write, request.text.encode())
            row, known = await self._bases.add(base, upload, metadata, call.principal.key_id)
        except BaseException:
            upload.abort()
            raise
        if not known:
            self._ingest.put(row)
        call.facts.items = 1
        return pb.IngestTextResponse(document=_document(row), duplicate=known)

    async def get_document(self, call: Call) -> pb.GetDocumentResponse:
        """GetDocument."""
        request = cast(pb.GetDocumentRequest, call.request)
        row = await self._bases.document(self._bases.get(request.knowledge_base), request.document)
        out = pb.GetDocumentResponse(document=_document(row))
        if request.with_text:
            text = await self._bases.text(row)
            starts = row.pages or [0]
            for number, (start, end) in enumerate(
                zip(starts, [*starts[1:], len(text)], strict=True), 1
            ):
                out.pages.add(number=number, start=start, text=text[start:end])
        return out

    async def list_documents(self, call: Call) -> pb.ListDocumentsResponse:
        """ListDocuments."""
        request = cast(pb.ListDocumentsRequest, call.request)
        base = self._bases.get(request.knowledge_base)
        start, size = offset(request.page_token), page_size(request.page_size, 100)
        rows, more = await self._bases.store.page(
            base.row.id, _STATUSES[request.status], start, size
        )
        return pb.ListDocumentsResponse(
            documents=[_document(r) for r in rows],
            next_page_token=token(start + size) if more else "",
        )

    async def delete_document(self, call: Call) -> pb.DeleteDocumentResponse:
        """DeleteDocument."""
        request = cast(pb.DeleteDocumentRequest, call.request)
        base = self._bases.get(request.knowledge_base)
        chunks = await self._bases.delete_document(base, request.document)
        return pb.DeleteDocumentResponse(chunks=chunks)

    async def reingest_document(self, call: Call) -> pb.ReingestDocumentResponse:
        """ReingestDocument."""
        request = cast(pb.ReingestDocumentRequest, call.request)
        base = self._bases.get(request.knowledge_base)
        row = await self._bases.document(base, request.document)
        if row.status not in ("ready", "failed"):
            raise FailedPrecondition(
                f"document {row.id!r} is {row.status}; wait until it is ready or has failed",
                reason="INGEST_RUNNING",
            )
        await self._bases.store.update(row.id, status="queued", progress=0.0, reason="", message="")
        row = await self._bases.document(base, row.id)
        self._ingest.put(row, request.password)
        return pb.ReingestDocumentResponse(document=_document(row))

    # Questions.

    async def retrieve(self, call: Call) -> pb.RetrieveResponse:
        """Retrieve."""
        request = cast(pb.RetrieveRequest, call.request)
        base = self._bases.get(request.knowledge_base)
        call.facts.items = 1
        found = await self._retriever.retrieve(call, base, request.query, _spec(request.retrieval))
        return pb.RetrieveResponse(
            chunks=[_chunk(c) for c in found.chunks],
            steps=[_step(s) for s in found.steps] if request.explain else [],
            served_by=served_by(call) if call.facts.model else None,
            usage=usage(call),
        )

    async def ask(self, call: Call) -> pb.AskResponse:
        """Ask."""
        request = cast(pb.AskRequest, call.request)
        out = pb.AskResponse()
        async for event in self._events(call, request):
            if isinstance(event, Retrieved):
                out.sources.extend(_chunk(c) for c in event.chunks)
                if request.explain:
                    out.steps.extend(_step(s) for s in event.steps)
            elif isinstance(event, Token):
                out.answer += event.text
            elif isinstance(event, Citation):
                out.citations.append(_citation(event))
            elif isinstance(event, Done):
                out.method = _ANSWERS[event.method]
        out.usage.CopyFrom(usage(call))
        if call.facts.model:
            out.served_by.CopyFrom(served_by(call))
        return out

    async def ask_stream(self, call: Call) -> AsyncIterator[pb.AskStreamResponse]:
        """AskStream."""
        request = cast(pb.AskStreamRequest, call.request)
        async for event in self._events(call, request):
            if isinstance(event, Stage):
                yield pb.AskStreamResponse(stage=pb.StageEvent(name=event.name))
            elif isinstance(event, Retrieved):
                steps = [_step(s) for s in event.steps] if request.explain else []
                chunks = [_chunk(c) for c in event.chunks]
                yield pb.AskStreamResponse(sources=pb.SourcesEvent(chunks=chunks, steps=steps))
            elif isinstance(event, Token):
                yield pb.AskStreamResponse(token=pb.TokenEvent(text=event.text))
            elif isinstance(event, Citation):
                yield pb.AskStreamResponse(citation=_citation(event))
            else:
                yield pb.AskStreamResponse(usage=usage(call))
                by = served_by(call) if call.facts.model else None
                done = pb.DoneEvent(method=_ANSWERS[event.method], served_by=by)
                yield pb.AskStreamResponse(done=done)

    def _events(self, call: Call, request: pb.AskRequest | pb.AskStreamRequest):
        base = self._bases.get(request.knowledge_base)
        history = []
        for i, turn in enumerate(request.history):
            if turn.role == pb.TURN_ROLE_UNSPECIFIED:
                raise InvalidArgument.at(f"history[{i}].role", "is not given")
            role = "user" if turn.role == pb.TURN_ROLE_USER else "assistant"
            history.append((role, turn.text))
        call.facts.items = 1
        question = Question(
            request.question, _spec(request.retrieval), tuple(history), request.max_sentences or 2
        )
        return self._answerer.answer(call, base, question)

    async def evaluate(self, call: Call) -> pb.EvaluateResponse:
        """Evaluate."""
        request = cast(pb.EvaluateRequest, call.request)
        base = self._bases.get(request.knowledge_base)
        for i, item in enumerate(request.items):
            if not item.relevant_documents and not item.relevant_texts:
                raise InvalidArgument.at(
                    f"items[{i}]", "needs relevant_documents or relevant_texts"
                )
        runs = list(request.runs) or [pb.EvaluationRun(name="default")]
        out = pb.EvaluateResponse()
        for i, run in enumerate(runs):
            began = time.monotonic()
            spec = _spec(run.retrieval, f"runs[{i}].retrieval", least=10)
            judged, failures = await self._judge(call, base, list(request.items), spec)
            result = out.results.add(name=run.name, seconds=time.monotonic() - began)
            for f in figures(judged, failures):
                result.metrics.add(
                    name=f.name, value=f.value, low=f.low, high=f.high, n=f.n, failures=f.failures
                )
        call.facts.items = len(request.items) * len(runs)
        return out

    async def _judge(
        self, call: Call, base: Base, items: list[pb.EvaluationItem], spec: RetrievalSpec
    ) -> tuple[list[Judged], int]:
        room = asyncio.Semaphore(AT_ONCE)

        async def one(item: pb.EvaluationItem) -> Judged | None:
            async with room:
                try:
                    found = await self._retriever.retrieve(call, base, item.query, spec)
                except ForebayError:
                    return None
                return _judged(item, found.chunks)

        judged = await asyncio.gather(*(one(i) for i in items))
        good = [j for j in judged if j is not None]
        return good, len(judged) - len(good)


def _judged(item: pb.EvaluationItem, chunks: list[RetrievedChunk]) -> Judged:
    """Each relevant document counts at its first chunk; of relevant texts one is enough."""
    names = set(item.relevant_documents)
    if not names:
        hits = [any(t in c.text for t in item.relevant_texts) for c in chunks]
        first = hits.index(True) if True in hits else -1
        return Judged(tuple(i == first for i in range(len(hits))), 1)
    seen: set[str] = set()
    relevant: list[bool] = []
    for c in chunks:
        if c.document in seen:
            continue  # ranks are those of documents
        seen.add(c.document)
        relevant.append(c.document in names or c.name in names)
    return Judged(tuple(relevant), len(names))


def _spec(m: pb.RetrievalConfig, path: str = "retrieval", least: int = 0) -> RetrievalSpec:
    if m.HasField("mmr"):
        mmr = m.mmr.relevance if m.mmr.HasField("relevance") else 0.7
    else:
        mmr = None
    return RetrievalSpec(
        max(least, m.top_k or TOP_K),
        MODES[m.mode],
        condition(m.filter, f"{path}.filter") if m.HasField("filter") else None,
        fusion(m.fusion),
        m.candidates,
        m.rerank.model if m.HasField("rerank") else None,
        mmr,
    )


def _document(row: DocumentRow) -> pb.Document:
    out = pb.Document(
        id=row.id,
        name=row.name,
        media_type=row.media_type,
        size_bytes=row.size_bytes,
        sha256=row.sha256,
        status=f"DOCUMENT_STATUS_{row.status.upper()}",
        progress=row.progress,
        reason=row.reason,
        message=row.message,
        pages=len(row.pages),
        characters=row.characters,
        chunks=row.chunks,
        created_at=timestamp(row.created_at),
        updated_at=timestamp(row.updated_at),
    )
    out.metadata.update(dict(row.metadata))
    return out


def _chunk(c: RetrievedChunk) -> pb.Chunk:
    out = pb.Chunk(
        id=c.id,
        document=c.document,
        name=c.name,
        page=c.page,
        start=c.start,
        end=c.end,
        text=c.text,
        headings=c.headings,
        score=c.score,
    )
    out.metadata.update({k: v for k, v in c.metadata.items() if not k.startswith("\0")})
    return out


def _step(s: Step) -> pb.RetrievalStep:
    return pb.RetrievalStep(
        name=s.name,
        milliseconds=s.seconds * 1e3,
        candidates=[
            pb.StepCandidate(
                id=c.id,
                score=c.score,
                dense_score=c.dense_score,
                keyword_score=c.keyword_score,
            )
            for c in s.chunks
        ],
    )


def _citation(c: Citation) -> pb.Citation:
    return pb.Citation(
        number=c.number,
        chunk=c.chunk.id,
        document=c.chunk.document,
        name=c.chunk.name,
        page=c.chunk.page,
        start=c.start,
        end=c.end,
        quote=c.quote,
        verified=c.verified,
    )
