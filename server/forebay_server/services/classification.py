"""ClassificationService: labels for texts, the model's own or, zero-shot, the caller's."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import cast

import numpy as np
from forebay.constraints import Validator
from forebay.errors import InvalidArgument
from forebay.v1 import classification_pb2 as pb

from forebay_server.core.call import Call
from forebay_server.dataplane import heads
from forebay_server.dataplane.models import ServedModel, jobs_of
from forebay_server.dataplane.texts import TextJob, TextOutcome, TextPipeline
from forebay_server.dataplane.tokenization import TextInput
from forebay_server.services.base import Service, answers_in_order
from forebay_server.services.common import served_by, timing, truncation, usage

CLASSIFY = "/forebay.v1.ClassificationService/Classify"


class ClassificationService(Service):
    """See protos/forebay/v1/classification.proto."""

    name = "forebay.v1.ClassificationService"

    def __init__(self, texts: TextPipeline, validator: Validator) -> None:
        self._texts = texts
        self._validator = validator

    def classify(self, calls: Sequence[Call]) -> None:
        """Classify."""
        self._texts.run(jobs_of(calls, _job))

    def classify_stream(
        self, call: Call, requests: AsyncIterator[pb.ClassifyStreamRequest]
    ) -> AsyncIterator[object]:
        """ClassifyStream."""
        return answers_in_order(
            call,
            requests,
            CLASSIFY,
            self.classify,
            self._validator,
            lambda r: r.request,
            lambda data: pb.ClassifyStreamResponse(response=pb.ClassifyResponse.FromString(data)),
        )


def _job(call: Call) -> TextJob:
    request = cast(pb.ClassifyRequest, call.request)
    return _zero_shot(call, request) if request.candidate_labels else _plain(call, request)


def _plain(call: Call, request: pb.ClassifyRequest) -> TextJob:
    if request.hypothesis_template:
        raise InvalidArgument.at("hypothesis_template", "needs candidate_labels")

    def done(outcome: TextOutcome) -> None:
        head = outcome.model.manifest.classification_head
        scores = heads.activate(np.stack(outcome.rows), head.activation)
        _reply(call, request, scores, head.labels, outcome.truncated, outcome.original)

    return TextJob(
        call,
        request.model,
        ("text-classification",),
        lambda _: list(request.texts),
        done,
        truncate=truncation(request.truncation),
        sticky_key=request.sticky_key,
    )


def _zero_shot(call: Call, request: pb.ClassifyRequest) -> TextJob:
    labels = list(request.candidate_labels)
    if len(set(labels)) != len(labels):
        raise InvalidArgument.at("candidate_labels", "has the same label twice")
    n = len(labels)

    def inputs(model: ServedModel) -> Sequence[TextInput]:
        template = request.hypothesis_template or model.manifest.zero_shot_head.hypothesis_template
        if "{}" not in template:
            raise InvalidArgument.at("hypothesis_template", "has no {} for the label")
        hypotheses = [template.replace("{}", label) for label in labels]
        return [(text, hypothesis) for text in request.texts for hypothesis in hypotheses]

    def done(outcome: TextOutcome) -> None:
        head = outcome.model.manifest.zero_shot_head
        logits = np.stack(outcome.rows).reshape(len(request.texts), n, -1)
        scores = np.stack(
            [
                heads.zero_shot_scores(
                    rows,
                    entailment=head.entailment_index,
                    contradiction=head.contradiction_index,
                    multi_label=request.multi_label,
                )
                for rows in logits
            ]
        )
        _reply(call, request, scores, labels, outcome.truncated[::n], outcome.original[::n])

    return TextJob(
        call,
        request.model,
        ("zero-shot-classification",),
        inputs,
        done,
        truncate=truncation(request.truncation),
        sticky_key=request.sticky_key,
        path_of=lambda i: f"texts[{i // n}]",
    )


def _reply(
    call: Call,
    request: pb.ClassifyRequest,
    scores: heads.Floats,
    labels: Sequence[str],
    truncated: Sequence[bool],
    original: Sequence[int],
) -> None:
    response = pb.ClassifyResponse(
        served_by=served_by(call), usage=usage(call), timing=timing(call)
    )
    top_k = request.top_k if request.HasField("top_k") else None
    threshold = request.threshold if request.HasField("threshold") else None
    for row, cut, tokens in zip(scores, truncated, original, strict=True):
        result = response.results.add(truncated=cut, original_tokens=tokens)
        for label, score in heads.top_labels(row, labels, top_k, threshold):
            result.labels.add(label=label, score=score)
    call.reply(response)
