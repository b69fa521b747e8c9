"""/v1/embeddings: EmbeddingService.Embed in OpenAI's shape."""

from __future__ import annotations

import base64
import re
from typing import Any

import numpy as np
from forebay.errors import InvalidArgument
from forebay.methods import methods
from forebay.twin.v1 import embedding_pb2 as twin
from forebay.v1 import common_pb2
from forebay.v1 import embedding_pb2 as pb
from starlette.requests import Request
from starlette.responses import Response

from forebay_gateway import rest
from forebay_gateway.json_codec import dumps, parse_json
from forebay_gateway.openai import fields, generation
from forebay_gateway.upstream import Upstream

EMBED = methods()["/forebay.v1.EmbeddingService/Embed"]
KNOWN = ("input", "model", "encoding_format", "dimensions", "truncation", "user")
#: What is done with inputs beyond the model's limit.
TRUNCATIONS = {
    "end": common_pb2.TRUNCATION_END,
    "start": common_pb2.TRUNCATION_START,
    "none": common_pb2.TRUNCATION_NONE,
}
_IDS = re.compile(r"^(input\[\d+\])\.ids")


def endpoint(upstream: Upstream) -> Any:
    """POST /v1/embeddings."""

    async def embeddings(request: Request) -> Response:
        body = parse_json(await upstream.body(request))
        message, form = read(body)
        request.state.rename = words(body)
        data, headers = await upstream.unary(EMBED, request, message.SerializeToString())
        out = listed(twin.EmbedResponse.FromString(data), form)
        return Response(dumps(out), media_type="application/json", headers=headers)

    return embeddings


def words(body: dict[str, Any]) -> rest.Rename:
    """The contract's field paths in the words of this body."""
    value = body.get("input")
    if isinstance(value, list) and isinstance(value[0], (str, list)):
        paths = (("texts", "input"), ("token_ids", "input"))
    else:
        names = ("texts[0]", "texts", "token_ids[0].ids", "token_ids[0]", "token_ids")
        paths = tuple((name, "input") for name in names)

    def rename(path: str) -> str:
        return _IDS.sub(r"\1", generation.in_words(path, paths))

    return lambda status: generation.rewritten(status, rename)


def read(body: dict[str, Any]) -> tuple[pb.EmbedRequest, str]:
    """The request, and the form of its vectors. Raises InvalidArgument."""
    fields.only(body, KNOWN)
    form = fields.text(body, "encoding_format", "float")
    if form not in ("float", "base64"):
        raise InvalidArgument.at("encoding_format", f"is {form!r}; allowed are float, base64")
    truncation = fields.text(body, "truncation", "end")
    if truncation not in TRUNCATIONS:
        raise InvalidArgument.at(
            "truncation", f"is {truncation!r:.40}; allowed are {', '.join(TRUNCATIONS)}"
        )
    message = pb.EmbedRequest(
        model=fields.text(body, "model"),
        dimensions=fields.number(body, "dimensions"),
        truncation=TRUNCATIONS[truncation],
    )
    _input(body.get("input"), message)
    return message, form


def listed(answer: twin.EmbedResponse, form: str) -> dict[str, Any]:
    """The vectors as a list object. Its `usage` has `truncated`, how many inputs were cut, where any was."""
    tokens, truncated = answer.usage.tokens, answer.usage.truncated
    cut = {"truncated": truncated} if truncated else {}
    return {
        "object": "list",
        "data": [
            {
                "object": "embedding",
                "index": i,
                "embedding": base64.b64encode(e.values).decode()
                if form == "base64"
                else np.frombuffer(e.values, np.float32),
            }
            for i, e in enumerate(answer.embeddings)
        ],
        "model": answer.served_by.model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens, **cut},
    }


def _input(value: Any, message: pb.EmbedRequest) -> None:
    """A string, strings, token ids, or lists of token ids."""
    if isinstance(value, str):
        message.texts.append(value)
        return
    if not isinstance(value, list) or not value:
        raise InvalidArgument.at(
            "input", "must be a string, a list of strings, token ids, or lists of token ids"
        )
    if isinstance(value[0], str):
        message.texts.extend(fields.texts({"input": value}, "input"))
    elif isinstance(value[0], list):
        for i, ids in enumerate(value):
            message.token_ids.add(ids=_ids(ids, f"input[{i}]"))
    else:
        message.token_ids.add(ids=_ids(value, "input"))


def _ids(value: Any, path: str) -> list[int]:
    if not isinstance(value, list) or not value:
        raise InvalidArgument.at(path, "must be a list of token ids that is not empty")
    for i, one in enumerate(value):
        if not isinstance(one, int) or isinstance(one, bool) or not 0 <= one < 2**31:
            raise InvalidArgument.at(f"{path}[{i}]", f"is {one!r:.40}; a token id is needed")
    return value
