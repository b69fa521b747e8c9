"""From Forebay's words to vLLM's: a model's options, a conversation, sampling parameters."""

from __future__ import annotations

import os
from typing import Any

import torch
from forebay_worker.loop import Refused
from vllm import AsyncEngineArgs, SamplingParams
from vllm.config import StructuredOutputsConfig, VllmConfig
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

#: Structure kinds whose name in vLLM is another.
KINDS = {"json_schema": "json"}


def config_of(spec: dict[str, Any]) -> VllmConfig:
    """The engine's configuration. Raises Refused."""
    if current_platform.is_cpu():
        # Scheduler, model and output in one process. Else three processes share the cores, and two
        # of them spin while they wait for each other (docs/adr/0022).
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        if "OMP_NUM_THREADS" not in os.environ:
            # One core is for those that pass the tokens on. A computing thread that loses its core
            # to them for a moment would stop all others at their next barrier.
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) - 1))
    options = dict(spec["options"])
    if int(options.get("data_parallel_size", 1)) > 1:
        raise Refused("data_parallel_size: one process has one engine; serve replicas instead")
    if spec["adapters"]:
        options.setdefault("enable_lora", True)
        options.setdefault("max_loras", len(spec["adapters"]))
    # Else a model may say line breaks for ever between two names of a JSON object.
    structured = StructuredOutputsConfig(backend="xgrammar", disable_any_whitespace=True)
    options.setdefault("structured_outputs_config", structured)
    args = AsyncEngineArgs(
        model=spec["folder"],
        max_model_len=spec["context_length"],
        max_num_seqs=spec["max_running"],
        **options,
    )
    return args.create_engine_config()


def adapter_of(spec: dict[str, Any], name: str) -> LoRARequest | None:
    """The LoRA adapter of this name."""
    if not name:
        return None
    names = sorted(spec["adapters"])
    return LoRARequest(name, names.index(name) + 1, spec["adapters"][name])


def chat_of(request: dict[str, Any]) -> ChatCompletionRequest | None:
    """vLLM's view of a conversation, for its parsers."""
    chat = request["chat"]
    if chat is None:
        return None
    choice: Any = chat["tool_mode"]
    if choice == "named":
        choice = {"type": "function", "function": {"name": chat["tool_name"]}}
    body: dict[str, Any] = {"model": "model", "messages": chat["messages"]}
    if chat["tools"]:
        body |= {
            "tools": chat["tools"],
            "tool_choice": choice,
            "parallel_tool_calls": chat["parallel_tool_calls"],
        }
    return ChatCompletionRequest(**body)


def sampling_of(
    request: dict[str, Any], chat: ChatCompletionRequest | None, parser: Any
) -> SamplingParams:
    """Sampling parameters; the parser of an answer says what its grammar for tool calls is."""
    s = request["sampling"]
    structured = None
    skip_special = True
    if request["structure"] is not None:
        kind, value = request["structure"]
        value = True if kind == "json_object" else value
        structured = StructuredOutputsParams(**{KINDS.get(kind, kind): value})
    elif chat is not None and parser is not None:
        adjusted = parser.adjust_request(chat)
        structured = adjusted.extract_structured_outputs()
        skip_special = adjusted.skip_special_tokens
    return SamplingParams(
        n=s["n"],
        max_tokens=s["max_tokens"],
        min_tokens=s["min_tokens"],
        temperature=s["temperature"],
        top_p=s["top_p"],
        top_k=s["top_k"],
        min_p=s["min_p"],
        frequency_penalty=s["frequency_penalty"],
        presence_penalty=s["presence_penalty"],
        repetition_penalty=s["repetition_penalty"],
        seed=s["seed"],
        stop=s["stop"] or None,
        stop_token_ids=s["stop_token_ids"] or None,
        ignore_eos=s["ignore_eos"],
        logprobs=s["logprobs"],
        logit_bias={int(k): v for k, v in s["logit_bias"].items()} or None,
        structured_outputs=structured,
        skip_special_tokens=skip_special,
        output_kind=RequestOutputKind.DELTA,
    )
