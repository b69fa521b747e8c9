"""EmbeddingService: texts and token ids to vectors."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import cast

import numpy as np
from forebay.constraints import Validator
from forebay.errors import InvalidArgument
from forebay.twin.v1 import embedding_pb2 as twin
from forebay.v1 import embedding_pb2

from forebay_server.core.call import Call
from forebay_server.dataplane import heads
from forebay_server.dataplane.models import ServedModel, jobs_of
from forebay_server.dataplane.texts import TextJob, TextOutcome, TextPipeline
from forebay_server.dataplane.tokenization import TextInput
from forebay_server.services.base import Service, answers_in_order
from forebay_server.services.common import exactly_one, served_by, timing, truncation, usage

EMBED = "/forebay.v1.EmbeddingService/Embed"


class EmbeddingService(Service):
    """See protos/forebay/v1/embedding.proto."""

    name = "forebay.v1.EmbeddingService"

    def __init__(self, texts: TextPipeline, validator: Validator) -> None:
        self._texts = texts
        self._validator = validator

    def embed(self, calls: Sequence[Call]) -> None:
        """Embed."""

        def make(call: Call) -> TextJob:
            return _job(call, cast(embedding_pb2.EmbedRequest, call.request))

        self._texts.run(jobs_of(calls, make))

    def embed_stream(
        self, call: Call, requests: AsyncIterator[embedding_pb2.EmbedStreamRequest]
    ) -> AsyncIterator[object]:
        """EmbedStream."""
        return answers_in_order(
            call,
            requests,
            EMBED,
            self.embed,
            self._validator,
            lambda r: r.request,
            lambda data: embedding_pb2.EmbedStreamResponse(
                response=embedding_pb2.EmbedResponse.FromString(data)
            ),
        )


def _job(call: Call, request: embedding_pb2.EmbedRequest) -> TextJob:
    path = exactly_one(texts=request.texts, token_ids=request.token_ids)
    dimensions = request.dimensions if request.HasField("dimensions") else None
    normalize = request.normalize if request.HasField("normalize") else None

    def inputs(model: ServedModel) -> Sequence[TextInput]:
        head = model.manifest.embedding_head
        heads.check_dimensions(dimensions, head.dimensions, head.matryoshka)
        if path == "token_ids":
            return [np.array(t.ids, np.int64) for t in request.token_ids]
        prompt = _prompt(request.prompt_name, head.prompts)
        return [prompt + t for t in request.texts] if prompt else list(request.texts)

    def done(outcome: TextOutcome) -> None:
        head = outcome.model.manifest.embedding_head
        matrix = heads.vectors(
            outcome.rows,
            normalize=head.normalize if normalize is None else normalize,
            normalized_by_model=head.normalize,
            dimensions=dimensions,
        )
        response = twin.EmbedResponse(
            dimensions=matrix.shape[1],
            served_by=served_by(call),
            usage=usage(call),
            timing=timing(call),
        )
        add = response.embeddings.add
        for row, tokens, cut, original in zip(
            matrix, outcome.tokens, outcome.truncated, outcome.original, strict=True
        ):
            add(values=row.tobytes(), tokens=tokens, truncated=cut, original_tokens=original)
        call.reply(response)

    return TextJob(
        call,
        request.model,
        ("embedding",),
        inputs,
        done,
        truncate=truncation(request.truncation),
        sticky_key=request.sticky_key,
        path=path,
    )


def _prompt(name: str, prompts: dict[str, str]) -> str:
    if not name:
        return ""
    if name not in prompts:
        known = ", ".join(sorted(prompts)) or "none: the model has no prompts"
        raise InvalidArgument.at("prompt_name", f"is {name!r}; known are {known}")
    return prompts[name]
