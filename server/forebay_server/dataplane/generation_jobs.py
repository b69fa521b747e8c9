"""Requests to language models made ready to run: prompts rendered, counted and fitted, parameters
checked. Nothing here generates."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from forebay.errors import FailedPrecondition, InvalidArgument, PermissionDenied

from forebay_server.core.call import Call
from forebay_server.core.generation import (
    ChatContext,
    GenerationRequest,
    SamplingParameters,
    Structure,
    Tally,
)
from forebay_server.core.interfaces import BACKGROUND_PRIORITY
from forebay_server.dataplane.models import ModelAccess, ServedModel
from forebay_server.generation.client import GIVEN, GenerationClient
from forebay_server.generation.errors import TemplateRefused

#: Engines know requests by ids that no caller chooses: a request id may be given twice.
_numbers = itertools.count(1)
#: Prompts with more characters are tokenised in a thread: the event loop serves others meanwhile.
LONG_TEXT = 20_000
#: Likewise conversations with more messages are rendered there.
MANY_MESSAGES = 100
#: Steps in which a conversation is cut by guessing, before it is halved.
GUESSES = 5


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
    the caller gave `max_tokens`; `cache` is the caller's word on the response cache; `begun` counts
    answers whose turn has come, the first of them `waited_s` after the call's start."""

    call: Call
    model: ServedModel
    id: str
    requests: list[GenerationRequest]
    dropped_messages: int = 0
    prompts: list[str] = field(default_factory=list)
    queue_s: float = 0.0
    begun: int = 0
    waited_s: float = 0.0
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


async def chat_job(access: ModelAccess, call: Call, ask: ChatAsk) -> Job:
    """From a conversation to a request. Raises InvalidArgument with paths and numbers."""
    model = await _resolve(access, call, ask)
    client = cast(GenerationClient, model.client)
    _check(client, ask, call)
    sampling = _sampling(model, ask.sampling)
    assert ask.chat is not None
    job = Job(call, model, f"chatcmpl-{call.request_id}", [])
    job.limited, job.cache = "max_tokens" in ask.sampling, ask.cache
    request = GenerationRequest(_engine_id(job), sampling, chat=ask.chat)
    if client.engine.capabilities.needs_prompt_ids:
        ids, ask.messages, job.dropped_messages = await _fit_chat(model, ask, sampling)
        request.prompt_ids = ids
        request.sampling = _bounded(model, ask, sampling, len(ids), f"{ask.path}messages")
    _finish(request, ask, call)
    job.requests.append(request)
    return job


async def count_chat(access: ModelAccess, call: Call, ask: ChatAsk) -> tuple[int, int]:
    """Tokens of a conversation's prompt, and of the model's context. Raises as `chat_job`, except for
    prompts that are too long, and FailedPrecondition where only the upstream has a tokenizer."""
    model = await _resolve(access, call, ask)
    client = cast(GenerationClient, model.client)
    if not client.engine.capabilities.needs_prompt_ids:
        raise FailedPrecondition(
            f"model {model.name!r} has no tokenizer here: only its upstream can count tokens",
            reason="NO_TOKENIZER",
        )
    _check(client, ask, call)
    return len(await _chat_ids(model, ask, ask.messages)), _context(model)


async def completion_job(access: ModelAccess, call: Call, ask: CompleteAsk) -> Job:
    """From texts to requests, one per text."""
    model = await _resolve(access, call, ask)
    client = cast(GenerationClient, model.client)
    _check(client, ask, call)
    sampling = _sampling(model, ask.sampling)
    job = Job(call, model, f"cmpl-{call.request_id}", [])
    job.limited, job.cache = "max_tokens" in ask.sampling, ask.cache
    local = client.engine.capabilities.needs_prompt_ids
    if ask.token_ids and not local:
        raise InvalidArgument.at(f"{ask.path}token_ids", "this model takes texts alone")
    for i in range(len(ask.prompts) or len(ask.token_ids)):
        request = GenerationRequest(_engine_id(job), sampling)
        if ask.prompts:
            request.prompt = ask.prompts[i]
        if local:
            path = f"{ask.path}{'prompts' if ask.prompts else 'token_ids'}[{i}]"
            ids = await _ids(model, ask, i, path)
            if not ids:
                raise InvalidArgument.at(path, "must not be empty: this model begins with no token")
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


