"""/v1/moderations: ClassificationService.Classify in OpenAI's shape.

The categories are the labels of the model that is asked, whatever they are. A category is flagged
when its label is among the settings' `http.flagged_labels` and its score is above one half. With
the starter model this marks negative sentiment, which is not moderation: serve a toxicity model
and name it in the request.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
from forebay.errors import InvalidArgument
from forebay.methods import methods
from forebay.v1 import classification_pb2 as pb
from starlette.requests import Request
from starlette.responses import Response

from forebay_gateway.json_codec import dumps, parse_json
from forebay_gateway.openai import fields, generation
from forebay_gateway.upstream import Upstream

CLASSIFY = methods()["/forebay.v1.ClassificationService/Classify"]
THRESHOLD = 0.5


def endpoint(upstream: Upstream, flagged: Collection[str]) -> Any:
    """POST /v1/moderations."""

    async def moderations(request: Request) -> Response:
        body = parse_json(await upstream.body(request))
        fields.only(body, ("input", "model"))
        if isinstance(body.get("input"), list) and any(isinstance(v, dict) for v in body["input"]):
            raise InvalidArgument.at("input", "must be text: images are not supported here")
        single = isinstance(body.get("input"), str)
        paths = ((("texts[0]", "input"),) if single else ()) + (("texts", "input"),)
        request.state.rename = lambda status: generation.renamed(status, paths)
        message = pb.ClassifyRequest(
            model=fields.text(body, "model", ""), texts=fields.texts(body, "input")
        )
        data, headers = await upstream.unary(CLASSIFY, request, message.SerializeToString())
        answer = pb.ClassifyResponse.FromString(data)
        results = []
        for result in answer.results:
            marks = {x.label: x.label in flagged and x.score > THRESHOLD for x in result.labels}
            results.append(
                {
                    "flagged": any(marks.values()),
                    "categories": marks,
                    "category_scores": {x.label: np.float32(x.score) for x in result.labels},
                    "category_applied_input_types": {x.label: ["text"] for x in result.labels},
                }
            )
        out = {
            "id": "modr-" + headers.get("x-request-id", ""),
            "model": answer.served_by.model,
            "results": results,
        }
        return Response(dumps(out), media_type="application/json", headers=headers)

    return moderations
