"""vLLM, stepped by this process: `python -m forebay_worker.vllm SOCKET`, in the Python that has it.

The loop is vLLM's own LLMEngine.step, taken apart so that one step becomes one frame. On a CPU all
of the engine is in this process; elsewhere its core has a process of its own, as vLLM has it, and a
step waits for what that sends. Tool calls and reasoning are read by vLLM's own parsers.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from forebay_worker.loop import Refused, Row, failure, main, yield_to_front


class VllmStepper:
    """See loop.Stepper."""

    def __init__(self, spec: dict[str, Any]) -> None:
        from forebay_worker.vllm_requests import config_of
        from vllm.platforms import current_platform
        from vllm.v1.engine.llm_engine import LLMEngine

        self._spec = spec
        config = config_of(spec)
        self._engine = LLMEngine.from_vllm_config(config, stat_loggers=[], disable_log_stats=False)
        self._engine.logger_manager = None  # the numbers go to the server instead: see _count
        core = self._engine.engine_core
        #: Within this process alone: between two steps it can be looked into.
        self._scheduler: Any = getattr(getattr(core, "engine_core", None), "scheduler", None)
        self._config = config
        self._tokenizer: Any = self._engine.get_tokenizer()
        self._parser = self._parser_class()
        self._requests: dict[str, _Request] = {}
        self._stats: dict[str, float] = {}
        if current_platform.is_cpu():
            yield_to_front()

    def _parser_class(self) -> Any:
        spec = self._spec
        if not spec["tool_parser"] and not spec["reasoning_parser"]:
            return None
        from vllm.parser import ParserManager

        return ParserManager.get_parser(
            tool_parser_name=spec["tool_parser"] or None,
            reasoning_parser_name=spec["reasoning_parser"] or None,
            enable_auto_tools=bool(spec["tool_parser"]),
            model_name=spec["folder"],
            tokenizer=self._tokenizer,
        )

    def facts(self) -> dict[str, Any]:
        """See Stepper."""
        return {"kv_blocks": self._config.cache_config.num_gpu_blocks or 0}

    @property
    def busy(self) -> bool:
        """See Stepper. The scheduler has work after a request's end too: its worker's part of it."""
        if self._scheduler is not None:
            return self._scheduler.has_requests()
        return bool(self._requests)

    def add(self, request: dict[str, Any]) -> list[Row]:
        """See Stepper."""
        from forebay_worker.vllm_requests import adapter_of, chat_of, sampling_of
        from vllm.exceptions import VLLMClientError
        from vllm.inputs import TokensPrompt

        try:
            chat = chat_of(request) if self._parser is not None else None
            params = sampling_of(request, chat, self._parse_with(chat))
            number = self._engine.add_request(
                request["id"],
                TokensPrompt(prompt_token_ids=request["prompt_ids"]),
                params,
                lora_request=adapter_of(self._spec, request["adapter"]),
                priority=-request["priority"],
            )
        except (ValueError, VLLMClientError) as e:
            self._engine.abort_request([request["id"]])
            raise Refused(str(e)) from e
        self._requests[request["id"]] = _Request(self, request, chat, number)
        return []

    def _parse_with(self, chat: Any) -> Any:
        if chat is None or self._parser is None:
            return None
        return self._parser(self._tokenizer, chat.tools, model_config=self._config.model_config)

    def abort(self, identifier: str) -> list[Row]:
        """See Stepper. All that earlier steps brought is on its way already: the count is exact."""
        self._end(identifier)
        return [[identifier, "aborted"]]

    def _end(self, identifier: str) -> None:
        request = self._requests.pop(identifier, None)
        if request is not None:
            self._engine.abort_request([request.number], internal=True)

    def step(self) -> list[Row]:
        """See Stepper."""
        from vllm.v1.metrics.stats import IterationStats

        engine = self._engine
        outputs = engine.engine_core.get_output()
        if not outputs.outputs and self._scheduler is not None:
            time.sleep(0.0005)  # all wait for a grammar, say, which another thread compiles
        iteration = IterationStats() if outputs.outputs else None
        processor = engine.output_processor
        done = processor.process_outputs(
            outputs.outputs,
            engine_core_timestamp=outputs.timestamp,
            iteration_stats=iteration,
            weight_version=outputs.weight_version,
        )
        processor.update_scheduler_stats(outputs.scheduler_stats)
        engine.engine_core.abort_requests(done.reqs_to_abort)
        self._count(outputs.scheduler_stats, iteration)
        rows: list[Row] = []
        for out in done.request_outputs:
            request = self._requests.get(out.request_id)
            if request is None:
                continue
            try:
                request.rows(out, rows)
            except Exception as e:
                self._end(out.request_id)
                rows.append(failure(out.request_id, e))
                continue
            if out.finished:
                del self._requests[out.request_id]
        return rows

    def _count(self, scheduler: Any, iteration: Any) -> None:
        stats = self._stats
        if scheduler is not None:
            stats["running"] = scheduler.num_running_reqs
            stats["waiting"] = scheduler.num_waiting_reqs
            stats["kv_use"] = scheduler.kv_cache_usage
            prefix = scheduler.prefix_cache_stats
            if prefix is not None:
                self._add("prefix_queries", prefix.queries)
                self._add("prefix_hits", prefix.hits)
        if iteration is not None:
            self._add("num_generation_tokens", iteration.num_generation_tokens)
            self._add("num_prompt_tokens", iteration.num_prompt_tokens)
            self._add("num_preempted", iteration.num_preempted_reqs)

    def _add(self, name: str, value: float) -> None:
        self._stats[name] = self._stats.get(name, 0) + value

    def stats(self) -> dict[str, Any]:
        """See Stepper."""
        if self._scheduler is not None:
            self._count(self._scheduler.make_stats(), None)
        elif not self._requests:  # what the core said after the last request's end
            waiting = self._engine.engine_core.outputs_queue  # pyright: ignore
            while not waiting.empty():
                self.step()
        return self._stats


class _Request:
    """A request that the engine works on, with its `number` there."""

    def __init__(
        self, stepper: VllmStepper, request: dict[str, Any], chat: Any, number: str
    ) -> None:
        from forebay_worker.vllm_answers import Answer

        plain = request["structure"] is not None
        self._answers = [
            Answer(
                request, chat, i, None if plain else stepper._parse_with(chat), stepper._tokenizer
            )
            for i in range(request["sampling"]["n"])
        ]
        self._id = request["id"]
        self.number = number
        self._first = True

    def rows(self, out: Any, rows: list[Row]) -> None:
        """Add the rows of one step's output."""
        if self._first:
            self._first = False
            rows.append([self._id, "prompt", out.num_cached_tokens or 0])
        for answer in out.outputs:
            rows.append(self._answers[answer.index].row(answer))


if __name__ == "__main__":
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    main(int(sys.argv[1]), VllmStepper)