def _engine_id(job: Job) -> str:
    return f"{job.id}.{next(_numbers)}"


async def _resolve(access: ModelAccess, call: Call, ask: Ask) -> ServedModel:
    model = await access.resolve_async(call, ask.model, ("generation",), ask.sticky_key)
    call.facts.model, call.facts.version = model.name, model.version
    return model


async def _ids(model: ServedModel, ask: CompleteAsk, i: int, path: str) -> list[int]:
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
    model: ServedModel, ask: ChatAsk, sampling: SamplingParameters
) -> tuple[list[int], list[dict[str, Any]], int]:
    """Ids of the prompt, the messages that are in it, and how many were dropped."""
    room = _context(model) - (sampling.max_tokens or 1)
    ids = await _chat_ids(model, ask, ask.messages)
    if len(ids) <= room or not ask.truncate_prompt:
        return ids, ask.messages, 0
    head, starts = _turns(ask.messages)
    fitting, messages = ids, ask.messages
    # Dropping more turns never makes a prompt longer, so the first start that fits is found in a few
    # steps: where turns as long as the mean would put it, then by halves. One turn after the other, a
    # conversation of thousands would be rendered thousands of times.
    low, high, at, mean, guesses = 0, len(starts), -1, len(ids) / (len(starts) + 1), 0
    while low < high:
        guess = at + math.ceil((len(ids) - room) / mean) if guesses < GUESSES else (low + high) // 2
        at, guesses = min(max(guess, low), high - 1), guesses + 1
        fewer = [*ask.messages[:head], *ask.messages[starts[at] :]]
        ids = await _chat_ids(model, ask, fewer)
        # When not even the last turn fits, the refusal speaks of that one.
        if len(ids) <= room or at == len(starts) - 1:
            fitting, messages, high = ids, fewer, at
        else:
            low = at + 1
    return fitting, messages, len(ask.messages) - len(messages)


def _turns(messages: Sequence[Mapping[str, Any]]) -> tuple[int, list[int]]:
    """Where the system's messages end, and where the turns after the oldest one begin."""
    head = 0
    while head < len(messages) and messages[head]["role"] == "system":
        head += 1
    return head, [i for i in range(head + 1, len(messages)) if messages[i]["role"] == "user"]


async def _chat_ids(
    model: ServedModel, ask: ChatAsk, messages: Sequence[Mapping[str, Any]]
) -> list[int]:
    """The prompt of a conversation, in a thread when it is long."""
    if len(messages) <= MANY_MESSAGES and sum(len(m["content"]) for m in messages) < LONG_TEXT:
        return await _encode(model, _render(model, ask, messages), special=False)
    text = await asyncio.to_thread(_render, model, ask, messages)
    return await _encode(model, text, special=False)


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

    def encode() -> list[int]:
        # Of tokenizers' calls the one for batches alone lets other threads run meanwhile.
        return tokenizer.encode_batch_fast([text], add_special_tokens=special)[0].ids

    return await asyncio.to_thread(encode)


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
    if ask.truncate_prompt and not can.needs_prompt_ids:
        raise InvalidArgument.at(
            f"{where}truncate_prompt",
            "is not allowed for this model: only its upstream can count the prompt's tokens",
        )
    if isinstance(ask, ChatAsk):
        _check_values(client, ask)
    if ask.priority > 0 and "admin" not in call.principal.scopes:
        raise PermissionDenied("a positive priority needs the admin scope", reason="SCOPE_MISSING")
    chat = ask.chat if isinstance(ask, ChatAsk) else None
    if chat is not None and not can.images:
        for i, message in enumerate(chat.messages):
            if isinstance(message.get("content"), list):
                raise InvalidArgument.at(
                    f"{where}messages[{i}].content", "has an image; this model takes text alone"
                )


def _check_values(client: GenerationClient, ask: ChatAsk) -> None:
    given = {*GIVEN, *client.special_tokens}
    for name in ask.template_values:
        if name in given:
            raise InvalidArgument.at(
                f"{ask.path}template_values.{name}",
                f"is given by the server, as are {', '.join(sorted(given - {name}))}; allowed are "
                "other names",
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
