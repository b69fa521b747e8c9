"""What knowledge bases need of a language model: answers, questions made whole, other wordings,
hypothetical passages. Any model that GenerationService serves can write."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from forebay.errors import FailedPrecondition, InvalidArgument
from forebay.settings import KnowledgeSettings

from forebay_server.core.call import Call
from forebay_server.core.generation import ChatContext, Tally
from forebay_server.dataplane.generation import GenerationPipeline
from forebay_server.dataplane.generation_jobs import ChatAsk, Job
from forebay_server.dataplane.parts import child_of

#: What a model replies when the context does not hold the answer.
NOT_FOUND = "NOT IN THE DOCUMENTS"
#: Longest question, other wordings and passage, in tokens.
QUESTION_TOKENS, WORDINGS_TOKENS, PASSAGE_TOKENS = 96, 256, 192
#: Characters of the conversation that a question is made whole by; the end counts.
HISTORY_CHARACTERS = 6000

Turns = Sequence[tuple[str, str]]
_LIST_MARK = re.compile(r"^\s*(?:\d{1,2}[.):]|[-*•])\s*")


@dataclass(slots=True)
class Written:
    """What language models consumed for one call, and the one that wrote last."""

    model: str = ""
    version: int = 0
    tally: Tally = field(default_factory=Tally)


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply that is ready to be written; the model sees the first `given` chunks."""

    job: Job
    given: int


@dataclass(frozen=True, slots=True)
class Piece:
    """What a reply goes on with; `refusal`: the model says there why it does not answer."""

    text: str
    refusal: bool = False


class Writer:
    """See the module.

    Args:
        on_end: hears of each generation's own call when it has ended, whatever the end: usage and
            budgets.
    """

    def __init__(
        self,
        generation: GenerationPipeline,
        settings: KnowledgeSettings,
        on_end: Callable[[Call], None] = lambda call: None,
    ) -> None:
        self._generation = generation
        self._settings = settings
        self._on_end = on_end

    @property
    def default(self) -> str:
        """The model that writes where a request names none; empty = none."""
        return self._settings.writer

    def model(self, asked: str, path: str) -> str:
        """The model of a step. Raises FailedPrecondition when none is named and none is set."""
        if not (asked or self.default):
            raise FailedPrecondition(
                f"{path} needs a language model: name one there, or set knowledge.writer",
                reason="NO_LANGUAGE_MODEL",
            )
        return asked or self.default

    async def answer(
        self,
        call: Call,
        model: str,
        question: str,
        whole: str,
        chunks: Sequence[str],
        history: Turns,
    ) -> Reply:
        """An answer that is ready to be written, from as many of the chunks as fit the model's
        context; the first ones are kept. Where the conversation does not fit, `whole`, the question
        that needs none, is asked."""
        settings = self._settings
        turns = [{"role": role, "content": text} for role, text in history]
        for given in range(len(chunks), 0, -1):
            context = "\n\n".join(f"[{i}] {c}" for i, c in enumerate(chunks[:given], 1))
            prompt = settings.answer_prompt.format(context=context, question=question)
            messages = [*turns, {"role": "user", "content": prompt}]
            # With one chunk, an answer as long as there is room is better than none.
            length = settings.max_answer_tokens if given > 1 else 0
            try:
                return await self._prepare(call, model, messages, length, given)
            except InvalidArgument as e:
                if given == 1:
                    raise _misfit(model, e) from e
                turns, question = [], whole
        raise ValueError("an answer needs chunks")

    async def pieces(
        self, call: Call, reply: Reply, written: Written
    ) -> AsyncGenerator[Piece, None]:
        """The reply, as it comes. What it takes is counted as a call of the language model's own,
        whatever its end."""
        job = reply.job
        written.model, written.version = job.model.name, job.model.version
        try:
            async with aclosing(self._generation.run(job)) as deltas:
                async for delta in deltas:
                    if delta.text:
                        yield Piece(delta.text)
                    if delta.refusal:
                        yield Piece(delta.refusal, refusal=True)
        finally:
            written.tally.add(job.tally())
            call.note("part_tokens", written.tally.prompt + written.tally.completion)
            self._on_end(job.call)

    async def whole_question(
        self, call: Call, model: str, question: str, history: Turns, written: Written
    ) -> str:
        """A follow-up as a question that needs no conversation; the question itself when the
        model says nothing."""
        said = "\n".join(f"{role}: {text}" for role, text in history)[-HISTORY_CHARACTERS:]
        prompt = self._settings.rewrite_prompt.format(history=said, question=question)
        text = await self._say(call, model, prompt, QUESTION_TOKENS, written)
        first = next((line.strip() for line in text.splitlines() if line.strip()), "")
        return first.strip('"“”') or question

    async def wordings(
        self, call: Call, model: str, question: str, count: int, written: Written
    ) -> list[str]:
        """At most `count` other wordings of a question."""
        prompt = self._settings.expand_prompt.format(count=count, question=question)
        text = await self._say(call, model, prompt, WORDINGS_TOKENS, written)
        lines = (_LIST_MARK.sub("", line).strip().strip('"“”') for line in text.splitlines())
        return [w for w in dict.fromkeys(lines) if w and w != question][:count]

    async def passage(self, call: Call, model: str, question: str, written: Written) -> str:
        """A passage that could answer a question; empty when the model says nothing."""
        prompt = self._settings.hyde_prompt.format(question=question)
        return (await self._say(call, model, prompt, PASSAGE_TOKENS, written)).strip()

    async def _say(self, call: Call, model: str, prompt: str, length: int, written: Written) -> str:
        messages = [{"role": "user", "content": prompt}]
        try:
            reply = await self._prepare(call, model, messages, length)
        except InvalidArgument as e:
            raise _misfit(model, e) from e
        async with aclosing(self.pieces(call, reply, written)) as pieces:
            # Who refuses says nothing here: the question is searched for as it is.
            return "".join([piece.text async for piece in pieces if not piece.refusal])

    async def _prepare(
        self, call: Call, model: str, messages: list[dict[str, Any]], length: int, given: int = 0
    ) -> Reply:
        """The call's key, deadline and cancellation hold. `length` 0 = what the context leaves."""
        child = child_of(call, lambda _: None)
        sampling: dict[str, Any] = {"temperature": 0.0}
        if length:
            sampling["max_tokens"] = length
        ask = ChatAsk(model=model, sampling=sampling, messages=messages, chat=ChatContext(messages))
        return Reply(await self._generation.prepare_chat(child, ask), given)


def _misfit(model: str, error: InvalidArgument) -> FailedPrecondition:
    """A fault in a prompt of ours is none in the caller's fields."""
    return FailedPrecondition(
        f"model {model!r} cannot be asked: {error.message}", reason="LANGUAGE_MODEL_REFUSED"
    )
