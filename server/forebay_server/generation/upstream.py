"""Language models behind OpenAI-compatible servers: OpenAI, llama.cpp, SGLang, trtllm-serve, ...

By the `openai` package, with a time limit, retries for what is safe to retry (nothing was sent on
yet), a chain of fallbacks, and a circuit breaker for each model of the chain.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forebay.errors import FailedPrecondition, ForebayError, InvalidArgument, Unavailable

from forebay_server.core.generation import (
    Capabilities,
    GenerationDelta,
    GenerationRequest,
    GenerationSpec,
)
from forebay_server.generation.upstream_messages import (
    body_of,
    chat_delta,
    completion_delta,
    count,
    count_received,
    translate,
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
                    error, good, again = translate(e)
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
        body = body_of(target.model, target.extra, request)
        if request.chat is not None:
            make = target.client.chat.completions.create
            read: Callable[[Any], GenerationDelta] = chat_delta
        else:
            make, read = target.client.completions.create, completion_delta
        async with asyncio.timeout(self._first) as limit:
            stream = await make(**body)
            chunks = aiter(stream)
            try:
                chunk = await anext(chunks, None)
                limit.reschedule(None)
                ended: set[int] = set()
                while chunk is not None:
                    if chunk.usage is not None:
                        count(request, chunk.usage)
                    for choice in chunk.choices:
                        if choice.finish_reason:
                            ended.add(choice.index)
                        delta = read(choice)
                        if chunk.usage is None:
                            # The upstream's count comes last: who leaves before has used this.
                            count_received(request, delta)
                        yield delta
                    chunk = await anext(chunks, None)
                if (
                    len(ended) < request.sampling.n
                ):  # a server that dies may close as if all were said
                    raise EOFError
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
