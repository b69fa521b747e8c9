"""/v1/chat/completions: GenerationService.Chat and ChatStream in OpenAI's shape."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator
from typing import Any

import orjson
from forebay.errors import InvalidArgument
from forebay.methods import methods
from forebay.v1 import generation_pb2 as pb
from google.rpc import status_pb2
from starlette.requests import Request
from starlette.responses import Response

from forebay_gateway import rest
from forebay_gateway.openai import fields, generation
from forebay_gateway.upstream import Upstream

CHAT = methods()["/forebay.v1.GenerationService/Chat"]
STREAM = methods()["/forebay.v1.GenerationService/ChatStream"]
KNOWN = (
    "model",
    "messages",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "response_format",
    "structured_outputs",
    "max_completion_tokens",
    "logprobs",
    "top_logprobs",
    "stream",
    "stream_options",
    "user",
    "documents",
    "chat_template_kwargs",
    "priority",
    "adapter",
    "truncate_prompt",
    "cache",
    *generation.SAMPLING,
)
ROLES = {
    "system": pb.CHAT_ROLE_SYSTEM,
    "developer": pb.CHAT_ROLE_SYSTEM,
    "user": pb.CHAT_ROLE_USER,
    "assistant": pb.CHAT_ROLE_ASSISTANT,
    "tool": pb.CHAT_ROLE_TOOL,
}
MODES = {
    "auto": pb.TOOL_MODE_AUTO,
    "none": pb.TOOL_MODE_NONE,
    "required": pb.TOOL_MODE_REQUIRED,
}

_TOOL = re.compile(r"^(tools\[\d+\])(?=\.)")


def endpoint(upstream: Upstream) -> Any:
    """POST /v1/chat/completions."""

    def written(data: bytes) -> dict[str, Any]:
        return completion(pb.ChatResponse.FromString(data), int(time.time()))

    return generation.endpoint(upstream, CHAT, read, words, written, stream)


def words(body: dict[str, Any]) -> rest.Rename:
    """The contract's field paths in the words of this body."""
    longer = body.get("max_completion_tokens") is not None
    most = "max_completion_tokens" if longer else "max_tokens"
    out = generation.words(
        body,
        (
            ("sampling.max_tokens", most),
            ("sampling.logprobs", "top_logprobs"),
            ("tool_choice.mode", "tool_choice"),
            ("tool_choice.name", "tool_choice.function.name"),
        ),
    )
    return lambda status: generation.rewritten(out(status), lambda p: _TOOL.sub(r"\1.function", p))


def completion(answer: pb.ChatResponse, created: int) -> dict[str, Any]:
    """The answer as an object."""
    return {
        **generation.head("chat.completion", answer, created),
        "choices": [_choice(c) for c in answer.choices],
        "usage": generation.usage(answer.generation_usage),
    }


def read(body: dict[str, Any]) -> pb.ChatRequest:
    """The request. Raises InvalidArgument that names what is wrong, or not supported."""
    fields.only(body, KNOWN)
    message = pb.ChatRequest(
        model=fields.text(body, "model"),
        adapter=fields.text(body, "adapter", ""),
        user=fields.text(body, "user", ""),
        truncate_prompt=fields.flag(body, "truncate_prompt"),
        priority=fields.number(body, "priority") or 0,
        cache=fields.flag(body, "cache") if body.get("cache") is not None else None,
    )
    given = body.get("messages")
    if not isinstance(given, list) or not given:
        raise InvalidArgument.at("messages", "must be a list of messages that is not empty")
    for i, one in enumerate(given):
        _message(one, f"messages[{i}]", message.messages.add())
    _tools(body, message)
    generation.response_format(body, message.response_format)
    generation.sampling(body, message.sampling)
    limit = generation.whole(body, "max_completion_tokens")
    if limit is not None:
        message.sampling.max_tokens = limit
    top = fields.number(body, "top_logprobs")
    if fields.flag(body, "logprobs"):
        message.sampling.logprobs = top or 0
    elif top is not None:
        raise InvalidArgument.at("top_logprobs", "needs logprobs: true")
    for i, document in enumerate(fields.items(body, "documents")):
        if not isinstance(document, dict):
            raise InvalidArgument.at(f"documents[{i}]", "an object is needed")
        fields.only(document, ("title", "text"), f"documents[{i}]")
        message.documents.add(
            title=fields.text(document, "title", "", f"documents[{i}]"),
            text=fields.text(document, "text", at=f"documents[{i}]"),
        )
    values = body.get("chat_template_kwargs")
    if values is not None:
        message.template_values = orjson.dumps(values).decode()
    return message


