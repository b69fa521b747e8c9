"""vLLM, in its own process and, usually, its own environment."""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator

from forebay.errors import InvalidArgument

from forebay_server.core.generation import (
    Capabilities,
    GenerationDelta,
    GenerationRequest,
    GenerationSpec,
)
from forebay_server.generation.process import WORKERS, ProcessEngine


class VllmEngine(ProcessEngine):
    """See interfaces.GenerationEngine.

    Args:
        python: interpreter that has vLLM; empty = this one.
        cache_gb: key-value cache on the CPU; 0 = vLLM's default.
    """

    def __init__(self, spec: GenerationSpec, python: str, cache_gb: int) -> None:
        environment = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(WORKERS)}
        if cache_gb:
            environment["VLLM_CPU_KVCACHE_SPACE"] = str(cache_gb)
        super().__init__(
            spec,
            Capabilities(
                structures=frozenset({"json_schema", "json_object", "regex", "choice", "grammar"}),
                adapters=frozenset(spec.adapters),
                tools=bool(spec.tool_parser),
            ),
            [python or sys.executable, "-P", "-m", "forebay_worker.vllm"],
            environment,
            "vLLM (by generation.vllm_python)",
        )

    def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationDelta, None]:
        """See GenerationEngine."""
        chat = request.chat
        if chat and chat.tools and chat.tool_mode != "none" and not self.capabilities.tools:
            raise InvalidArgument.at(
                "tools", "this model has no tool_parser in its model.yaml", reason="NO_TOOL_PARSER"
            )
        return super().generate(request)
