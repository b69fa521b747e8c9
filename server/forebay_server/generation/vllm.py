"""vLLM, in its own process and, usually, its own environment."""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator
from pathlib import Path

from forebay.errors import InvalidArgument

from forebay_server.core.generation import (
    Capabilities,
    GenerationDelta,
    GenerationRequest,
    GenerationSpec,
)
from forebay_server.generation.process import ProcessEngine

#: Started by path: the environment that has vLLM need not have Forebay.
WORKER = Path(__file__).with_name("vllm_worker.py")


class VllmEngine(ProcessEngine):
    """See interfaces.GenerationEngine.

    Args:
        python: interpreter that has vLLM; empty = this one.
        cache_gb: key-value cache on the CPU; 0 = vLLM's default.
    """

    def __init__(self, spec: GenerationSpec, python: str, cache_gb: int) -> None:
        environment = {"HF_HUB_OFFLINE": "1"}
        if cache_gb:
            environment["VLLM_CPU_KVCACHE_SPACE"] = str(cache_gb)
        super().__init__(
            spec,
            Capabilities(
                structures=frozenset({"json_schema", "json_object", "regex", "choice", "grammar"}),
                adapters=frozenset(spec.adapters),
                tools=bool(spec.tool_parser),
            ),
            [python or sys.executable, "-P", str(WORKER)],
            environment,
            "vLLM (by generation.vllm_python)",
        )

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationDelta, None]:
        """See GenerationEngine."""
        chat = request.chat
        if chat and chat.tools and chat.tool_mode != "none" and not self.capabilities.tools:
            raise InvalidArgument.at(
                "tools", "this model has no tool_parser in its model.yaml", reason="NO_TOOL_PARSER"
            )
        stream = super().generate(request)
        try:
            async for delta in stream:
                yield delta
        finally:
            await stream.aclose()
