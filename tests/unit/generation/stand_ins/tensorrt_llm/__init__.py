"""A stand-in for NVIDIA's package, which needs a GPU: the documented names, and answers that count.

It holds the worker's code to that interface, and tells nothing about the real engine.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any


@dataclass(kw_only=True)
class SamplingParams:
    """The fields of the real one that the worker sets."""

    max_tokens: int = 32
    min_tokens: int | None = None
    n: int = 1
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    stop: Any = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    guided_decoding: Any = None


@dataclass
class CompletionOutput:
    """One answer, which grows."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class RequestOutput:
    """What generate_async returns: read by `async for`, ended by `abort`."""

    def __init__(self, prompt: list[int], params: SamplingParams) -> None:
        self.outputs = [CompletionOutput(i) for i in range(params.n)]
        self.cached_tokens = 0
        self._prompt, self._params = prompt, params
        self._aborted = False

    def abort(self) -> None:
        """Stop."""
        self._aborted = True

    def __aiter__(self) -> RequestOutput:
        return self

    async def __anext__(self) -> RequestOutput:
        if self.outputs[0].finish_reason is not None:
            raise StopAsyncIteration
        await asyncio.sleep(0.001)
        for out in self.outputs:
            if self._aborted:
                out.finish_reason = "cancelled"
                continue
            out.token_ids.append(len(out.token_ids))
            out.text += f"{len(out.token_ids)} "
            if len(out.token_ids) >= self._params.max_tokens:
                out.finish_reason = "length"
        return self


class _Tokenizer:
    def decode(self, ids: list[int]) -> str:
        return str(ids[0])


class LLM:
    """The engine."""

    def __init__(self, model: str, tokenizer: str, trust_remote_code: bool, **options: Any) -> None:
        assert not trust_remote_code
        if options.pop("unknown", None):
            raise ValueError("unknown option")
        self.tokenizer = _Tokenizer()

    def generate_async(
        self,
        inputs: dict[str, list[int]],
        sampling_params: SamplingParams,
        lora_request: Any = None,
        streaming: bool = False,
    ) -> RequestOutput:
        """Begin a request."""
        asyncio.get_running_loop()
        assert streaming
        if sampling_params.guided_decoding is not None:
            raise ValueError("no grammar engine")
        return RequestOutput(inputs["prompt_token_ids"], sampling_params)
