"""Between the contract's messages and the data plane's types, for language models."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any

from forebay.errors import InvalidArgument
from forebay.v1 import generation_pb2 as pb

from forebay_server.core.expressions import check_regex
from forebay_server.core.generation import (
    ChatContext,
    GenerationDelta,
    Structure,
    Tally,
    TokenProbability,
    ToolMode,
    ToolSpec,
)
from forebay_server.core.structure import check_enforceable, parse_schema
from forebay_server.dataplane.generation_jobs import ChatAsk, CompleteAsk
from forebay_server.services.common import exactly_one

ROLES = {
    pb.CHAT_ROLE_SYSTEM: "system",
    pb.CHAT_ROLE_USER: "user",
    pb.CHAT_ROLE_ASSISTANT: "assistant",
    pb.CHAT_ROLE_TOOL: "tool",
}
MODES: dict[int, ToolMode] = {
    pb.TOOL_MODE_UNSPECIFIED: "auto",
    pb.TOOL_MODE_AUTO: "auto",
    pb.TOOL_MODE_NONE: "none",
    pb.TOOL_MODE_REQUIRED: "required",
    pb.TOOL_MODE_NAMED: "named",
}
FINISH = {
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "tool_calls": pb.FINISH_REASON_TOOL_CALLS,
    "content_filter": pb.FINISH_REASON_CONTENT_FILTER,
}
_SAMPLING = (
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "seed",
    "n",
    "logprobs",
)
_MEDIA = (
    (b"\x89PNG", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF8", "image/gif"),
    (b"RIFF", "image/webp"),
)


def chat_ask(request: pb.ChatRequest, path: str) -> ChatAsk:
    """A ChatRequest. Raises InvalidArgument; `path` is put before fields' paths."""
    messages = [_message(m, f"{path}messages[{i}]") for i, m in enumerate(request.messages)]
    tools = [_tool(t, f"{path}tools[{i}]") for i, t in enumerate(request.tools)]
    names = [t.name for t in tools]
    if len(set(names)) != len(names):
        raise InvalidArgument.at(f"{path}tools", "has the same name twice")
    mode = MODES[request.tool_choice.mode]
    if mode == "named" and request.tool_choice.name not in names:
        known = ", ".join(names) or "none"
        raise InvalidArgument.at(
            f"{path}tool_choice.name", f"is {request.tool_choice.name!r}; the tools are {known}"
        )
    if mode == "required" and not tools:
        raise InvalidArgument.at(
            f"{path}tool_choice.mode", "requires a call, and there are no tools"
        )
    structure = _structure(request.response_format, f"{path}response_format")
    if structure is not None and tools and mode != "none":
        raise InvalidArgument.at(
            f"{path}response_format", "cannot be combined with tools, unless tool_choice is NONE"
        )
    parallel = request.parallel_tool_calls if request.HasField("parallel_tool_calls") else True
    documents = [{"title": d.title, "text": d.text} for d in request.documents]
    values = _values(request.template_values, f"{path}template_values")
    chat = ChatContext(messages, tools, mode, request.tool_choice.name, parallel, documents, values)
    return ChatAsk(
        model=request.model,
        sampling=_sampling(request.sampling),
        structure=structure,
        adapter=request.adapter,
        truncate_prompt=request.truncate_prompt,
        priority=request.priority,
        user=request.user,
        sticky_key=request.sticky_key,
        cache=request.cache if request.HasField("cache") else None,
        path=path,
        messages=messages,
        chat=chat,
        documents=documents,
        template_values=values,
    )


def complete_ask(request: pb.CompleteRequest, path: str) -> CompleteAsk:
    """A CompleteRequest."""
    exactly_one(**{f"{path}prompts": request.prompts, f"{path}token_ids": request.token_ids})
    return CompleteAsk(
        model=request.model,
        sampling=_sampling(request.sampling),
        structure=_structure(request.response_format, f"{path}response_format"),
        adapter=request.adapter,
        truncate_prompt=request.truncate_prompt,
        priority=request.priority,
        user=request.user,
        sticky_key=request.sticky_key,
        cache=request.cache if request.HasField("cache") else None,
        path=path,
        prompts=list(request.prompts),
        token_ids=[list(t.ids) for t in request.token_ids],
    )


