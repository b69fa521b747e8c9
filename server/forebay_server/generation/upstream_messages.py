"""OpenAI's words for requests, answers and errors, on the way to an upstream and back."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any, cast

from forebay.errors import (
    ForebayError,
    InvalidArgument,
    QuotaViolation,
    RateLimited,
    Unavailable,
)

from forebay_server.core.generation import (
    FinishReason,
    GenerationDelta,
    GenerationRequest,
    Structure,
    TokenProbability,
    ToolCallPiece,
)

log = logging.getLogger("forebay.generation")


def body_of(model: str, beside: Mapping[str, Any], request: GenerationRequest) -> dict[str, Any]:
    """The request in OpenAI's words. What OpenAI's API lacks goes beside it, as vLLM and others
    take it; servers that do not know a field say so."""
    s = request.sampling
    body: dict[str, Any] = {
        "model": request.adapter or model,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": s.temperature,
        "top_p": s.top_p,
        "n": s.n,
    }
    extra = dict(beside)
    for name in ("frequency_penalty", "presence_penalty"):
        if getattr(s, name):
            body[name] = getattr(s, name)
    for name, silent in (
        ("top_k", 0),
        ("min_p", 0.0),
        ("repetition_penalty", 1.0),
        ("min_tokens", 0),
    ):
        if getattr(s, name) != silent:
            extra[name] = getattr(s, name)
    if s.stop_token_ids:
        extra["stop_token_ids"] = list(s.stop_token_ids)
    if s.ignore_eos:
        extra["ignore_eos"] = True
    if request.structure is not None:
        extra |= _form(request.structure)
    if request.chat is not None and request.chat.documents:
        extra["documents"] = list(request.chat.documents)
    if request.chat is not None and request.chat.template_values:
        extra["chat_template_kwargs"] = dict(request.chat.template_values)
    if s.seed is not None:
        body["seed"] = s.seed
    if s.stop:
        body["stop"] = list(s.stop)
    if s.logit_bias:
        body["logit_bias"] = {str(k): v for k, v in s.logit_bias.items()}
    if request.user:
        body["user"] = request.user
    if extra:
        body["extra_body"] = extra
    if request.chat is None:
        body["prompt"] = request.prompt
        if s.max_tokens is not None:
            body["max_tokens"] = s.max_tokens
        if s.logprobs is not None:
            body["logprobs"] = s.logprobs
        return body
    chat = request.chat
    body["messages"] = list(chat.messages)
    if s.max_tokens is not None:
        body["max_completion_tokens"] = s.max_tokens
    if s.logprobs is not None:
        body["logprobs"] = True
        body["top_logprobs"] = s.logprobs
    if chat.tools:
        body["tools"] = [
            {
                **t.as_openai(),
                "function": t.as_openai()["function"] | ({"strict": True} if t.strict else {}),
            }
            for t in chat.tools
        ]
        named = {"type": "function", "function": {"name": chat.tool_name}}
        body["tool_choice"] = named if chat.tool_mode == "named" else chat.tool_mode
        if not chat.parallel_tool_calls:
            body["parallel_tool_calls"] = False
    return body


def _form(structure: Structure) -> dict[str, Any]:
    """The form of the answer. OpenAI's completions have none: others take it there too, or say so."""
    if structure.kind == "json_object":
        return {"response_format": {"type": "json_object"}}
    if structure.kind == "json_schema":
        schema = json.loads(str(structure.value))
        described = {"name": "answer", "schema": schema, "strict": True}
        return {"response_format": {"type": "json_schema", "json_schema": described}}
    return {"structured_outputs": {structure.kind: structure.value}}


_FINISH: dict[str, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
    "content_filter": "content_filter",
}


def chat_delta(choice: Any) -> GenerationDelta:
    """What a chunk of a chat says of one answer."""
    delta = choice.delta
    reasoning = getattr(delta, "reasoning_content", None) or getattr(delta, "reasoning", None)
    calls = [
        ToolCallPiece(
            c.index,
            c.id or "",
            (c.function.name if c.function else "") or "",
            (c.function.arguments if c.function else "") or "",
        )
        for c in delta.tool_calls or ()
    ]
    logprobs = []
    for token in (choice.logprobs.content if choice.logprobs else None) or ():
        top = tuple(_token(t) for t in token.top_logprobs or ())
        logprobs.append(_token(token, top))
    return GenerationDelta(
        choice.index,
        delta.content or "",
        reasoning or "",
        calls,
        1 if delta.content else 0,
        logprobs,
        _FINISH.get(choice.finish_reason or ""),
        refusal=delta.refusal or "",
    )


