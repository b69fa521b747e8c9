"""Knowledge bases in the contract's words, and back."""

from __future__ import annotations

from typing import Any

from forebay.errors import InvalidArgument
from forebay.v1 import common_pb2
from forebay.v1 import generation_pb2 as gpb
from forebay.v1 import knowledge_pb2 as pb

from forebay_server.knowledge.answering import Question
from forebay_server.knowledge.bases import Base, BaseConfig
from forebay_server.knowledge.chunking import ChunkConfig
from forebay_server.knowledge.citations import Citation, Unsupported
from forebay_server.knowledge.evaluating import Item, Result, Run
from forebay_server.knowledge.evaluation_jobs import EvaluationJob
from forebay_server.knowledge.retrieval import (
    TOP_K,
    Expansion,
    RetrievalSpec,
    RetrievedChunk,
    Step,
)
from forebay_server.knowledge.writer import Written
from forebay_server.services.collection_messages import MODES, fusion
from forebay_server.services.filters import condition
from forebay_server.services.generation_messages import usage_of
from forebay_server.services.model import timestamp
from forebay_server.storage.knowledge import DocumentRow

METHODS: dict[int, Any] = {
    0: "tokens",
    1: "tokens",
    2: "sentence",
    3: "heading",
    4: "parent_child",
}
STATUSES = ("", "queued", "parsing", "embedding", "ready", "failed")
ANSWERS = {
    "extracted": pb.ANSWER_METHOD_EXTRACTED,
    "written": pb.ANSWER_METHOD_WRITTEN,
    "not_found": pb.ANSWER_METHOD_NOT_FOUND,
    "refused": pb.ANSWER_METHOD_REFUSED,
}
JOB_STATUSES = {
    "running": pb.EVALUATION_STATUS_RUNNING,
    "done": pb.EVALUATION_STATUS_DONE,
    "failed": pb.EVALUATION_STATUS_FAILED,
}


def config_of(m: pb.KnowledgeBaseConfig) -> BaseConfig:
    """What a knowledge base is to be."""
    c = m.chunks
    overlap = c.overlap if c.HasField("overlap") else None
    chunks = ChunkConfig(METHODS[c.method], c.tokens or 1000, overlap)
    return BaseConfig(m.embedding_model, m.language, chunks)


def base_message(base: Base, documents: int, chunks: int) -> pb.KnowledgeBase:
    """A knowledge base with its sizes."""
    c = base.config.chunks
    config = pb.KnowledgeBaseConfig(
        embedding_model=base.config.embedding_model,
        language=base.config.language,
        chunks=pb.ChunkConfig(
            method=f"CHUNK_METHOD_{c.method.upper()}",
            tokens=c.tokens,
            overlap=c.tokens // 5 if c.overlap is None else c.overlap,
        ),
    )
    return pb.KnowledgeBase(
        name=base.name,
        config=config,
        documents=documents,
        chunks=chunks,
        created_at=timestamp(base.row.created_at),
    )


def question_of(request: pb.AskRequest | pb.AskStreamRequest) -> Question:
    """What is asked."""
    history = []
    for i, turn in enumerate(request.history):
        if turn.role == pb.TURN_ROLE_UNSPECIFIED:
            raise InvalidArgument.at(f"history[{i}].role", "is not given")
        role = "user" if turn.role == pb.TURN_ROLE_USER else "assistant"
        history.append((role, turn.text))
    return Question(
        request.question,
        spec_of(request.retrieval),
        tuple(history),
        request.max_sentences or 2,
        request.model,
        request.extract,
    )


