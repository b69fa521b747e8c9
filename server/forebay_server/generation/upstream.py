"""Language models behind OpenAI-compatible servers: OpenAI, llama.cpp, SGLang, trtllm-serve, ...

By the `openai` package, with a time limit, retries for what is safe to retry (nothing was sent on
yet), a chain of fallbacks, and a circuit breaker for each model of the chain.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from forebay.errors import (
    FailedPrecondition,
    ForebayError,
    InvalidArgument,
    QuotaViolation,
    RateLimited,
    Unavailable,
)

from forebay_server.core.generation import (
    Capabilities,
    FinishReason,
    GenerationDelta,
    GenerationRequest,
    GenerationSpec,
    TokenProbability,
    ToolCallPiece,
)

log = logging.getLogger("forebay.generation")

OPTIONS = (
    "base_url",
    "model",
    "api_key_file",
    "timeout_s",
    "first_token_timeout_s",
    "retries",
    "structures",
    "images",
    "top_logprobs",
    "fallbacks",
    "extra_body",
)
#: Failures in a row that open a circuit, and seconds until one call tries again.
TRIP, REST_S = 5, 15.0


class Breaker:
    """Stops calls to a server that keeps failing; after a rest one call tries."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures = 0
        self._open_until = 0.0
        self._trying = False

    def wait_s(self) -> float:
        """Seconds until a call may try; 0 = now."""
        if self._failures < TRIP:
            return 0.0
        left = self._open_until - self._clock()
        if left > 0:
            return left
        return 1.0 if self._trying else 0.0

    def begin(self) -> None:
        """A call tries."""
        self._trying = self._failures >= TRIP

    def end(self, good: bool | None) -> None:
        """It has ended: well, badly, or (None) without a word about the server."""
        self._trying = False
        if good:
            self._failures = 0
        elif good is False:
            self._failures += 1
            self._open_until = self._clock() + REST_S


@dataclass(slots=True)
class _Target:
    """One server and model of the chain."""

    client: Any
    model: str
    extra: Mapping[str, Any]
    breaker: Breaker = field(default_factory=Breaker)


class UpstreamEngine:
    """See interfaces.GenerationEngine."""

    def __init__(self, spec: GenerationSpec) -> None:
        self._spec = spec
        options = spec.options
        for where in (options, *options.get("fallbacks", ())):
            unknown = sorted(set(where) - set(OPTIONS))
            if unknown:
                raise _rejected(
                    f"engine_options: {unknown[0]!r} is not known; known are {', '.join(OPTIONS)}"
                )
            for name in ("base_url", "model"):
                if not where.get(name):
                    raise _rejected(f"engine_options: {name} is missing")
        self.capabilities = Capabilities(
            structures=frozenset(options.get("structures", ("json_schema", "json_object"))),
            needs_prompt_ids=False,
            images=bool(options.get("images", False)),
            top_logprobs=int(options.get("top_logprobs", 20)),
        )
        self._retries = int(options.get("retries", 2))
        self._timeout = float(options.get("timeout_s", 600))
        self._first = float(options.get("first_token_timeout_s", 60))
        self._targets: list[_Target] = []
        self._loop: asyncio.AbstractEventLoop | None = None

    def load(self) -> None:
        """See GenerationEngine. Nothing is called: a server that is away now may come."""
        try:
            import openai
        except ImportError:
            raise _rejected(
                "the package is not installed: pip install 'forebay[upstream]'"
            ) from None
        options = self._spec.options
        for where in (options, *options.get("fallbacks", ())):
            key = "none"
            if where.get("api_key_file"):
                try:
                    key = Path(where["api_key_file"]).expanduser().read_text().strip()
                except OSError as e:
                    raise _rejected(f"engine_options: api_key_file: {e.strerror}") from None
            client = openai.AsyncOpenAI(
                base_url=where["base_url"], api_key=key, timeout=self._timeout, max_retries=0
            )
            self._targets.append(_Target(client, where["model"], where.get("extra_body", {})))

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationDelta, None]:
        """See GenerationEngine. Once a delta was passed on, nothing is tried again."""
        last: ForebayError | None = None
        for target in self._targets:
            for attempt in range(self._retries + 1):
                wait = target.breaker.wait_s()
                if wait > 0:
                    last = last or Unavailable(
                        "the upstream keeps failing and is left alone for a moment",
                        reason="CIRCUIT_OPEN",
                        retry_after_s=wait,
                    )
                    break
                target.breaker.begin()
                said, good = False, None
                try:
                    async for delta in self._call(target, request):
                        said = True
                        yield delta
                    good = True
                    return
                except Exception as e:
                    error, good, again = _translate(e)
                    last = error
                    if said or isinstance(error, InvalidArgument):
                        raise error from e
                    log.warning("upstream %s: %s", target.model, error.message)
                    if not again:
                        break
                finally:
                    target.breaker.end(good)
                if attempt < self._retries:
                    await asyncio.sleep(min(8.0, last.retry_after_s or 0.25 * 2**attempt))
        raise last or Unavailable("the upstream has no model", reason="UPSTREAM_FAILED")

    async def _call(
        self, target: _Target, request: GenerationRequest
    ) -> AsyncGenerator[GenerationDelta, None]:
        body = _body(target, request)
        if request.chat is not None:
            make = target.client.chat.completions.create
            read: Callable[[Any], GenerationDelta] = _chat_delta
        else:
            make, read = target.client.completions.create, _completion_delta
        async with asyncio.timeout(self._first) as limit:
            stream = await make(**body)
            chunks = aiter(stream)
            try:
                chunk = await anext(chunks, None)
                limit.reschedule(None)
                while chunk is not None:
                    if chunk.usage is not None:
                        _count(request, chunk.usage)
                    for choice in chunk.choices:
                        yield read(choice)
                    chunk = await anext(chunks, None)
            finally:
                await stream.close()

    def check_health(self) -> None:
        """See GenerationEngine."""
        waits = [t.breaker.wait_s() for t in self._targets]
        if waits and min(waits) > 0:
            raise Unavailable(
                "the upstream keeps failing", reason="CIRCUIT_OPEN", retry_after_s=min(waits)
            )

    def info(self) -> Mapping[str, Any]:
        """See GenerationEngine."""
        return {"providers": ["openai"], "memory_bytes": 0, "pid": 0}

    def close(self) -> None:
        """See GenerationEngine. Its connections end with the loop."""
        self._targets.clear()


