"""RerankService: documents sorted by relevance to a query."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
from forebay.errors import InvalidArgument
from forebay.v1 import rerank_pb2 as pb

from forebay_server.core.call import Call
from forebay_server.dataplane import heads
from forebay_server.dataplane.models import ServedModel, jobs_of
from forebay_server.dataplane.texts import TextJob, TextOutcome, TextPipeline
from forebay_server.dataplane.tokenization import TextInput
from forebay_server.services.base import Service
from forebay_server.services.common import served_by, timing, truncation, usage


class RerankService(Service):
    """See protos/forebay/v1/rerank.proto."""

    name = "forebay.v1.RerankService"

    def __init__(self, texts: TextPipeline) -> None:
        self._texts = texts

    def rerank(self, calls: Sequence[Call]) -> None:
        """Rerank."""
        self._texts.run(jobs_of(calls, lambda c: _job(c, cast(pb.RerankRequest, c.request))))


def _job(call: Call, request: pb.RerankRequest) -> TextJob:
    cross: list[bool] = []  # whether the model scores pairs; known once it is resolved

    def inputs(model: ServedModel) -> Sequence[TextInput]:
        cross.append(model.manifest.task == "rerank")
        if cross[-1]:
            return [(request.query, document) for document in request.documents]
        prompts = model.manifest.embedding_head.prompts
        return [
            prompts.get("query", "") + request.query,
            *(prompts.get("document", "") + d for d in request.documents),
        ]

    def path(i: int) -> str:
        if cross[-1]:
            return f"documents[{i}]"
        return "query" if i == 0 else f"documents[{i - 1}]"

    def done(outcome: TextOutcome) -> None:
        if cross[-1]:
            scores = _pair_scores(outcome)
            truncated = outcome.truncated
        else:
            unit = heads.vectors(
                outcome.rows, normalize=True, normalized_by_model=False, dimensions=None
            )
            scores = unit[1:] @ unit[0]
            truncated = outcome.truncated[1:]
        order = np.argsort(-scores, kind="stable")
        if request.HasField("top_n"):
            order = order[: request.top_n]
        response = pb.RerankResponse(
            served_by=served_by(call), usage=usage(call), timing=timing(call)
        )
        for i in order.tolist():
            response.results.add(
                index=i,
                score=float(scores[i]),
                document=request.documents[i] if request.return_documents else "",
                truncated=truncated[i],
            )
        call.reply(response)

    return TextJob(
        call,
        request.model,
        ("rerank", "embedding"),
        inputs,
        done,
        truncate=truncation(request.truncation),
        sticky_key=request.sticky_key,
        path="documents",
        path_of=path,
    )


def _pair_scores(outcome: TextOutcome) -> heads.Floats:
    logits = np.stack(outcome.rows)
    if logits.shape[1] != 1:
        raise InvalidArgument.at(
            "model", f"gives {logits.shape[1]} numbers per pair; a reranker gives 1"
        )
    return heads.activate(logits[:, 0], outcome.model.manifest.rerank_head.activation)
