"""KnowledgeService: documents in, chunks and cited answers out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, suppress
from functools import partial
from typing import cast

from forebay.errors import FailedPrecondition, InvalidArgument, NotFound, Unavailable
from forebay.v1 import knowledge_pb2 as pb

from forebay_server.core.call import Call, Principal
from forebay_server.knowledge.answering import Answerer, Done, Event, Stage, Token
from forebay_server.knowledge.bases import Base, KnowledgeBases
from forebay_server.knowledge.citations import Citation, Unsupported
from forebay_server.knowledge.evaluating import Evaluator
from forebay_server.knowledge.evaluation_jobs import EvaluationJob, EvaluationJobs
from forebay_server.knowledge.ingest import Ingest, internal_call
from forebay_server.knowledge.retrieval import Retrieved, Retriever
from forebay_server.knowledge.uploads import Upload
from forebay_server.knowledge.writer import Written
from forebay_server.services import knowledge_messages as messages
from forebay_server.services.base import Service
from forebay_server.services.common import served_by, usage
from forebay_server.services.filters import to_dict
from forebay_server.services.paging import Page


class KnowledgeService(Service):
    """See protos/forebay/v1/knowledge.proto."""

    name = "forebay.v1.KnowledgeService"

    def __init__(
        self,
        bases: KnowledgeBases,
        ingest: Ingest,
        retriever: Retriever,
        answerer: Answerer,
        evaluator: Evaluator,
        jobs: EvaluationJobs,
        on_part: Callable[[Call], None] = lambda call: None,
    ) -> None:
        self._bases = bases
        self._ingest = ingest
        self._retriever = retriever
        self._answerer = answerer
        self._evaluator = evaluator
        self._jobs = jobs
        self._on_part = on_part
        jobs.execute = self._execute

    # Knowledge bases.

    async def create_knowledge_base(self, call: Call) -> pb.CreateKnowledgeBaseResponse:
        """CreateKnowledgeBase."""
        request = cast(pb.CreateKnowledgeBaseRequest, call.request)
        config = messages.config_of(request.config)
        base = await self._bases.create(call, request.knowledge_base, config)
        return pb.CreateKnowledgeBaseResponse(knowledge_base=await self._base(base))

    async def get_knowledge_base(self, call: Call) -> pb.GetKnowledgeBaseResponse:
        """GetKnowledgeBase."""
        request = cast(pb.GetKnowledgeBaseRequest, call.request)
        base = await self._bases.get(request.knowledge_base)
        return pb.GetKnowledgeBaseResponse(knowledge_base=await self._base(base))

    async def list_knowledge_bases(self, call: Call) -> pb.ListKnowledgeBasesResponse:
        """ListKnowledgeBases."""
        request = cast(pb.ListKnowledgeBasesRequest, call.request)
        bases = await self._bases.listed()
        chosen, following = Page(request, 100, str).of(bases, lambda b: (b.row.name,))
        out = pb.ListKnowledgeBasesResponse(next_page_token=following)
        for base in chosen:
            with suppress(NotFound):  # removed meanwhile
                out.knowledge_bases.append(await self._base(base))
        return out

    async def delete_knowledge_base(self, call: Call) -> pb.DeleteKnowledgeBaseResponse:
        """DeleteKnowledgeBase."""
        request = cast(pb.DeleteKnowledgeBaseRequest, call.request)
        self._jobs.forget(await self._bases.get(request.knowledge_base))
        count = await self._bases.delete(request.knowledge_base)
        return pb.DeleteKnowledgeBaseResponse(documents=count)

    async def _base(self, base: Base) -> pb.KnowledgeBase:
        documents = await self._bases.store.count(base.row.id)
        try:
            chunks = len((await self._bases.collections.known(base.collection)).index)
        except NotFound:  # another server has removed it
            raise NotFound("knowledge base", base.name) from None
        return messages.base_message(base, documents, chunks)

    # Documents.

    async def upload_document(
        self, call: Call, requests: AsyncIterator[pb.UploadDocumentRequest]
    ) -> pb.UploadDocumentResponse:
        """UploadDocument."""
        first = await anext(requests, None)
        if first is None or first.WhichOneof("part") != "header":
            raise InvalidArgument.at("header", "must be the first message of the stream")
        header = first.header
        base = await self._bases.get(header.knowledge_base)
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
                kept += 1
                row, known = await self._bases.add(
                    base,
                    upload,
                    metadata,
                    call.principal.key_id,
                    partial(self._ingest.put, password=header.password),
                )
                out.documents.add(document=messages.document_message(row), duplicate=known)
            call.facts.items = len(uploads)
            return out
        except BaseException:
            for upload in uploads[kept:]:
                upload.abort()
            raise

    async def ingest_text(self, call: Call) -> pb.IngestTextResponse:
        """IngestText."""
        request = cast(pb.IngestTextRequest, call.request)
        base = await self._bases.get(request.knowledge_base)
        name = request.name or "text"
        metadata = to_dict(request.metadata, "metadata")
        if "." not in name:
            name = f"{name}.md"  # so that headings are seen
        upload = self._bases.upload(base, name)
        try:
            await asyncio.to_thread(upload.write, request.text.encode())
        except BaseException:
            upload.abort()
            raise
        row, known = await self._bases.add(
            base, upload, metadata, call.principal.key_id, self._ingest.put
        )
        call.facts.items = 1
        return pb.IngestTextResponse(document=messages.document_message(row), duplicate=known)

    async def get_document(self, call: Call) -> pb.GetDocumentResponse:
        """GetDocument."""
        request = cast(pb.GetDocumentRequest, call.request)
        base = await self._bases.get(request.knowledge_base)
        row = await self._bases.document(base, request.document)
        out = pb.GetDocumentResponse(document=messages.document_message(row))
        if request.with_text:
            text = await self._bases.texts.read(base.row.id, row.id)
            starts = row.pages or [0]
            for number, (start, end) in enumerate(
                zip(starts, [*starts[1:], len(text)], strict=True), 1
            ):
                out.pages.add(number=number, start=start, text=text[start:end])
        return out

    async def list_documents(self, call: Call) -> pb.ListDocumentsResponse:
        """ListDocuments."""
        request = cast(pb.ListDocumentsRequest, call.request)
        base = await self._bases.get(request.knowledge_base)
        page = Page(request, 100, float, str)
        rows = await self._bases.store.page(
            base.row.id, messages.STATUSES[request.status], page.behind, page.size + 1
        )
        chosen, following = page.cut(rows, lambda r: (r.created_at, r.id))
        return pb.ListDocumentsResponse(
            documents=[messages.document_message(r) for r in chosen], next_page_token=following
        )

    async def delete_document(self, call: Call) -> pb.DeleteDocumentResponse:
        """DeleteDocument."""
        request = cast(pb.DeleteDocumentRequest, call.request)
        base = await self._bases.get(request.knowledge_base)
        chunks = await self._bases.delete_document(base, request.document)
        return pb.DeleteDocumentResponse(chunks=chunks)

    async def reingest_document(self, call: Call) -> pb.ReingestDocumentResponse:
        """ReingestDocument."""
        request = cast(pb.ReingestDocumentRequest, call.request)
        base = await self._bases.get(request.knowledge_base)
        row = await self._bases.document(base, request.document)
        here = await self._bases.reachable(row)
        if request.password and not here:
            raise Unavailable(
                f"the file of document {row.id!r} is not on this server's disk, and passwords stay "
                "with the server that was told them: ask the server that took the document",
                reason="FILE_AWAY",
            )
        queued = await self._bases.store.queue_again(row.id, here)
        row = await self._bases.document(base, row.id)
        if not queued:
            raise FailedPrecondition(
                f"document {row.id!r} is {row.status}; wait until it is ready or has failed",
                reason="INGEST_RUNNING",
            )
        if here:
            self._ingest.put(row, request.password)
        return pb.ReingestDocumentResponse(document=messages.document_message(row))

    # Questions.

    async def retrieve(self, call: Call) -> pb.RetrieveResponse:
        """Retrieve."""
        request = cast(pb.RetrieveRequest, call.request)
        base = await self._bases.get(request.knowledge_base)
        call.facts.items = 1
        spec = messages.spec_of(request.retrieval)
        found = await self._retriever.retrieve(call, base, request.query, spec, Written())
        return pb.RetrieveResponse(
            chunks=[messages.chunk_message(c) for c in found.chunks],
            steps=[messages.step_message(s) for s in found.steps] if request.explain else [],
            served_by=served_by(call) if call.facts.model else None,
            usage=usage(call),
        )

    async def ask(self, call: Call) -> pb.AskResponse:
        """Ask."""
        request = cast(pb.AskRequest, call.request)
        out = pb.AskResponse()
        async with aclosing(self._events(call, request)) as events:
            async for event in events:
                if isinstance(event, Retrieved):
                    out.query = event.query
                    out.sources.extend(messages.chunk_message(c) for c in event.chunks)
                    if request.explain:
                        out.steps.extend(messages.step_message(s) for s in event.steps)
                elif isinstance(event, Token):
                    out.answer += event.text
                elif isinstance(event, Citation):
                    out.citations.append(messages.citation_message(event))
                elif isinstance(event, Unsupported):
                    out.unsupported.append(messages.unsupported_message(event))
                elif isinstance(event, Done):
                    out.method = messages.ANSWERS[event.method]
                    written = messages.written_by(event.written)
                    if written is not None:
                        out.written_by.CopyFrom(written)
                        out.generation_usage.CopyFrom(messages.usage_of(event.written.tally))
        out.usage.CopyFrom(usage(call))
        if call.facts.model:
            out.served_by.CopyFrom(served_by(call))
        return out

    async def ask_stream(self, call: Call) -> AsyncIterator[pb.AskStreamResponse]:
        """AskStream."""
        request = cast(pb.AskStreamRequest, call.request)
        async with aclosing(self._events(call, request)) as events:
            async for event in events:
                if isinstance(event, Done):
                    yield pb.AskStreamResponse(usage=usage(call))
                yield _stream_message(call, event, request.explain)

    async def _events(
        self, call: Call, request: pb.AskRequest | pb.AskStreamRequest
    ) -> AsyncGenerator[Event, None]:
        base = await self._bases.get(request.knowledge_base)
        call.facts.items = 1
        question = messages.question_of(request)
        async with aclosing(self._answerer.answer(call, base, question)) as events:
            async for event in events:
                yield event

    # Evaluations.

    async def evaluate(self, call: Call) -> pb.EvaluateResponse:
        """Evaluate."""
        request = cast(pb.EvaluateRequest, call.request)
        base = await self._bases.get(request.knowledge_base)
        items, runs = messages.items_of(request), messages.runs_of(request)
        out = pb.EvaluateResponse()
        for run in runs:
            result = await self._evaluator.run(call, base, items, run)
            out.results.append(messages.result_message(result))
        call.facts.items = len(items) * len(runs)
        return out

    async def start_evaluation(self, call: Call) -> pb.StartEvaluationResponse:
        """StartEvaluation."""
        request = cast(pb.StartEvaluationRequest, call.request)
        base = await self._bases.get(request.knowledge_base)
        items, _ = messages.items_of(request), messages.runs_of(request)  # raise for bad fields
        who = call.principal
        job = await self._jobs.add(
            base,
            request.name,
            who.key_id,
            sorted(who.models),
            len(items),
            request.SerializeToString(),
        )
        return pb.StartEvaluationResponse(evaluation=messages.evaluation_message(job))

    async def get_evaluation(self, call: Call) -> pb.GetEvaluationResponse:
        """GetEvaluation."""
        request = cast(pb.GetEvaluationRequest, call.request)
        job = await self._jobs.get(
            await self._bases.get(request.knowledge_base), request.evaluation
        )
        return pb.GetEvaluationResponse(evaluation=messages.evaluation_message(job))

    async def list_evaluations(self, call: Call) -> pb.ListEvaluationsResponse:
        """ListEvaluations."""
        request = cast(pb.ListEvaluationsRequest, call.request)
        jobs = await self._jobs.of(await self._bases.get(request.knowledge_base))
        page = Page(request, 100, float, str)
        chosen, following = page.of(jobs, lambda j: (-j.created_at, j.id))
        return pb.ListEvaluationsResponse(
            evaluations=[messages.evaluation_message(j) for j in chosen],
            next_page_token=following,
        )

    async def delete_evaluation(self, call: Call) -> pb.DeleteEvaluationResponse:
        """DeleteEvaluation."""
        request = cast(pb.DeleteEvaluationRequest, call.request)
        await self._jobs.delete(await self._bases.get(request.knowledge_base), request.evaluation)
        return pb.DeleteEvaluationResponse()

    async def _execute(self, job: EvaluationJob, note: Callable[[], None]) -> None:
        """Carry an evaluation out; runs that are done already are left out."""
        base = await self._bases.by_id(job.base_id)
        if base is None:
            return
        request = pb.StartEvaluationRequest.FromString(job.request)
        items, runs = messages.items_of(request), messages.runs_of(request)
        done = len(job.results) * len(items)
        call = internal_call()
        call.principal = Principal(job.key_id, frozenset({"infer"}), frozenset(job.models))

        def on_item() -> None:
            nonlocal done
            done += 1
            job.progress = done / (len(items) * len(runs))

        try:
            for run in runs[len(job.results) :]:
                job.results.append(await self._evaluator.run(call, base, items, run, on_item))
                await asyncio.to_thread(note)
        finally:
            call.facts.items = done
            self._on_part(call)


def _stream_message(call: Call, event: Event, explain: bool) -> pb.AskStreamResponse:
    if isinstance(event, Stage):
        return pb.AskStreamResponse(stage=pb.StageEvent(name=event.name))
    if isinstance(event, Retrieved):
        steps = [messages.step_message(s) for s in event.steps] if explain else []
        chunks = [messages.chunk_message(c) for c in event.chunks]
        sources = pb.SourcesEvent(chunks=chunks, steps=steps, query=event.query)
        return pb.AskStreamResponse(sources=sources)
    if isinstance(event, Token):
        return pb.AskStreamResponse(token=pb.TokenEvent(text=event.text))
    if isinstance(event, Citation):
        return pb.AskStreamResponse(citation=messages.citation_message(event))
    if isinstance(event, Unsupported):
        return pb.AskStreamResponse(unsupported=messages.unsupported_message(event))
    done = pb.DoneEvent(
        method=messages.ANSWERS[event.method],
        served_by=served_by(call) if call.facts.model else None,
        written_by=messages.written_by(event.written),
        generation_usage=messages.generation_usage(event.written),
    )
    return pb.AskStreamResponse(done=done)
