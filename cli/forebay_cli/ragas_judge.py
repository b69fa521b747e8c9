"""Answers judged by a language model, by ragas: faithfulness, answer relevance, context precision and
recall. Runs here and not in the server: ragas brings a hundred packages.

The judge and the embeddings are models that the gateway serves, called as OpenAI's are.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from forebay.v1 import knowledge_pb2 as pb
    from forebay.v1.knowledge_pb2_grpc import KnowledgeServiceStub

#: Seconds for one question to the judge, and questions that it is asked at once.
TIMEOUT_S, AT_ONCE = 180, 4
PREFIX = "judge: "


def judged(
    stub: KnowledgeServiceStub,
    metadata: Any,
    request: pb.StartEvaluationRequest,
    run: pb.EvaluationRun,
    judge: str,
    url: str,
) -> list[dict[str, Any]]:
    """The judge's figures of one configuration. A reply that the judge does not give in the form
    that is asked for is a failure, not a figure."""
    try:
        import ragas  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise typer.BadParameter("--judge needs ragas: pip install 'forebay[evaluation]'") from None
    from ragas.run_config import RunConfig  # pyright: ignore[reportMissingImports]

    samples, failed = _asked(stub, metadata, request, run)
    metrics = _metrics(any(s["reference"] for s in samples))
    table: list[dict[str, Any]] = []
    if samples:
        llm, embeddings = _models(judge, url)
        result = ragas.evaluate(
            ragas.EvaluationDataset.from_list(
                [{k: v for k, v in s.items() if v is not None} for s in samples]
            ),
            metrics=list(metrics.values()),
            llm=llm,
            embeddings=embeddings,
            run_config=RunConfig(timeout=TIMEOUT_S, max_workers=AT_ONCE, max_retries=1),
            raise_exceptions=False,
            show_progress=False,
        )
        table = result.to_pandas().to_dict("records")
    return [
        summary(PREFIX + name, [row.get(metric.name) for row in table], failed)
        for name, metric in metrics.items()
    ]


def _asked(
    stub: KnowledgeServiceStub,
    metadata: Any,
    request: pb.StartEvaluationRequest,
    run: pb.EvaluationRun,
) -> tuple[list[dict[str, Any]], int]:
    """Every question with its answer and chunks, as ragas takes them; and how many failed."""
    import grpc
    from forebay.v1 import knowledge_pb2 as pb

    samples: list[dict[str, Any]] = []
    failed = 0
    for item in request.items:
        ask = pb.AskRequest(
            knowledge_base=request.knowledge_base,
            question=item.query,
            retrieval=run.retrieval,
            model=run.model,
            extract=run.extract,
        )
        try:
            answer = stub.Ask(ask, metadata=metadata)
        except grpc.RpcError:
            failed += 1
            continue
        samples.append(
            {
                "user_input": item.query,
                "response": answer.answer,
                "retrieved_contexts": [c.text for c in answer.sources] or [""],
                "reference": item.answers[0] if item.answers else None,
            }
        )
    return samples, failed


def _metrics(with_reference: bool) -> dict[str, Any]:
    from ragas import metrics  # pyright: ignore[reportMissingImports]

    out: dict[str, Any] = {
        "faithfulness": metrics.Faithfulness(),
        "answer_relevance": metrics.ResponseRelevancy(),
        "context_precision": metrics.LLMContextPrecisionWithoutReference(),
    }
    if with_reference:
        out["context_precision"] = metrics.LLMContextPrecisionWithReference()
        out["context_recall"] = metrics.LLMContextRecall()
    return out


def _models(judge: str, url: str) -> tuple[Any, Any]:
    from langchain_openai import ChatOpenAI, OpenAIEmbeddings
    from pydantic import SecretStr
    from ragas.embeddings import LangchainEmbeddingsWrapper  # pyright: ignore[reportMissingImports]
    from ragas.llms import LangchainLLMWrapper  # pyright: ignore[reportMissingImports]

    base, key = f"{url.rstrip('/')}/v1", SecretStr(os.environ.get("FOREBAY_KEY") or "none")
    chat = ChatOpenAI(model=judge, base_url=base, api_key=key, temperature=0, timeout=TIMEOUT_S)
    # An empty name is the server's default embedding model; texts are sent as texts, not as token
    # ids of OpenAI's own tokenizer.
    embeddings = OpenAIEmbeddings(
        model=os.environ.get("FOREBAY_JUDGE_EMBEDDINGS", "minilm"),
        base_url=base,
        api_key=key,
        check_embedding_ctx_length=False,
    )
    return LangchainLLMWrapper(chat), LangchainEmbeddingsWrapper(embeddings)


def summary(name: str, values: Sequence[float | None], failed: int) -> dict[str, Any]:
    """Mean and 95% interval by bootstrap of what is a number; the rest are failures. Never NaN."""
    import random

    good = [float(v) for v in values if v is not None and math.isfinite(float(v))]
    out = {"name": name, "n": len(good), "failures": failed + len(values) - len(good)}
    if not good:
        return {**out, "value": 0.0, "low": 0.0, "high": 0.0}
    chance = random.Random(0)
    means = sorted(sum(chance.choices(good, k=len(good))) / len(good) for _ in range(1000))
    return {**out, "value": sum(good) / len(good), "low": means[24], "high": means[974]}
