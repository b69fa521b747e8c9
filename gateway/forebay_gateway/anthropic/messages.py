"""/v1/messages: GenerationService.Chat and ChatStream in Anthropic's shape; /v1/messages/count_tokens:
TokenService.CountChatTokens. Bodies are read in requests.py."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import orjson
from forebay.errors import ForebayError
from forebay.methods import methods
from forebay.v1 import generation_pb2 as pb
from forebay.v1 import token_pb2
from google.rpc import status_pb2
from grpc import aio
from starlette.requests import Request
from starlette.responses import Response

from forebay_gateway import http_errors
from forebay_gateway.anthropic import requests
from forebay_gateway.anthropic.places import Places
from forebay_gateway.json_codec import dumps, parse_json
from forebay_gateway.openai import fields, generation
from forebay_gateway.upstream import ClientGone, Upstream, returned, unless_gone

CHAT = methods()["/forebay.v1.GenerationService/Chat"]
STREAM = methods()["/forebay.v1.GenerationService/ChatStream"]
COUNT = methods()["/forebay.v1.TokenService/CountChatTokens"]
STOP = {
    pb.FINISH_REASON_STOP: "end_turn",
    pb.FINISH_REASON_LENGTH: "max_tokens",
    pb.FINISH_REASON_TOOL_CALLS: "tool_use",
    pb.FINISH_REASON_CONTENT_FILTER: "refusal",
}
#: HTTP status to this API's word for it.
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def guarded(endpoint: Callable[[Request], Awaitable[Response]]) -> Any:
    """Errors in Anthropic's shape."""

    async def run(request: Request) -> Response:
        places = request.state.places = Places()
        try:
            return await endpoint(request)
        except aio.AioRpcError as e:
            status = places.rename(http_errors.from_rpc(e))
            return _error(status, returned(e.trailing_metadata()))
        except ForebayError as e:
            return _error(e.to_status(), {})
        except ClientGone:
            return Response(status_code=499)
        except Exception:
            return _error(*http_errors.our_fault(request))

    return run


def _error_body(status: status_pb2.Status) -> tuple[http_errors.HttpError, dict[str, Any]]:
    e, _ = http_errors.error_object(status)
    kind = TYPES.get(e.status, "api_error")
    return e, {"type": "error", "error": {"type": kind, "message": e.message}}


def _error(status: status_pb2.Status, headers: dict[str, str]) -> Response:
    e, body = _error_body(status)
    return Response(
        orjson.dumps(body),
        status_code=e.status,
        media_type="application/json",
        headers={**headers, **http_errors.headers_of(e)},
    )


def _event(kind: str, value: dict[str, Any]) -> bytes:
    return f"event: {kind}\n".encode() + generation.data({"type": kind, **value})


def _error_frame(status: status_pb2.Status) -> bytes:
    return b"event: error\n" + generation.data(_error_body(status)[1])


def endpoint(upstream: Upstream) -> Any:
    """POST /v1/messages."""

    async def messages(request: Request) -> Response:
        body = parse_json(await upstream.body(request))
        message = requests.read(body, request.state.places)
        if fields.flag(body, "stream"):
            return await stream(upstream, request, message, request.state.places)
        call = upstream.start(CHAT, request.headers, message.SerializeToString())
        data = await unless_gone(request, call)
        answer = pb.ChatResponse.FromString(data)
        choice = answer.choices[0]
        said = choice.message
        reason = _stop_reason(choice.finish_reason, choice.stop_reason, bool(said.refusal))
        out = {
            "id": answer.id.replace("chatcmpl-", "msg_"),
            "type": "message",
            "role": "assistant",
            "model": answer.served_by.model,
            "content": _content(said),
            "stop_reason": reason,
            "stop_sequence": choice.stop_reason or None,
            "usage": _usage(answer.generation_usage),
        }
        return Response(
            dumps(out),
            media_type="application/json",
            headers=returned(await call.trailing_metadata()),
        )

    return guarded(messages)


def count_endpoint(upstream: Upstream) -> Any:
    """POST /v1/messages/count_tokens."""

    async def count(request: Request) -> Response:
        body = parse_json(await upstream.body(request))
        message = requests.read_counted(body, request.state.places)
        wrapped = token_pb2.CountChatTokensRequest(request=message)
        call = upstream.start(COUNT, request.headers, wrapped.SerializeToString())
        answer = token_pb2.CountChatTokensResponse.FromString(await unless_gone(request, call))
        return Response(
            dumps({"input_tokens": answer.tokens}),
            media_type="application/json",
            headers=returned(await call.trailing_metadata()),
        )

    return guarded(count)