def _rejected(message: str) -> FailedPrecondition:
    return FailedPrecondition(f"model.yaml: {message}", reason="MODEL_REJECTED")


def _body(target: _Target, request: GenerationRequest) -> dict[str, Any]:
    """The request in OpenAI's words. What OpenAI's API lacks goes beside it, as vLLM and others
    take it; servers that do not know a field say so."""
    s = request.sampling
    body: dict[str, Any] = {
        "model": request.adapter or target.model,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": s.temperature,
        "top_p": s.top_p,
        "n": s.n,
    }
    extra = dict(target.extra)
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
    if request.structure is not None:
        if request.structure.kind == "json_object":
            body["response_format"] = {"type": "json_object"}
        else:
            schema = json.loads(str(request.structure.value))
            body["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": schema, "strict": True},
            }
    return body


_FINISH: dict[str, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
    "content_filter": "content_filter",
}


def _chat_delta(choice: Any) -> GenerationDelta:
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
    )


def _token(found: Any, top: tuple[TokenProbability, ...] = ()) -> TokenProbability:
    raw = bytes(found.bytes) if found.bytes else found.token.encode()
    return TokenProbability(0, found.token, found.logprob, raw, top)


def _completion_delta(choice: Any) -> GenerationDelta:
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


def _count(request: GenerationRequest, usage: Any) -> None:
    """The upstream's own numbers."""
    tally = request.tally
    tally.prompt, tally.completion = usage.prompt_tokens, usage.completion_tokens or 0
    details = getattr(usage, "prompt_tokens_details", None)
    tally.cached = (getattr(details, "cached_tokens", 0) or 0) if details else 0
    details = getattr(usage, "completion_tokens_details", None)
    tally.reasoning = (getattr(details, "reasoning_tokens", 0) or 0) if details else 0


def _translate(error: Exception) -> tuple[ForebayError, bool | None, bool]:
    """The caller's error; whether the server works (None = unknown); whether to try again."""
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
    if isinstance(error, (TimeoutError, openai.APITimeoutError)):
        late = Unavailable("the upstream is too slow", reason="UPSTREAM_TIMEOUT", retry_after_s=1.0)
        return late, False, True
    if isinstance(error, openai.APIError):
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
