"""GenerationService: conversations and completions, whole or as streams of typed deltas."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, cast

from forebay.v1 import generation_pb2 as pb

from forebay_server.core.call import Call
from forebay_server.core.generation import GenerationDelta
from forebay_server.dataplane.generation import GenerationPipeline
from forebay_server.dataplane.generation_jobs import Job
from forebay_server.services import generation_messages as messages
from forebay_server.services.base import Service
from forebay_server.services.common import served_by, timing, usage


class GenerationService(Service):
    """See protos/forebay/v1/generation.proto."""

    name = "forebay.v1.GenerationService"

    def __init__(self, generation: GenerationPipeline) -> None:
        self._generation = generation

    async def chat(self, call: Call) -> pb.ChatResponse:
        """Chat."""
        request = cast(pb.ChatRequest, call.request)
        job = await self._generation.prepare_chat(call, messages.chat_ask(request, ""))
        answers = [_ChatAnswer(i) for i in range(job.answers)]
        async with aclosing(self._generation.run(job)) as deltas:
            async for delta in deltas:
                answers[delta.index].add(delta)
        return pb.ChatResponse(
            id=job.id,
            choices=[a.message() for a in answers],
            served_by=served_by(call),
            generation_usage=messages.usage_of(job.tally()),
            usage=usage(call),
            timing=timing(call),
            dropped_messages=job.dropped_messages,
        )

    async def chat_stream(self, call: Call) -> AsyncIterator[pb.ChatStreamResponse]:
        """ChatStream."""
        request = cast(pb.ChatStreamRequest, call.request).request
        job = await self._generation.prepare_chat(call, messages.chat_ask(request, "request."))
        yield pb.ChatStreamResponse(started=_started(job))
        async with aclosing(self._generation.run(job)) as deltas:
            async for delta in deltas:
                if delta.reasoning:
                    yield pb.ChatStreamResponse(
                        reasoning=pb.ReasoningDelta(index=delta.index, text=delta.reasoning)
                    )
                if delta.text or delta.logprobs:
                    yield pb.ChatStreamResponse(text=messages.text_delta(delta))
                if delta.refusal:
                    refusal = pb.RefusalDelta(index=delta.index, text=delta.refusal)
                    yield pb.ChatStreamResponse(refusal=refusal)
                for piece in delta.tool_calls:
                    yield pb.ChatStreamResponse(
                        tool_call=pb.ToolCallDelta(
                            index=delta.index,
                            call_index=piece.call,
                            id=piece.id,
                            name=piece.name,
                            arguments=piece.arguments,
                        )
                    )
                if delta.finish_reason is not None:
                    yield pb.ChatStreamResponse(finish=messages.finish(delta))
        yield pb.ChatStreamResponse(usage=messages.usage_of(job.tally()))

    async def complete(self, call: Call) -> pb.CompleteResponse:
        """Complete."""
        request = cast(pb.CompleteRequest, call.request)
        job = await self._generation.prepare_complete(call, messages.complete_ask(request, ""))
        answers = [pb.Completion(index=i) for i in range(job.answers)]
        texts: list[list[str]] = [[p] if request.echo else [] for p in _prompts(job)]
        async with aclosing(self._generation.run(job)) as deltas:
            async for delta in deltas:
                answer = answers[delta.index]
                texts[delta.index].append(delta.text)
                messages.fill_logprobs(answer.logprobs, delta.logprobs)
                if delta.finish_reason is not None:
                    answer.finish_reason = messages.FINISH[delta.finish_reason]
                    answer.stop_reason = delta.stop_reason
        for answer, parts in zip(answers, texts, strict=True):
            answer.text = "".join(parts)
        return pb.CompleteResponse(
            id=job.id,
            completions=answers,
            served_by=served_by(call),
            generation_usage=messages.usage_of(job.tally()),
            usage=usage(call),
            timing=timing(call),
        )

    async def complete_stream(self, call: Call) -> AsyncIterator[pb.CompleteStreamResponse]:
        """CompleteStream."""
        request = cast(pb.CompleteStreamRequest, call.request).request
        ask = messages.complete_ask(request, "request.")
        job = await self._generation.prepare_complete(call, ask)
        yield pb.CompleteStreamResponse(started=_started(job))
        if request.echo:
            for i, prompt in enumerate(_prompts(job)):
                yield pb.CompleteStreamResponse(text=pb.TextDelta(index=i, text=prompt))
        async with aclosing(self._generation.run(job)) as deltas:
            async for delta in deltas:
                # Without text, too: a token that is no whole character yet counts, and is a sign of life.
                if delta.text or delta.logprobs or delta.tokens:
                    yield pb.CompleteStreamResponse(text=messages.text_delta(delta))
                if delta.finish_reason is not None:
                    yield pb.CompleteStreamResponse(finish=messages.finish(delta))
        yield pb.CompleteStreamResponse(usage=messages.usage_of(job.tally()))


def _prompts(job: Job) -> list[str]:
    """The prompt of each answer."""
    return [p for p, r in zip(job.prompts, job.requests, strict=True) for _ in range(r.sampling.n)]


def _started(job: Job) -> pb.GenerationStarted:
    return pb.GenerationStarted(
        id=job.id,
        served_by=served_by(job.call),
        prompt_tokens=job.prompt_tokens,
        dropped_messages=job.dropped_messages,
    )


class _ChatAnswer:
    """One answer that is put together from its deltas."""

    def __init__(self, index: int) -> None:
        self._choice = pb.ChatChoice(index=index)
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._refusal: list[str] = []
        self._calls: dict[int, Any] = {}

    def add(self, delta: GenerationDelta) -> None:
        """Add a delta."""
        self._text.append(delta.text)
        self._reasoning.append(delta.reasoning)
        self._refusal.append(delta.refusal)
        for piece in delta.tool_calls:
            call = self._calls.setdefault(piece.call, {"id": "", "name": "", "arguments": []})
            call["id"] = call["id"] or piece.id
            call["name"] = call["name"] or piece.name
            call["arguments"].append(piece.arguments)
        messages.fill_logprobs(self._choice.logprobs, delta.logprobs)
        if delta.finish_reason is not None:
            self._choice.finish_reason = messages.FINISH[delta.finish_reason]
            self._choice.stop_reason = delta.stop_reason

    def message(self) -> pb.ChatChoice:
        """The whole answer."""
        message = self._choice.message
        message.role = pb.CHAT_ROLE_ASSISTANT
        text = "".join(self._text)
        if text:
            message.content.add(text=text)
        message.reasoning = "".join(self._reasoning)
        message.refusal = "".join(self._refusal)
        for _, call in sorted(self._calls.items()):
            message.tool_calls.add(
                id=call["id"], name=call["name"], arguments="".join(call["arguments"])
            )
        return self._choice