def _stop_reason(finish: Any, stop: str, refused: bool) -> str | None:
    if refused:
        return "refusal"
    return "stop_sequence" if stop else STOP.get(finish)


def _usage(found: pb.GenerationUsage) -> dict[str, Any]:
    return {
        "input_tokens": found.prompt_tokens - found.cached_tokens,
        "output_tokens": found.completion_tokens,
        "cache_read_input_tokens": found.cached_tokens,
        "cache_creation_input_tokens": 0,
    }


def _content(message: pb.ChatMessage) -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = []
    if message.reasoning:
        out.append({"type": "thinking", "thinking": message.reasoning, "signature": ""})
    text = "".join(p.text for p in message.content) + message.refusal
    if text:
        out.append({"type": "text", "text": text, "citations": None})
    for call in message.tool_calls:
        try:
            value = orjson.loads(call.arguments or "{}")
        except orjson.JSONDecodeError:  # cut off by max_tokens
            value = {}
        out.append({"type": "tool_use", "id": call.id, "name": call.name, "input": value})
    return out


class _Blocks:
    """Content blocks, one open at a time."""

    def __init__(self) -> None:
        self.index = -1
        self._open: Any = None

    def start(self, key: Any, block: dict[str, Any]) -> list[bytes]:
        """Events that make the block of `key` the open one."""
        if self._open == key:
            return []
        out = self.stop()
        self.index += 1
        self._open = key
        out.append(_event("content_block_start", {"index": self.index, "content_block": block}))
        return out

    def delta(self, delta: dict[str, Any]) -> bytes:
        """A delta of the open block."""
        return _event("content_block_delta", {"index": self.index, "delta": delta})

    def stop(self) -> list[bytes]:
        """Close the open block."""
        if self._open is None:
            return []
        self._open = None
        return [_event("content_block_stop", {"index": self.index})]


async def stream(
    upstream: Upstream, request: Request, message: pb.ChatRequest, places: Places
) -> Response:
    """The answer as Anthropic's events."""
    wrapped = pb.ChatStreamRequest(request=message)
    call, events, first = await generation.begin(upstream, STREAM, request, wrapped)
    started = pb.ChatStreamResponse.FromString(first).started

    async def frames() -> AsyncIterator[bytes]:
        opening = {
            "id": started.id.replace("chatcmpl-", "msg_"),
            "type": "message",
            "role": "assistant",
            "model": started.served_by.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {"input_tokens": started.prompt_tokens, "output_tokens": 0},
        }
        yield _event("message_start", {"message": opening})
        blocks, end, refused = _Blocks(), pb.GenerationFinish(), False
        async for raw in events:
            event = pb.ChatStreamResponse.FromString(raw)
            kind = event.WhichOneof("event")
            if kind == "refusal" or (kind == "text" and event.text.text):
                refused = refused or kind == "refusal"
                for f in blocks.start("text", {"type": "text", "text": ""}):
                    yield f
                text = event.text.text or event.refusal.text
                yield blocks.delta({"type": "text_delta", "text": text})
            elif kind == "reasoning":
                block = {"type": "thinking", "thinking": "", "signature": ""}
                for f in blocks.start("thinking", block):
                    yield f
                yield blocks.delta({"type": "thinking_delta", "thinking": event.reasoning.text})
            elif kind == "tool_call":
                c = event.tool_call
                block = {"type": "tool_use", "id": c.id, "name": c.name, "input": {}}
                for f in blocks.start(("tool", c.call_index), block):
                    yield f
                if c.arguments:
                    yield blocks.delta({"type": "input_json_delta", "partial_json": c.arguments})
            elif kind == "finish":
                end = event.finish
            elif kind == "usage":
                for f in blocks.stop():
                    yield f
                reason = _stop_reason(end.reason, end.stop_reason, refused)
                delta = {"stop_reason": reason, "stop_sequence": end.stop_reason or None}
                yield _event("message_delta", {"delta": delta, "usage": _usage(event.usage)})
        yield _event("message_stop", {})

    def error_frame(status: status_pb2.Status) -> bytes:
        return _error_frame(places.rename(status))

    beat = _event("ping", {})
    return generation.event_stream(call, frames(), error_frame, beat)
