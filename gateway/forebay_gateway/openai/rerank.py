"""/v1/rerank (and /v2/rerank): RerankService in Cohere's and Jina's shape, which clients share.

Cohere wants `relevance_score` and `meta`, Jina `relevance_score` and `usage`: both are there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from forebay.errors import InvalidArgument
from forebay.methods import methods
from forebay.v1 import rerank_pb2 as pb
from starlette.requests import Request
from starlette.responses import Response

from forebay_gateway.json_codec import dumps, parse_json
from forebay_gateway.openai import fields
from forebay_gateway.upstream import Upstream

RERANK = methods()["/forebay.v1.RerankService/Rerank"]
PATHS = ("/v1/rerank", "/v2/rerank")
KNOWN = ("model", "query", "documents", "top_n", "return_documents")


def endpoint(upstream: Upstream) -> Any:
    """POST /v1/rerank."""

    async def rerank(request: Request) -> Response:
        message = read(parse_json(await upstream.body(request)))
        data, headers = await upstream.unary(RERANK, request, message.SerializeToString())
        answer = pb.RerankResponse.FromString(data)
        out = listed(answer, message.return_documents, headers.get("x-request-id", ""))
        return Response(dumps(out), media_type="application/json", headers=headers)

    return rerank


def read(body: dict[str, Any]) -> pb.RerankRequest:
    """The request. Raises InvalidArgument."""
    fields.only(body, KNOWN)
    return pb.RerankRequest(
        model=fields.text(body, "model", ""),
        query=fields.text(body, "query"),
        documents=_documents(body.get("documents")),
        top_n=fields.number(body, "top_n"),
        return_documents=fields.flag(body, "return_documents"),
    )


def listed(answer: pb.RerankResponse, documents: bool, request_id: str) -> dict[str, Any]:
    """The results, with their documents where they are wanted."""
    results = []
    for one in answer.results:
        item: dict[str, Any] = {"index": one.index, "relevance_score": np.float32(one.score)}
        if documents:
            item["document"] = {"text": one.document}
        results.append(item)
    tokens = answer.usage.tokens
    return {
        "id": request_id,
        "model": answer.served_by.model,
        "results": results,
        "usage": {"total_tokens": tokens, "prompt_tokens": tokens},
        "meta": {"billed_units": {"search_units": 1}},
    }


def _documents(value: Any) -> list[str]:
    if not isinstance(value, list) or not value:
        raise InvalidArgument.at("documents", "must be a list that is not empty")
    out = []
    for i, one in enumerate(value):
        text = one.get("text") if isinstance(one, dict) else one
        if not isinstance(text, str):
            raise InvalidArgument.at(
                f"documents[{i}]", "must be a string, or an object with `text`"
            )
        out.append(text)
    return out
