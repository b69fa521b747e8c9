"""A loaded language model: its engine, its door, its chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from forebay_server.core.generation import GenerationSpec
from forebay_server.core.interfaces import GenerationEngine
from forebay_server.core.statistics import EngineStatistics
from forebay_server.generation.gate import Gate

#: Values of every chat template that are the server's to give; so are special tokens.
GIVEN = (
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "raise_exception",
    "strftime_now",
)


class GenerationClient:
    """What the repository keeps of a language model; in BatchingEngineClient's place."""

    def __init__(
        self,
        spec: GenerationSpec,
        engine: GenerationEngine,
        template: str,
        special_tokens: Mapping[str, str],
        max_running: int,
        max_queue_size: int,
    ) -> None:
        self.spec = spec
        self.engine = engine
        self.engines = [engine]
        self.template = template
        self.special_tokens = special_tokens
        self.statistics = EngineStatistics()
        self.gate = Gate(max_running, max_queue_size)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        documents: Sequence[Mapping[str, str]],
        values: Mapping[str, Any],
    ) -> str:
        """The prompt of a conversation. Raises TemplateRefused."""
        # Here: without a language model a server does not hold jinja2's 4 MB.
        from forebay_server.generation.templates import render

        return render(
            self.template,
            messages,
            {
                **values,
                **self.special_tokens,
                "tools": list(tools) or None,
                "documents": list(documents) or None,
                "add_generation_prompt": True,
            },
        )

    def submit(self, requests: Sequence[object]) -> list[object]:
        """Language models take no batches."""
        raise TypeError("a language model takes no batches")

    def stats(self) -> Mapping[str, Any]:
        """As BatchingEngineClient's."""
        return {"statistics": self.statistics, "queue_depth": self.gate.waiting}

    def check_health(self) -> None:
        """Raise Unavailable when a request cannot succeed."""
        self.engine.check_health()

    def close(self, timeout_s: float = 10.0) -> None:
        """End the engine."""
        self.engine.close()