def _message(value: Any, path: str, out: pb.ChatMessage) -> None:
    if not isinstance(value, dict):
        raise InvalidArgument.at(path, "an object is needed")
    role = fields.named(ROLES, value.get("role"))
    if role is None:
        raise InvalidArgument.at(
            f"{path}.role", f"is {value.get('role')!r:.40}; allowed are {', '.join(ROLES)}"
        )
    out.role = role
    fields.only(value, MESSAGE_FIELDS, path)
    out.name = fields.text(value, "name", "", path)
    out.tool_call_id = fields.text(value, "tool_call_id", "", path)
    out.reasoning = fields.text(value, "reasoning_content", "", path)
    out.refusal = fields.text(value, "refusal", "", path)
    content = value.get("content")
    if isinstance(content, str):
        out.content.add(text=content)
    elif isinstance(content, list):
        for i, part in enumerate(content):
            at = f"{path}.content[{i}]"
            if isinstance(part, dict) and part.get("type") == "refusal":
                out.refusal += fields.text(part, "refusal", at=at)
            else:
                _part(part, at, out.content.add())
    elif content is not None:
        raise InvalidArgument.at(f"{path}.content", "must be a string or a list of parts")
    for i, call in enumerate(fields.items(value, "tool_calls", path)):
        at = f"{path}.tool_calls[{i}]"
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise InvalidArgument.at(f"{at}.function", "is required")
        out.tool_calls.add(
            id=fields.text(call, "id", "", at),
            name=fields.text(function, "name", at=f"{at}.function"),
            arguments=fields.text(function, "arguments", "{}", f"{at}.function"),
        )


MESSAGE_FIELDS = (
    "role",
    "content",
    "name",
    "tool_calls",
    "tool_call_id",
    "reasoning_content",
    "refusal",
    "annotations",
)


def _part(value: Any, path: str, out: pb.ContentPart) -> None:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        out.text = fields.text(value, "text", at=path)
    elif kind == "image_url":
        picture = value.get("image_url")
        url = picture.get("url") if isinstance(picture, dict) else None
        generation.image(url, f"{path}.image_url.url", out.image)
    else:
        raise InvalidArgument.at(f"{path}.type", f"is {kind!r:.40}; allowed are text, image_url")


def _tools(body: dict[str, Any], message: pb.ChatRequest) -> None:
    for i, tool in enumerate(fields.items(body, "tools")):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or tool.get("type") != "function":
            raise InvalidArgument.at(f"tools[{i}]", "must be of type function, with a function")
        parameters, at = function.get("parameters"), f"tools[{i}].function"
        message.tools.add(
            name=fields.text(function, "name", at=at),
            description=fields.text(function, "description", "", at),
            parameters="" if parameters is None else orjson.dumps(parameters).decode(),
            strict=fields.flag(function, "strict", at=at),
        )
    choice = body.get("tool_choice")
    if isinstance(choice, str):
        if choice not in MODES:
            raise InvalidArgument.at(
                "tool_choice", f"is {choice!r:.40}; allowed are {', '.join(MODES)}, or a tool"
            )
        message.tool_choice.mode = MODES[choice]
    elif choice is not None:
        function = choice.get("function") if isinstance(choice, dict) else None
        if not isinstance(function, dict):
            raise InvalidArgument.at("tool_choice.function", "is required")
        message.tool_choice.mode = pb.TOOL_MODE_NAMED
        message.tool_choice.name = fields.text(function, "name", at="tool_choice.function")
    if body.get("parallel_tool_calls") is not None:
        message.parallel_tool_calls = fields.flag(body, "parallel_tool_calls")