def _token(found: Any, top: tuple[TokenProbability, ...] = ()) -> TokenProbability:
    raw = bytes(found.bytes) if found.bytes else found.token.encode()
    return TokenProbability(0, found.token, found.logprob, raw, top)


def completion_delta(choice: Any) -> GenerationDelta:
    """What a chunk of a completion says of one answer."""
    logprobs = []
    if choice.logprobs is not None and choice.logprobs.tokens:
        for i, token in enumerate(choice.logprobs.tokens):
            tops = (choice.logprobs.top_logprobs or [{}] * (i + 1))[i] or {}
            top = tuple(TokenProbability(0, t, p, t.encode()) for t, p in tops.items())
            value = (choice.logprobs.token_logprobs or [0.0] * (i + 1))[i]
            logprobs.append(TokenProbability(0, token, value or 0.0, token.encode(), top))
    return GenerationDelta(
        choice.index,
        choice.text or "",
        tokens=1 if choice.text else 0,
        logprobs=logprobs,
        finish_reason=_FINISH.get(choice.finish_reason or ""),
    )


def count(request: GenerationRequest, usage: Any) -> None:
    """The upstream's own numbers."""
    tally = request.tally
    tally.prompt, tally.completion = usage.prompt_tokens, usage.completion_tokens or 0
    details = getattr(usage, "prompt_tokens_details", None)
    tally.cached = (getattr(details, "cached_tokens", 0) or 0) if details else 0
    details = getattr(usage, "completion_tokens_details", None)
    tally.reasoning = (getattr(details, "reasoning_tokens", 0) or 0) if details else 0


def count_received(request: GenerationRequest, delta: GenerationDelta) -> None:
    """What is known of an answer that the upstream has not counted yet: a token for every four
    characters, and one at least for each piece. It may be the last that is heard of it."""
    tally = request.tally
    called = "".join(c.name + c.arguments for c in delta.tool_calls)
    words = delta.text + delta.refusal + called
    reasoning, said = (-(-len(text) // 4) for text in (delta.reasoning, words))
    tally.completion += reasoning + said
    tally.reasoning += reasoning
    if not tally.prompt:
        tally.prompt = _prompt_estimate(request)


def _prompt_estimate(request: GenerationRequest) -> int:
    if request.chat is None:
        return -(-len(request.prompt) // 4)
    chat = request.chat
    size = len(json.dumps([t.as_openai() for t in chat.tools])) if chat.tools else 0
    size += sum(len(d["title"]) + len(d["text"]) for d in chat.documents)
    for message in chat.messages:
        content = message["content"]
        parts = [{"text": content}] if isinstance(content, str) else content
        size += sum(len(p.get("text", "")) for p in parts)  # a picture has no length of its own
        size += sum(len(json.dumps(c)) for c in message.get("tool_calls", ()))
    return -(-size // 4)


def translate(error: Exception) -> tuple[ForebayError, bool | None, bool]:
    """The caller's error; whether the server works (None = unknown); whether to try again."""
    import httpx
    import openai

    if isinstance(error, openai.APIStatusError):
        status = error.status_code
        wait = error.response.headers.get("retry-after", "")
        seconds = float(wait) if wait.replace(".", "", 1).isdigit() else None
        if status == 429:
            limited = RateLimited(
                "the upstream's limit is spent",
                violations=[QuotaViolation("upstream", "its rate limit")],
                retry_after_s=seconds or 1.0,
            )
            return limited, None, True
        if status in (400, 404, 413, 422):
            body = cast(Any, error.body)
            text = body.get("message") if isinstance(body, dict) else None
            said = InvalidArgument.at("request", f"the upstream refuses it: {text or status}")
            return said, True, False
        if status in (401, 403):
            denied = Unavailable("the upstream refuses this server's key", reason="UPSTREAM_DENIED")
            return denied, None, False
        away = Unavailable(
            f"the upstream answered {status}",
            reason="UPSTREAM_FAILED",
            retry_after_s=seconds or 1.0,
        )
        return away, False, True
    if isinstance(error, (TimeoutError, openai.APITimeoutError, httpx.TimeoutException)):
        late = Unavailable("the upstream is too slow", reason="UPSTREAM_TIMEOUT", retry_after_s=1.0)
        return late, False, True
    # What breaks while a stream is read comes as httpx has it.
    if isinstance(error, (openai.APIError, httpx.TransportError, EOFError)):
        gone = Unavailable(
            "the upstream cannot be reached, or broke off",
            reason="UPSTREAM_FAILED",
            retry_after_s=1.0,
        )
        return gone, False, True
    if isinstance(error, ForebayError):
        return error, None, False
    log.exception("an upstream's answer could not be read")
    return (
        Unavailable("the upstream's answer could not be read", reason="UPSTREAM_FAILED"),
        False,
        False,
    )
