"""The use cases of language models: prompts made and checked, turns taken, answers passed on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

from forebay.errors import (
    FailedPrecondition,
    ForebayError,
    Internal,
    InvalidArgument,
    PermissionDenied,
)

from forebay_server.core.call import Call
from forebay_server.core.generation import (
    ChatContext,
    GenerationDelta,
    GenerationRequest,
    SamplingParameters,
    Structure,
    Tally,
)
from forebay_server.core.interfaces import BACKGROUND_PRIORITY
from forebay_server.core.structure import fault_of
from forebay_server.dataplane.generation_cache import AnswerCache, Collected, Kept, NoCache
from forebay_server.dataplane.models import ModelAccess, ServedModel
from forebay_server.generation.client import GenerationClient, TemplateRefused

#: Prompts with more characters are tokenised in a thread: the event loop serves others meanwhile.
LONG_TEXT = 20_000
#: Longest answer of an upstream for a key with a budget, when the caller names none.
UPSTREAM_TOKENS = 4096


class Meter(Protocol):
    """Observes generations, for metrics."""

    def first_token(self, model: str, seconds: float) -> None: ...

    def between_tokens(self, model: str, seconds: float, tokens: int) -> None: ...

    def queued(self, model: str, seconds: float) -> None: ...

    def ended(self, model: str, tally: Tally, reason: str) -> None: ...


class Budget(Protocol):
    """Tokens and money that a key may spend. The transport settles a reservation at the call's
    end, with its facts."""

    async def room(self, key_id: str) -> tuple[int | None, float | None]: ...

    async def reserve(self, call: Call, tokens: int, money: float) -> None: ...


@dataclass(slots=True)
class Ask:
    """What both kinds of request have in common.

    Attributes:
        sampling: fields the caller gave, by SamplingParameters' names.
        cache: whether the response cache may answer; None = as the model is configured.
        path: prefix of field paths in errors: `request.` within streams.
    """

    model: str = ""
    sampling: dict[str, Any] = field(default_factory=dict)
    structure: Structure | None = None
    adapter: str = ""
    truncate_prompt: bool = False
    priority: int = 0
    user: str = ""
    sticky_key: str = ""
    cache: bool | None = None
    path: str = ""


@dataclass(slots=True)
class ChatAsk(Ask):
    """A conversation. `messages` in OpenAI's shape."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    chat: ChatContext | None = None
    documents: list[dict[str, str]] = field(default_factory=list)
    template_values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class CompleteAsk(Ask):
    """Texts, or ids, to continue."""

    prompts: list[str] = field(default_factory=list)
    token_ids: list[list[int]] = field(default_factory=list)


