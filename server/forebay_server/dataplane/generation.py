"""The use cases of language models: turns taken, answers passed on, budgets and the cache kept."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from typing import Any, Protocol, cast

from forebay.errors import ForebayError, Internal

from forebay_server.core.call import Call
from forebay_server.core.generation import GenerationDelta, GenerationRequest, Tally
from forebay_server.core.structure import fault_of
from forebay_server.dataplane.generation_cache import AnswerCache, Collected, Kept, NoCache
from forebay_server.dataplane.generation_jobs import (
    ChatAsk,
    CompleteAsk,
    Job,
    chat_job,
    completion_job,
)
from forebay_server.dataplane.models import ModelAccess

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
        return await chat_job(self._access, call, ask)

    async def prepare_complete(self, call: Call, ask: CompleteAsk) -> Job:
        """From texts to requests, one per text. Raises as `prepare_chat`."""
        return await completion_job(self._access, call, ask)

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
            facts.items = job.begun  # who left while all waited has taken nothing
            facts.tokens = tally.prompt + tally.completion
            facts.cached = 0
            whole = time.monotonic() - call.started
            facts.queue_s = job.queue_s or (job.waited_s if job.begun else whole)
            facts.compute_s = facts.engine_s = max(0.0, whole - facts.queue_s)
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
        refused: set[int] = set()
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
            if not job.begun:
                job.waited_s = time.monotonic() - job.call.started
            job.begun += request.sampling.n
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
                    if delta.refusal:
                        refused.add(delta.index)
                    # Who does not answer breaks no form.
                    if delta.finish_reason == "stop" and delta.index not in refused:
                        _validate(request, "".join(said[delta.index]))
                delta.index += offset
                yield delta


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