def _choice(choice: pb.ChatChoice) -> dict[str, Any]:
    said = choice.message
    text = "".join(p.text for p in said.content)
    message: dict[str, Any] = {
        "role": "assistant",
        "content": text or (None if said.tool_calls or said.refusal else ""),
        "refusal": said.refusal or None,
    }
    if said.reasoning:
        message["reasoning_content"] = said.reasoning
    if said.tool_calls:
        message["tool_calls"] = [
            {
                "id": c.id,
                "type": "function",
                "function": {"name": c.name, "arguments": c.arguments},
            }
            for c in said.tool_calls
        ]
    return {
        "index": choice.index,
        "message": message,
        "finish_reason": generation.FINISH.get(choice.finish_reason),
        "logprobs": {"content": _logprobs(choice.logprobs)} if choice.logprobs else None,
    }


def _logprobs(tokens: Any) -> list[dict[str, Any]]:
    return [
        {
            "token": t.token,
            "logprob": t.logprob,
            "bytes": list(t.raw),
            "top_logprobs": [
                {"token": p.token, "logprob": p.logprob, "bytes": list(p.raw)} for p in t.top
            ],
        }
        for t in tokens
    ]


async def stream(
    upstream: Upstream, request: Request, body: dict[str, Any], message: pb.ChatRequest
) -> Response:
    """The answer as SSE chunks."""
    with_usage = generation.include_usage(body)
    wrapped = pb.ChatStreamRequest(request=message)
    call, events, first = await generation.begin(upstream, STREAM, request, wrapped)
    started = pb.ChatStreamResponse.FromString(first).started
    answers = message.sampling.n or 1
    base = generation.head("chat.completion.chunk", started, int(time.time()))
    if with_usage:
        base["usage"] = None

    def chunk(
        index: int, delta: dict[str, Any], finish: str | None = None, logprobs: Any = None
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return generation.data({**base, "choices": [choice]})

    async def frames() -> AsyncIterator[bytes]:
        for i in range(answers):
            yield chunk(i, {"role": "assistant", "content": ""})
        async for raw in events:
            event = pb.ChatStreamResponse.FromString(raw)
            kind = event.WhichOneof("event")
            if kind == "text":
                t = event.text
                logprobs = {"content": _logprobs(t.logprobs)} if t.logprobs else None
                yield chunk(t.index, {"content": t.text}, logprobs=logprobs)
            elif kind == "reasoning":
                yield chunk(event.reasoning.index, {"reasoning_content": event.reasoning.text})
            elif kind == "refusal":
                yield chunk(event.refusal.index, {"refusal": event.refusal.text})
            elif kind == "tool_call":
                c = event.tool_call
                one: dict[str, Any] = {
                    "index": c.call_index,
                    "function": {"arguments": c.arguments},
                }
                if c.name:
                    one |= {"id": c.id, "type": "function"}
                    one["function"] = {"name": c.name, "arguments": c.arguments}
                yield chunk(c.index, {"tool_calls": [one]})
            elif kind == "finish":
                yield chunk(event.finish.index, {}, generation.FINISH.get(event.finish.reason))
            elif kind == "usage" and with_usage:
                yield generation.data(
                    {**base, "choices": [], "usage": generation.usage(event.usage)}
                )
        yield b"data: [DONE]\n\n"

    def error_frame(status: status_pb2.Status) -> bytes:
        return generation.error_frame(request.state.rename(status))

    return generation.event_stream(call, frames(), error_frame)
