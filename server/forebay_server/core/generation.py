"""What goes in and out of engines that generate text. Plain Python.

These engines batch by themselves, so there is no batcher in front of them. A request has the
prompt's tokens (engines on this machine) and, for chats, the conversation itself, which engines
need for tools and upstreams for everything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

StructureKind = Literal["json_schema", "json_object", "regex", "choice", "grammar"]
ToolMode = Literal["auto", "none", "required", "named"]
FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]


@dataclass(frozen=True, slots=True)
class Structure:
    """The form that an answer must have. `value`: schema text, expression, grammar, or choices."""

    kind: StructureKind
    value: str | tuple[str, ...] = ""


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """A tool. `parameters` is its JSON schema."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    strict: bool = False

    def as_openai(self) -> dict[str, Any]:
        """The shape that chat templates and upstreams expect."""
        function: dict[str, Any] = {"name": self.name}
        if self.description:
            function["description"] = self.description
        function["parameters"] = dict(self.parameters)
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class ChatContext:
    """The conversation behind a prompt, in OpenAI's shape. `documents` and `template_values` are in
    the prompt where it is rendered here."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[ToolSpec] = ()
    tool_mode: ToolMode = "auto"
    tool_name: str = ""
    parallel_tool_calls: bool = True
    documents: Sequence[Mapping[str, str]] = ()
    template_values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SamplingParameters:
    """How tokens are chosen. None = the engine's default where a field allows it.

    `max_tokens` is always set for engines on this machine: the context's rest at most.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    n: int = 1
    logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    @property
    def greedy(self) -> bool:
        """Whether an equal request gets an equal answer."""
        return self.temperature == 0


@dataclass(slots=True)
class Tally:
    """Tokens of one request so far. Engines keep it exact, aborted requests included.

    `cached_answers` came from the response cache, with the tokens that they took once.
    """

    prompt: int = 0
    completion: int = 0
    cached: int = 0
    reasoning: int = 0
    cached_answers: int = 0

    def add(self, other: Tally) -> None:
        """Add another request's tokens."""
        self.prompt += other.prompt
        self.completion += other.completion
        self.cached += other.cached
        self.reasoning += other.reasoning
        self.cached_answers += other.cached_answers


@dataclass(slots=True)
class GenerationRequest:
    """One prompt to answer `sampling.n` times.

    Attributes:
        id: unique among running requests.
        prompt_ids: the prompt's tokens; empty for upstreams.
        prompt: the prompt's text, for upstreams' completions.
        chat: the conversation; None for completions.
        priority: higher is served first.
        tally: kept by the engine.
    """

    id: str
    sampling: SamplingParameters
    prompt_ids: Sequence[int] = ()
    prompt: str = ""
    chat: ChatContext | None = None
    structure: Structure | None = None
    adapter: str = ""
    priority: int = 0
    deadline: float | None = None
    user: str = ""
    tally: Tally = field(default_factory=Tally)


@dataclass(frozen=True, slots=True)
class TokenProbability:
    """A token with the natural logarithm of its probability. `raw` are its bytes."""

    token_id: int
    token: str
    logprob: float
    raw: bytes = b""
    top: tuple[TokenProbability, ...] = ()


@dataclass(frozen=True, slots=True)
class ToolCallPiece:
    """A piece of a tool call: id and name in the first one alone."""

    call: int
    id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass(slots=True)
class GenerationDelta:
    """What one answer goes on with. The last one of each answer has the finish reason."""

    index: int = 0
    text: str = ""
    reasoning: str = ""
    tool_calls: Sequence[ToolCallPiece] = ()
    tokens: int = 0
    logprobs: Sequence[TokenProbability] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str = ""
    #: Why the model does not answer; upstreams alone say it apart from the text.
    refusal: str = ""


@dataclass(frozen=True, slots=True)
class GenerationSpec:
    """All that a generation engine needs to load. Plain data.

    Attributes:
        engine: `openvino`, `vllm` or `openai`.
        folder: the model's folder.
        context_length: prompt and answer together, tokens.
        max_running: answers that are generated at once; more wait in the fair queue.
        stream_interval_s: least time between two messages of a stream.
        adapters: LoRA folders by name.
        options: engine-specific, from model.yaml.
    """

    model: str
    version: int
    engine: str
    folder: str
    context_length: int
    max_running: int = 64
    stream_interval_s: float = 0.0
    eos_token_ids: tuple[int, ...] = ()
    tool_parser: str = ""
    reasoning_parser: str = ""
    adapters: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an engine enforces and takes. `top_logprobs`: the likeliest tokens it can give beside each."""

    structures: frozenset[str] = frozenset()
    needs_prompt_ids: bool = True
    top_logprobs: int = 20
    logit_bias: bool = True
    adapters: frozenset[str] = frozenset()
    images: bool = False
    tools: bool = True
