"""TensorRT-LLM, in its own process and environment. Not run yet: it needs a GPU and the package."""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing

from forebay.errors import FailedPrecondition, InvalidArgument

from forebay_server.core.generation import (
    Capabilities,
    GenerationDelta,
    GenerationRequest,
    GenerationSpec,
)
from forebay_server.generation.hermes import HermesParser
from forebay_server.generation.process import WORKERS, ProcessEngine

#: The library has no parsers of its own; this family's is here.
PARSERS = ("", "hermes")


class TensorRtEngine(ProcessEngine):
    """See interfaces.GenerationEngine.

    Args:
        python: interpreter that has tensorrt_llm; empty = this one.
    """

    def __init__(self, spec: GenerationSpec, python: str) -> None:
        if spec.tool_parser not in PARSERS or spec.reasoning_parser:
            raise FailedPrecondition(
                "model.yaml: with TensorRT-LLM generation.tool_parser is hermes or nothing, and "
                "there is no reasoning_parser",
                reason="MODEL_REJECTED",
            )
        super().__init__(
            spec,
            Capabilities(
                structures=frozenset({"json_schema", "json_object", "regex", "choice", "grammar"}),
                adapters=frozenset(spec.adapters),
                tools=bool(spec.tool_parser),
                logit_bias=False,
            ),
            [python or sys.executable, "-P", "-m", "forebay_worker.trtllm"],
            {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(WORKERS)},
            "TensorRT-LLM (by generation.trtllm_python)",
        )

    def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationDelta, None]:
        """See GenerationEngine. Tool calls are read, not enforced: `required` is refused."""
        chat = request.chat
        if chat is None or not chat.tools or chat.tool_mode == "none":
            return super().generate(request)
        if not self.capabilities.tools:
            raise InvalidArgument.at(
                "tools", "this model has no tool_parser in its model.yaml", reason="NO_TOOL_PARSER"
            )
        if chat.tool_mode != "auto" or any(t.strict for t in chat.tools):
            raise InvalidArgument.at(
                "tool_choice", "this model's engine cannot enforce calls; allowed are auto, none"
            )
        return _with_calls(super().generate(request), request.structure is None)


async def _with_calls(
    deltas: AsyncGenerator[GenerationDelta, None], parse: bool
) -> AsyncGenerator[GenerationDelta, None]:
    """The deltas with tool calls taken out of their text."""
    parsers: dict[int, HermesParser] = {}
    async with aclosing(deltas):
        async for delta in deltas:
            if parse:
                parser = parsers.setdefault(delta.index, HermesParser())
                text, pieces = parser.feed(delta.text)
                if delta.finish_reason is not None:
                    rest, more = parser.finish()
                    text, pieces = text + rest, [*pieces, *more]
                    if parser.calls and delta.finish_reason == "stop":
                        delta.finish_reason = "tool_calls"
                delta.text, delta.tool_calls = text, pieces
            yield delta
