"""/v1/completions: GenerationService.Complete and CompleteStream in OpenAI's shape."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator
from typing import Any

from forebay.errors import InvalidArgument
from forebay.methods import methods
from forebay.v1 import generation_pb2 as pb
from google.rpc import status_pb2
from starlette.requests import Request
from starlette.responses import Response

from forebay_gateway import rest
from forebay_gateway.openai import fields, generation
from forebay_gateway.upstream import Upstream

COMPLETE = methods()["/forebay.v1.GenerationService/Complete"]
STREAM = methods()["/forebay.v1.GenerationService/CompleteStream"]
KNOWN = (
    "model",
    "prompt",
    "echo",
    "best_of",
    "logprobs",
    "response_format",
    "structured_outputs",
    "stream",
    "stream_options",
    "user",
    "priority",
    "adapter",
    "truncate_prompt",
    "cache",
    *generation.SAMPLING,
)
#: OpenAI's own default for this door; chats go on to the context's end.
MAX_TOKENS = 16
_IDS = re.compile(r"^(prompt\[\d+\])\.ids")


def endpoint(upstream: Upstream) -> Any:
    """POST /v1/completions."""

    def written(data: bytes) -> dict[str, Any]:
        return completion(pb.CompleteResponse.FromString(data), int(time.time()))

    return generation.endpoint(upstream, COMPLETE, read, words, written, stream)


def words(body: dict[str, Any]) -> rest.Rename:
    """The contract's field paths in the words of this body."""
    prompt = body.get("prompt")
    if isinstance(prompt, list) and isinstance(prompt[0], (str, list)):
        out = generation.words(body, ())
        return lambda status: generation.rewritten(out(status), lambda p: _IDS.sub(r"\1", p))
    one = (("prompts[0]", "prompt"), ("token_ids[0].ids", "prompt"), ("token_ids[0]", "prompt"))
    return generation.words(body, one)


def completion(answer: pb.CompleteResponse, created: int) -> dict[str, Any]:
    """The answer as an object."""
    return {
        **generation.head("text_completion", answer, created),
        "choices": [
            {
                "index": c.index,
                "text": c.text,
                "logprobs": _logprobs(c.logprobs, 0),
                "finish_reason": generation.FINISH.get(c.finish_reason),
            }
            for c in answer.completions
        ],
        "usage": generation.usage(answer.generation_usage),
    }


def read(body: dict[str, Any]) -> pb.CompleteRequest:
    """The request. Raises InvalidArgument that names what is wrong, or not supported."""
    fields.only(body, KNOWN)
    if (fields.number(body, "best_of") or 1) > (fields.number(body, "n") or 1):
        raise InvalidArgument.at("best_of", "is not supported here beyond n")
    message = pb.CompleteRequest(
        model=fields.text(body, "model"),
        echo=fields.flag(body, "echo"),
        adapter=fields.text(body, "adapter", ""),
        user=fields.text(body, "user", ""),
        truncate_prompt=fields.flag(body, "truncate_prompt"),
        priority=fields.number(body, "priority") or 0,
        cache=fields.flag(body, "cache") if body.get("cache") is not None else None,
    )
    _prompt(body.get("prompt"), message)
    generation.response_format(body, message.response_format)
    generation.sampling(body, message.sampling)
    if not message.sampling.HasField("max_tokens"):
        message.sampling.max_tokens = MAX_TOKENS
    top = fields.number(body, "logprobs")
    if top is not None:
        message.sampling.logprobs = top
    return message


def _prompt(value: Any, message: pb.CompleteRequest) -> None:
    """A string, strings, token ids, or lists of token ids."""
    if isinstance(value, str):
        message.prompts.append(value)
        return
    if not isinstance(value, list) or not value:
        raise InvalidArgument.at(
            "prompt", "must be a string, a list of strings, token ids, or lists of token ids"
        )
    if isinstance(value[0], str):
        message.prompts.extend(fields.texts({"prompt": value}, "prompt"))
    elif isinstance(value[0], list):
        for i, ids in enumerate(value):
            message.token_ids.add(ids=_ids(ids, f"prompt[{i}]"))
    else:
        message.token_ids.add(ids=_ids(value, "prompt"))


def _ids(value: Any, path: str) -> list[int]:
    if not isinstance(value, list):
        raise InvalidArgument.at(path, "must be a list of token ids")
    for i, one in enumerate(value):
        if not isinstance(one, int) or isinstance(one, bool) or not 0 <= one < 2**31:
            raise InvalidArgument.at(f"{path}[{i}]", f"is {one!r:.40}; a token id is needed")
    return value


def _logprobs(tokens: Any, offset: int) -> dict[str, Any] | None:
    """This door's older shape."""
    if not tokens:
        return None
    offsets = []
    for t in tokens:
        offsets.append(offset)
        offset += len(t.token)
    return {
        "tokens": [t.token for t in tokens],
        "token_logprobs": [t.logprob for t in tokens],
        "top_logprobs": [{p.token: p.logprob for p in t.top} for t in tokens],
        "text_offset": offsets,
    }


async def stream(
    upstream: Upstream, request: Request, body: dict[str, Any], message: pb.CompleteRequest
) -> Response:
    """The continuation as SSE chunks."""
    with_usage = generation.include_usage(body)
    wrapped = pb.CompleteStreamRequest(request=message)
    call, events, first = await generation.begin(upstream, STREAM, request, wrapped)
    started = pb.CompleteStreamResponse.FromString(first).started
    base = generation.head("text_completion", started, int(time.time()))
    if with_usage:
        base["usage"] = None
    offsets: dict[int, int] = {}

    async def frames() -> AsyncIterator[bytes]:
        async for raw in events:
            event = pb.CompleteStreamResponse.FromString(raw)
            kind = event.WhichOneof("event")
            choice: dict[str, Any] | None = None
            if kind == "text":
                t = event.text
                at = offsets.get(t.index, 0)
                offsets[t.index] = at + len(t.text)
                choice = {
                    "index": t.index,
                    "text": t.text,
                    "logprobs": _logprobs(t.logprobs, at),
                    "finish_reason": None,
                }
            elif kind == "finish":
                choice = {
                    "index": event.finish.index,
                    "text": "",
                    "logprobs": None,
                    "finish_reason": generation.FINISH.get(event.finish.reason),
                }
            elif kind == "usage" and with_usage:
                yield generation.data(
                    {**base, "choices": [], "usage": generation.usage(event.usage)}
                )
            if choice is not None:
                yield generation.data({**base, "choices": [choice]})
        yield b"data: [DONE]\n\n"

    def error_frame(status: status_pb2.Status) -> bytes:
        return generation.error_frame(request.state.rename(status))

    return generation.event_stream(call, frames(), error_frame)