@dataclass(slots=True)
class Job:
    """Requests that are ready to run. `prompts` are their texts, for echoes; `limited` says that
    the caller gave `max_tokens`; `cache` is the caller's word on the response cache."""

    call: Call
    model: ServedModel
    id: str
    requests: list[GenerationRequest]
    dropped_messages: int = 0
    prompts: list[str] = field(default_factory=list)
    queue_s: float = 0.0
    limited: bool = False
    cache: bool | None = None

    @property
    def client(self) -> GenerationClient:
        """The model's client."""
        return cast(GenerationClient, self.model.client)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts; 0 where only the upstream knows."""
        return sum(len(r.prompt_ids) for r in self.requests)

    @property
    def answers(self) -> int:
        """Answers of all requests."""
        return sum(r.sampling.n for r in self.requests)

    def tally(self) -> Tally:
        """Tokens so far."""
        out = Tally()
        for request in self.requests:
            out.add(request.tally)
        return out


class GenerationPipeline:
    """See the module."""

    def __init__(
        self,
        access: ModelAccess,
        meter: Meter,
        budget: Budget,
        cache: AnswerCache | None = None,
    ) -> None:
        self._access = access
        self._meter = meter
        self._budget = budget
        self._cache = cache or AnswerCache(NoCache())

    async def prepare_chat(self, call: Call, ask: ChatAsk) -> Job:
        """From a conversation to a request. Raises InvalidArgument with paths and numbers."""
        model = await self._resolve(call, ask)
        client = cast(GenerationClient, model.client)
        _check(client, ask, call)
        sampling = _sampling(model, ask.sampling)
        assert ask.chat is not None
        job = Job(call, model, f"chatcmpl-{call.request_id}", [])
        job.limited, job.cache = "max_tokens" in ask.sampling, ask.cache
        request = GenerationRequest(job.id, sampling, chat=ask.chat)
        if client.engine.capabilities.needs_prompt_ids:
            ids, ask.messages, job.dropped_messages = await self._fit_chat(model, ask, sampling)
            request.prompt_ids = ids
            request.sampling = _bounded(model, ask, sampling, len(ids), f"{ask.path}messages")
        _finish(request, ask, call)
        job.requests.append(request)
        return job

    async def prepare_complete(self, call: Call, ask: CompleteAsk) -> Job:
        """From texts to requests, one per text."""
        model = await self._resolve(call, ask)
        client = cast(GenerationClient, model.client)
        _check(client, ask, call)
        sampling = _sampling(model, ask.sampling)
        job = Job(call, model, f"cmpl-{call.request_id}", [])
        job.limited, job.cache = "max_tokens" in ask.sampling, ask.cache
        local = client.engine.capabilities.needs_prompt_ids
        if ask.token_ids and not local:
            raise InvalidArgument.at(f"{ask.path}token_ids", "this model takes texts alone")
        for i in range(len(ask.prompts) or len(ask.token_ids)):
            request = GenerationRequest(f"{job.id}-{i}", sampling)
            if ask.prompts:
                request.prompt = ask.prompts[i]
            if local:
                path = f"{ask.path}{'prompts' if ask.prompts else 'token_ids'}[{i}]"
                ids = await self._ids(model, ask, i, path)
                room = _context(model) - (sampling.max_tokens or 1)
                if ask.truncate_prompt and 0 < room < len(ids):
                    ids = ids[-room:]
                request.prompt_ids = ids
                request.sampling = _bounded(model, ask, sampling, len(ids), path)
                job.prompts.append(request.prompt or _tokenizer(model).decode(ids))
            else:
                job.prompts.append(request.prompt)
            _finish(request, ask, call)
            job.requests.append(request)
        return job

    async def run(self, job: Job) -> AsyncGenerator[GenerationDelta, None]:
        """The answers' deltas, each after its turn. The call's facts are exact at the end,
        whatever the end is."""
        key = self._cache.key(job.model, job.requests, job.cache)
        kept = None if key is None else await self._cache.get(job.model, key)
        if kept is not None and len(kept.tallies) == len(job.requests):
            for delta in self._answered_before(job, kept):
                yield delta
            return
        collected = Collected() if key is not None else None
        async with aclosing(self._generated(job)) as deltas:
            async for delta in deltas:
                if collected is not None:
                    collected.add(delta)
                yield delta
        # A budget may have shortened the answers: then they are not those of the key.
        if key is None or collected is None or not (answers := collected.whole()):
            return
        if self._cache.key(job.model, job.requests, job.cache) == key:
            self._cache.put(job.model, key, Kept(answers, [r.tally for r in job.requests]))

    def _answered_before(self, job: Job, kept: Kept) -> list[GenerationDelta]:
        """Answers from the cache: they cost nothing."""
        facts = job.call.facts
        facts.items = facts.cached = job.answers
        for request, tally in zip(job.requests, kept.tallies, strict=True):
            request.tally = replace(tally, cached=tally.prompt, cached_answers=request.sampling.n)
        self._meter.first_token(job.model.name, time.monotonic() - job.call.started)
        self._meter.ended(job.model.name, Tally(), "cached")
        return kept.answers

    async def _generated(self, job: Job) -> AsyncGenerator[GenerationDelta, None]:
        call, model = job.call, job.model
        facts = call.facts
        prices = model.loaded.config.generation.prices
        await self._reserve(job, prices)
        reason = "aborted"
        try:
            async with aclosing(self._turns(job)) as deltas:
                async for delta in deltas:
                    yield delta
            reason = "done"
        except ForebayError as e:
            reason = e.reason.lower()
            raise
        finally:
            tally = job.tally()
            facts.items = job.answers
            facts.tokens = tally.prompt + tally.completion
            facts.cached = 0
            facts.queue_s = job.queue_s
            facts.compute_s = facts.engine_s = max(
                0.0, time.monotonic() - call.started - job.queue_s
            )
            money = _money(prices, tally.prompt, tally.cached, tally.completion)
            call.note("cost", money)
            self._meter.ended(model.name, tally, reason)
            statistics = job.client.statistics
            statistics.tokens += facts.tokens
            if reason == "done":
                statistics.success.add(facts.compute_s)
            elif reason == "aborted":
                statistics.cancelled += 1
            else:
                statistics.fail.add(facts.compute_s)

    async def _reserve(self, job: Job, prices: Any) -> None:
        """Set aside the most that the call can take. Answers without a length of their own are
        held to what the key's budget leaves, rather than refused for what they might become."""
        key_id = job.call.principal.key_id
        tokens, money = await self._budget.room(key_id)
        if tokens is None and money is None:
            return
        prompts = [_prompt_bound(r) for r in job.requests]
        cost = prices.completion / 1e6
        if not job.limited:
            left = [10**9]
            if tokens is not None:
                left.append(tokens - sum(prompts))
            if money is not None and cost > 0:
                left.append(int((money - _money(prices, sum(prompts), 0, 0)) / cost))
            each = min(left) // max(1, job.answers)
            for r in job.requests:
                longest = min(r.sampling.max_tokens or UPSTREAM_TOKENS, max(1, each))
                r.sampling = replace(r.sampling, max_tokens=longest)
        answers = sum((r.sampling.max_tokens or 0) * r.sampling.n for r in job.requests)
        worst = _money(prices, sum(prompts), 0, answers)
        await self._budget.reserve(job.call, sum(prompts) + answers, worst)

    async def _turns(self, job: Job) -> AsyncGenerator[GenerationDelta, None]:
        if len(job.requests) == 1:
            async with aclosing(self._one(job, job.requests[0], 0)) as deltas:
                async for delta in deltas:
                    yield delta
            return
        out: asyncio.Queue[GenerationDelta | BaseException | None] = asyncio.Queue(64)

        async def pump(request: GenerationRequest, offset: int) -> None:
            try:
                async with aclosing(self._one(job, request, offset)) as deltas:
                    async for delta in deltas:
                        await out.put(delta)
                await out.put(None)
            except Exception as e:
                await out.put(e)

        tasks = []
        offset = 0
        for request in job.requests:
            tasks.append(asyncio.create_task(pump(request, offset)))
            offset += request.sampling.n
        try:
            left = len(tasks)
            while left:
                got = await out.get()
                if isinstance(got, BaseException):
                    raise got
                if got is None:
                    left -= 1
                else:
                    yield got
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _one(
        self, job: Job, request: GenerationRequest, offset: int
    ) -> AsyncGenerator[GenerationDelta, None]:
        name, started = job.model.name, time.monotonic()
        estimate = len(request.prompt_ids) + (request.sampling.max_tokens or 256)
        said: dict[int, list[str]] = {}
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(
                job.client.gate.enter(
                    job.call.principal.key_id,
                    request.sampling.n,
                    estimate,
                    request.priority,
                    job.call.background,
                )
            )
            job.client.statistics.queue.add(time.monotonic() - started)
            self._meter.queued(name, time.monotonic() - started)
            stream = job.client.engine.generate(request)
            stack.push_async_callback(cast(Any, stream).aclose)
            last = 0.0
            async for delta in stream:
                now = time.monotonic()
                if not last:
                    self._meter.first_token(name, now - job.call.started)
                    job.queue_s = job.queue_s or now - job.call.started
                elif delta.tokens:
                    self._meter.between_tokens(name, now - last, delta.tokens)
                last = now
                if request.structure is not None:
                    said.setdefault(delta.index, []).append(delta.text)
                    if delta.finish_reason == "stop":
                        _validate(request, "".join(said[delta.index]))
                delta.index += offset
                yield delta

    async def _resolve(self, call: Call, ask: Ask) -> ServedModel:
        model = await self._access.resolve_async(call, ask.model, ("generation",), ask.sticky_key)
        call.facts.model, call.facts.version = model.name, model.version
        return model

    async def _ids(self, model: ServedModel, ask: CompleteAsk, i: int, path: str) -> list[int]:
        if ask.prompts:
            return await _encode(model, ask.prompts[i], special=True)
        ids = ask.token_ids[i]
        size = _tokenizer(model).get_vocab_size()
        if not ids:
            raise InvalidArgument.at(path, "has no ids; at least 1 is needed")
        if max(ids) >= size:
            raise InvalidArgument.at(
                f"{path}.ids", f"has the id {max(ids)}; allowed are 0 to {size - 1}"
            )
        return ids

    async def _fit_chat(
        self, model: ServedModel, ask: ChatAsk, sampling: SamplingParameters
    ) -> tuple[list[int], list[dict[str, Any]], int]:
        """Ids of the prompt, the messages that are in it, and how many were dropped."""
        messages, dropped = ask.messages, 0
        room = _context(model) - (sampling.max_tokens or 1)
        while True:
            ids = await _encode(model, _render(model, ask, messages), special=False)
            if len(ids) <= room or not ask.truncate_prompt:
                return ids, messages, dropped
            fewer = _without_oldest_turn(messages)
            if fewer is None:
                return ids, messages, dropped
            dropped += len(messages) - len(fewer)
            messages = fewer