def spec_of(m: pb.RetrievalConfig, path: str = "retrieval") -> RetrievalSpec:
    """How chunks are chosen."""
    if m.HasField("mmr"):
        mmr = m.mmr.relevance if m.mmr.HasField("relevance") else 0.7
    else:
        mmr = None
    return RetrievalSpec(
        m.top_k or TOP_K,
        MODES[m.mode],
        condition(m.filter, f"{path}.filter") if m.HasField("filter") else None,
        fusion(m.fusion),
        m.candidates,
        m.rerank.model if m.HasField("rerank") else None,
        mmr,
        Expansion(m.expand.model, m.expand.queries or 3) if m.HasField("expand") else None,
        m.hyde.model if m.HasField("hyde") else None,
        path,
    )


def document_message(row: DocumentRow) -> pb.Document:
    """A document and where it stands."""
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


def chunk_message(c: RetrievedChunk) -> pb.Chunk:
    """A chunk with its place."""
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


def step_message(s: Step) -> pb.RetrievalStep:
    """What a step did."""
    return pb.RetrievalStep(
        name=s.name,
        milliseconds=s.seconds * 1e3,
        queries=s.written,
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


def citation_message(c: Citation) -> pb.Citation:
    """A citation."""
    return pb.Citation(
        number=c.number,
        chunk=c.chunk.id,
        document=c.chunk.document,
        name=c.chunk.name,
        page=c.page,
        start=c.start,
        end=c.end,
        quote=c.quote,
        verified=c.verified,
        answer_start=c.answer_start,
        answer_end=c.answer_end,
    )


def unsupported_message(u: Unsupported) -> pb.Unsupported:
    """A piece of an answer that is not supported."""
    reason = f"UNSUPPORTED_REASON_{u.reason.upper()}"
    return pb.Unsupported(start=u.start, end=u.end, reason=reason)


def written_by(w: Written) -> common_pb2.ServedBy | None:
    """The language model that wrote; None when none did."""
    return common_pb2.ServedBy(model=w.model, version=w.version) if w.model else None


def generation_usage(w: Written) -> gpb.GenerationUsage | None:
    """What language models consumed; None when none was asked."""
    return usage_of(w.tally) if w.model else None


def items_of(request: pb.EvaluateRequest | pb.StartEvaluationRequest) -> list[Item]:
    """The questions of an evaluation."""
    answering = any(r.answer for r in request.runs)
    out = []
    for i, m in enumerate(request.items):
        if not (m.relevant_documents or m.relevant_texts or m.answers or answering):
            raise InvalidArgument.at(
                f"items[{i}]",
                "needs relevant_documents, relevant_texts or answers, or a run that answers",
            )
        out.append(
            Item(m.query, tuple(m.relevant_documents), tuple(m.relevant_texts), tuple(m.answers))
        )
    return out


def runs_of(request: pb.EvaluateRequest | pb.StartEvaluationRequest) -> list[Run]:
    """The configurations of an evaluation."""
    names = [r.name for r in request.runs]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise InvalidArgument.at(f"runs[{i}].name", f"{name!r} is there twice")
    return [
        Run(m.name, spec_of(m.retrieval, f"runs[{i}].retrieval"), m.answer, m.model, m.extract)
        for i, m in enumerate(request.runs)
    ] or [Run("default")]


def result_message(r: Result) -> pb.EvaluationResult:
    """What a configuration was measured to be."""
    out = pb.EvaluationResult(name=r.name, seconds=r.seconds)
    for f in r.figures:
        out.metrics.add(
            name=f.name, value=f.value, low=f.low, high=f.high, n=f.n, failures=f.failures
        )
    return out


def evaluation_message(job: EvaluationJob) -> pb.Evaluation:
    """An evaluation with its results."""
    request = pb.StartEvaluationRequest.FromString(job.request)
    return pb.Evaluation(
        id=job.id,
        name=job.name,
        status=JOB_STATUSES[job.status],
        progress=job.progress,
        message=job.message,
        items=job.items,
        runs=request.runs,
        results=[result_message(r) for r in job.results],
        created_at=timestamp(job.created_at),
        ended_at=timestamp(job.ended_at) if job.ended_at else None,
    )