def _message(message: pb.ChatMessage, path: str) -> dict[str, Any]:
    """A message in OpenAI's shape; its content is a string unless it has images."""
    role = ROLES.get(message.role)
    if role is None:
        raise InvalidArgument.at(f"{path}.role", "is required")
    parts: list[dict[str, Any]] = []
    for i, part in enumerate(message.content):
        at = f"{path}.content[{i}]"
        if part.HasField("image"):
            if part.text:
                raise InvalidArgument.at(at, "exactly one of text and image must be given")
            parts.append({"type": "image_url", "image_url": {"url": _image(part.image, at)}})
        else:
            parts.append({"type": "text", "text": part.text})
    if message.refusal and role != "assistant":
        raise InvalidArgument.at(f"{path}.refusal", "only an assistant's message has one")
    if message.refusal:  # chat templates, and most upstreams, have no place of its own for it
        parts.append({"type": "text", "text": message.refusal})
    plain = all(p["type"] == "text" for p in parts)
    out: dict[str, Any] = {
        "role": role,
        "content": "".join(p["text"] for p in parts) if plain else parts,
    }
    if message.name:
        out["name"] = message.name
    if message.reasoning:
        out["reasoning_content"] = message.reasoning
    if message.tool_calls and role != "assistant":
        raise InvalidArgument.at(f"{path}.tool_calls", "only an assistant's message has calls")
    if message.tool_calls:
        out["tool_calls"] = [
            {
                "id": c.id,
                "type": "function",
                "function": {"name": c.name, "arguments": c.arguments or "{}"},
            }
            for c in message.tool_calls
        ]
    if role == "tool":
        out["tool_call_id"] = message.tool_call_id
    return out


def _image(image: pb.ImagePart, path: str) -> str:
    if bool(image.data) == bool(image.url):
        raise InvalidArgument.at(f"{path}.image", "exactly one of data and url must be given")
    if image.url:
        if not image.url.startswith(("https://", "http://")):
            raise InvalidArgument.at(f"{path}.image.url", "must begin with https:// or http://")
        return image.url
    kind = image.media_type or next((k for m, k in _MEDIA if image.data.startswith(m)), "")
    if not kind.startswith("image/"):
        raise InvalidArgument.at(f"{path}.image", "is no JPEG, PNG, WebP or GIF")
    return f"data:{kind};base64,{base64.b64encode(image.data).decode()}"


def _tool(tool: pb.Tool, path: str) -> ToolSpec:
    parameters: dict[str, Any] = {}
    if tool.parameters:
        parameters = parse_schema(tool.parameters, f"{path}.parameters")
    if tool.strict:
        check_enforceable(parameters, f"{path}.parameters")
    return ToolSpec(tool.name, tool.description, parameters, tool.strict)


def _structure(form: pb.ResponseFormat, path: str) -> Structure | None:
    given = {
        "json_schema": form.json_schema,
        "json_object": form.json_object,
        "regex": form.regex,
        "choices": form.choices,
        "grammar": form.grammar,
    }
    named = [k for k, v in given.items() if v]
    if len(named) > 1:
        raise InvalidArgument.at(f"{path}.{named[1]}", f"cannot be combined with {named[0]}")
    if not named:
        return None
    kind = named[0]
    if kind == "json_schema":
        check_enforceable(parse_schema(form.json_schema, f"{path}.{kind}"), f"{path}.{kind}")
        return Structure("json_schema", form.json_schema)
    if kind == "json_object":
        return Structure("json_object")
    if kind == "choices":
        return Structure("choice", tuple(form.choices))
    if kind == "grammar":
        return Structure("grammar", form.grammar)
    check_regex(form.regex, f"{path}.regex")
    return Structure("regex", form.regex)


def _values(text: str, path: str) -> dict[str, Any]:
    if not text:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise InvalidArgument.at(path, f"is not JSON: {e}") from None
    if not isinstance(value, dict):
        raise InvalidArgument.at(path, "must be a JSON object")
    return value


def _sampling(sampling: pb.Sampling) -> dict[str, Any]:
    """The fields that were given."""
    out: dict[str, Any] = {
        name: getattr(sampling, name) for name in _SAMPLING if sampling.HasField(name)
    }
    if sampling.stop:
        out["stop"] = tuple(sampling.stop)
    if sampling.stop_token_ids:
        out["stop_token_ids"] = tuple(sampling.stop_token_ids)
    if sampling.ignore_eos:
        out["ignore_eos"] = True
    if sampling.logit_bias:
        out["logit_bias"] = {b.token_id: b.bias for b in sampling.logit_bias}
    return out


def usage_of(tally: Tally) -> pb.GenerationUsage:
    """Tokens."""
    return pb.GenerationUsage(
        prompt_tokens=tally.prompt,
        completion_tokens=tally.completion,
        cached_tokens=tally.cached,
        reasoning_tokens=tally.reasoning,
        cached_answers=tally.cached_answers,
    )


def fill_logprobs(target: Any, tokens: Sequence[TokenProbability]) -> None:
    """Add tokens to a repeated TokenLogprob field."""
    for t in tokens:
        one = target.add(token=t.token, logprob=t.logprob, raw=t.raw, token_id=t.token_id)
        for top in t.top:
            one.top.add(token=top.token, logprob=top.logprob, raw=top.raw, token_id=top.token_id)


def text_delta(delta: GenerationDelta) -> pb.TextDelta:
    """The text of a delta."""
    out = pb.TextDelta(index=delta.index, text=delta.text, tokens=delta.tokens)
    if delta.logprobs:
        fill_logprobs(out.logprobs, delta.logprobs)
    return out


def finish(delta: GenerationDelta) -> pb.GenerationFinish:
    """The end of an answer."""
    return pb.GenerationFinish(
        index=delta.index,
        reason=FINISH[delta.finish_reason or "stop"],
        stop_reason=delta.stop_reason,
    )