def _without_oldest_turn(messages: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """The messages without the oldest turn after the system's; None when one turn is left."""
    start = 0
    while start < len(messages) and messages[start]["role"] == "system":
        start += 1
    following = [i for i in range(start + 1, len(messages)) if messages[i]["role"] == "user"]
    return [*messages[:start], *messages[following[0] :]] if following else None


def _render(model: ServedModel, ask: ChatAsk, messages: Sequence[Mapping[str, Any]]) -> str:
    client = cast(GenerationClient, model.client)
    if not client.template:
        raise FailedPrecondition(
            f"model {model.name!r} has no chat template; use Complete", reason="NO_CHAT_TEMPLATE"
        )
    assert ask.chat is not None
    if ask.documents and "documents" not in client.template:
        raise InvalidArgument.at(f"{ask.path}documents", "this model's chat template takes none")
    if ask.chat.tools and "tools" not in client.template:
        raise InvalidArgument.at(f"{ask.path}tools", "this model's chat template takes none")
    tools = [t.as_openai() for t in ask.chat.tools]
    try:
        return client.render(_for_template(messages), tools, ask.documents, ask.template_values)
    except TemplateRefused as e:
        raise InvalidArgument.at(f"{ask.path}messages", f"the chat template refuses: {e}") from None


def _for_template(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Messages as templates want them: calls' arguments as objects where they are JSON."""
    import json

    out: list[Mapping[str, Any]] = []
    for message in messages:
        if not message.get("tool_calls"):
            out.append(message)
            continue
        calls = []
        for call in message["tool_calls"]:
            arguments = call["function"]["arguments"]
            try:
                parsed = json.loads(arguments)
            except ValueError:
                parsed = arguments
            calls.append({**call, "function": {**call["function"], "arguments": parsed}})
        out.append({**message, "tool_calls": calls})
    return out


def _tokenizer(model: ServedModel) -> Any:
    return model.loaded.tokenizer


async def _encode(model: ServedModel, text: str, special: bool) -> list[int]:
    tokenizer = _tokenizer(model)
    if len(text) < LONG_TEXT:
        return tokenizer.encode(text, add_special_tokens=special).ids
    encoded = await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=special)
    return encoded.ids


def _context(model: ServedModel) -> int:
    return cast(GenerationClient, model.client).spec.context_length


def _check(client: GenerationClient, ask: Ask, call: Call) -> None:
    """Refuse what the engine cannot do; nothing is passed over in silence."""
    can = client.engine.capabilities
    where = ask.path
    if ask.structure is not None and ask.structure.kind not in can.structures:
        raise InvalidArgument.at(
            f"{where}response_format",
            f"this model's engine cannot enforce {ask.structure.kind}",
            reason="STRUCTURE_NOT_ENFORCEABLE",
        )
    if ask.sampling.get("logit_bias") and not can.logit_bias:
        raise InvalidArgument.at(f"{where}sampling.logit_bias", "this model's engine has none")
    top = ask.sampling.get("logprobs")
    if top is not None and top > can.top_logprobs:
        raise InvalidArgument.at(
            f"{where}sampling.logprobs",
            f"is {top}; this model's engine gives the likeliest {can.top_logprobs} at most",
        )
    if ask.adapter and ask.adapter not in can.adapters:
        known = ", ".join(sorted(can.adapters)) or "none"
        raise InvalidArgument.at(
            f"{where}adapter", f"is {ask.adapter!r}; this model's adapters are {known}"
        )
    if ask.priority > 0 and "admin" not in call.principal.scopes:
        raise PermissionDenied("a positive priority needs the admin scope", reason="SCOPE_MISSING")
    chat = ask.chat if isinstance(ask, ChatAsk) else None
    if chat is not None and not can.images:
        for i, message in enumerate(chat.messages):
            if isinstance(message.get("content"), list):
                raise InvalidArgument.at(
                    f"{where}messages[{i}].content", "has an image; this model takes text alone"
                )


def _sampling(model: ServedModel, given: Mapping[str, Any]) -> SamplingParameters:
    """The caller's parameters over the model's own defaults."""
    own = model.manifest.generation_head.sampling
    values: dict[str, Any] = {**own, **given}
    if "top_k" in values:
        values["top_k"] = int(values["top_k"])
    return SamplingParameters(**values)


def _bounded(
    model: ServedModel, ask: Ask, sampling: SamplingParameters, prompt: int, path: str
) -> SamplingParameters:
    """The parameters with `max_tokens` set to what fits. Raises with both numbers."""
    context = _context(model)
    if prompt >= context:
        raise InvalidArgument.at(
            path,
            f"the prompt has {prompt} tokens; the model's context has {context}, of which at "
            "least one is for the answer",
            reason="CONTEXT_LENGTH_EXCEEDED",
        )
    room = context - prompt
    if sampling.max_tokens is None:
        return replace(sampling, max_tokens=room)
    if sampling.max_tokens > room:
        raise InvalidArgument.at(
            f"{ask.path}sampling.max_tokens",
            f"the prompt has {prompt} tokens and max_tokens is {sampling.max_tokens}, "
            f"{prompt + sampling.max_tokens} together; the model's context has {context}",
            reason="CONTEXT_LENGTH_EXCEEDED",
        )
    return sampling


def _finish(request: GenerationRequest, ask: Ask, call: Call) -> None:
    request.structure = ask.structure
    request.adapter = ask.adapter
    request.priority = BACKGROUND_PRIORITY if call.background else ask.priority
    request.deadline = call.deadline
    request.user = ask.user
    call.note("user", ask.user)
    if request.sampling.min_tokens > (request.sampling.max_tokens or request.sampling.min_tokens):
        raise InvalidArgument.at(
            f"{ask.path}sampling.min_tokens",
            f"is {request.sampling.min_tokens}; max_tokens is {request.sampling.max_tokens}",
        )


def _validate(request: GenerationRequest, text: str) -> None:
    assert request.structure is not None
    fault = fault_of(request.structure, text)
    if fault is not None:
        raise Internal(
            f"the engine broke the form that was asked for: {fault}", reason="OUTPUT_INVALID"
        )


def _prompt_bound(request: GenerationRequest) -> int:
    """Tokens of the prompt; for upstreams, which alone know them, at most one per byte."""
    if request.prompt_ids:
        return len(request.prompt_ids)
    if request.chat is not None:
        return len(str([request.chat.messages, request.chat.tools]).encode())
    return len(request.prompt.encode())


def _money(prices: Any, prompt: int, cached: int, completion: int) -> float:
    """Price of a generation; cached tokens at their own price where there is one."""
    cached_price = prices.prompt if prices.cached is None else prices.cached
    fresh = max(0, prompt - cached)
    return (fresh * prices.prompt + cached * cached_price + completion * prices.completion) / 1e6
