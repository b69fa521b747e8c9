"""OpenVINO GenAI with continuous batching, in a process of its own; its loop is that of all engines."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openvino_genai

from forebay_server.core.structure import enforceable
from forebay_server.generation.hermes import CLOSE, OPEN
from forebay_server.generation.json_regex import regex_of
from forebay_server.generation.openvino_answers import Broken, Running
from forebay_server.generation.workers.forebay_worker.loop import NICENESS, Refused, main

log = logging.getLogger("forebay.generation")

#: Gigabytes of key-value cache, unless engine_options say `kv_cache_gb`.
KV_CACHE_GB = 1
make: Any = openvino_genai.StructuredOutputConfig


class OpenVinoStepper:
    """See loop.Stepper."""

    def __init__(self, spec: Mapping[str, Any]) -> None:
        from tokenizers import Tokenizer

        self._spec = spec
        folder = Path(spec["folder"])
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.eos = tuple(spec["eos_token_ids"])
        self.running: dict[int, Running] = {}
        self._numbers: dict[str, int] = {}
        self._ids = itertools.count(1)
        self._build()

    def _build(self) -> None:
        options = self._spec["options"]
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = int(options.get("kv_cache_gb", KV_CACHE_GB))
        scheduler.max_num_seqs = self._spec["max_running"]
        scheduler.enable_prefix_caching = bool(options.get("prefix_caching", True))
        scheduler.dynamic_split_fuse = True
        if "max_num_batched_tokens" in options:
            scheduler.max_num_batched_tokens = int(options["max_num_batched_tokens"])
        self._pipeline: Any = openvino_genai.ContinuousBatchingPipeline(
            self._spec["folder"],
            scheduler,
            str(options.get("device", "CPU")),
            dict(options.get("properties", {})),
        )

    @property
    def busy(self) -> bool:
        """See Stepper."""
        return bool(self.running)

    def facts(self) -> dict[str, Any]:
        """See Stepper."""
        return {}

    def stats(self) -> dict[str, Any]:
        """See Stepper."""
        use = self._pipeline.get_metrics().cache_usage / 100 if self.running else 0.0
        return {"running": len(self.running), "kv_use": use}

    def add(self, request: dict[str, Any]) -> list[list[Any]]:
        """See Stepper."""
        config = self._config(request)
        self._start(Running(next(self._ids), request, config, self.tokenizer, self.eos))
        return []

    def _start(self, run: Running) -> None:
        ids = np.array([run.request["prompt_ids"]], np.int64)
        try:
            run.handle = self._pipeline.add_request(
                run.number, openvino_genai.openvino.Tensor(ids), run.config
            )
        except Exception as e:
            raise Refused(_reason(e)) from None
        self.running[run.number] = run
        self._numbers[run.request["id"]] = run.number

    def abort(self, identifier: str) -> list[list[Any]]:
        """See Stepper."""
        run = self.running.pop(self._numbers.pop(identifier, 0), None)
        if run is not None:
            run.handle.cancel()
        return [[identifier, "aborted"]]

    def step(self) -> list[list[Any]]:
        """See Stepper."""
        try:
            self._pipeline.step()
        except Exception as e:
            return self._recover(e)
        rows: list[list[Any]] = []
        for run in list(self.running.values()):
            if not run.handle.can_read():
                if run.handle.get_status().name == "IGNORED":
                    rows += self._fail(run, "internal", "the key-value cache has no room")
                continue
            if not run.read:
                run.read = True
                rows.append([run.request["id"], "prompt", 0, 0])
            try:
                rows += run.take(run.handle.read())
            except Broken as e:
                run.handle.cancel()
                rows += self._fail(run, "broken", str(e))
                continue
            if not run.open:
                self._forget(run)
                if run.stopped_early:
                    run.handle.cancel()
        return rows

    def _forget(self, run: Running) -> None:
        self.running.pop(run.number, None)
        self._numbers.pop(run.request["id"], None)

    def _fail(
        self, run: Running, kind: str, message: str, path: str = "request"
    ) -> list[list[Any]]:
        self._forget(run)
        return [[run.request["id"], "error", kind, message, path]]

    def _recover(self, error: Exception) -> list[list[Any]]:
        """A step failed, and would fail for ever: the pipeline keeps what is to blame.

        Grammars are compiled in a request's first step, so newcomers with one are to blame and are
        refused. The pipeline is built anew; requests that have said nothing yet start again there,
        the others fail.
        """
        reason = _reason(error)
        log.error("a step failed, the pipeline is built anew: %s", reason)
        runs, self.running = list(self.running.values()), {}
        self._numbers.clear()
        self._pipeline = None
        self._build()
        rows: list[list[Any]] = []
        for run in runs:
            if run.read:
                rows += self._fail(run, "dead", reason)
            elif run.constrained:
                rows += self._fail(run, "invalid", reason, "response_format")
            else:
                self._start(run)
        return rows

    def _config(self, request: dict[str, Any]) -> Any:
        s = request["sampling"]
        greedy = s["temperature"] == 0
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = s["max_tokens"]
        config.min_new_tokens = s["min_tokens"]
        config.ignore_eos = s["ignore_eos"]
        config.stop_token_ids = {*s["stop_token_ids"], *(() if s["ignore_eos"] else self.eos)}
        config.do_sample = not greedy or s["n"] > 1
        if greedy and s["n"] > 1:  # the pipeline takes several answers from sampling alone
            config.top_k = 1
        elif not greedy:
            config.temperature = s["temperature"]
            config.top_p = s["top_p"]
            if s["top_k"]:
                config.top_k = s["top_k"]
            if s["min_p"]:
                config.min_p = s["min_p"]
        config.num_return_sequences = s["n"]
        config.frequency_penalty = s["frequency_penalty"]
        config.presence_penalty = s["presence_penalty"]
        config.repetition_penalty = s["repetition_penalty"]
        if s["logprobs"] is not None:
            config.logprobs = 1
        # Unseeded requests must differ: the pipeline's own default is one fixed seed.
        seed = s["seed"]
        config.rng_seed = seed if seed is not None else int.from_bytes(np.random.bytes(4))
        structured = _structured(request)
        if structured is not None:
            config.structured_output_config = structured
        try:
            config.validate()
        except Exception as e:
            raise Refused(_reason(e), "sampling") from None
        return config


def _reason(error: Exception) -> str:
    """The library's words, without its source's paths."""
    return str(error).strip().partition(" failed at ")[0].rsplit(": ", 1)[-1][-200:]


def _structured(request: dict[str, Any]) -> Any:
    """What the grammar engine is to enforce; None for free text."""
    if request["structure"] is not None:
        kind, value = request["structure"]
        if kind == "json_schema":
            return make(json_schema=value)
        if kind == "json_object":
            return make(json_schema='{"type": "object"}')
        if kind == "regex":
            return make(regex=value)
        options = " | ".join(json.dumps(c, ensure_ascii=False) for c in value)
        return make(grammar=f"root ::= {options}")
    chat = request["chat"]
    if chat is None or not chat["tools"] or chat["tool_mode"] == "none":
        return None
    mode, single = chat["tool_mode"], not chat["parallel_tool_calls"]
    functions = [t["function"] for t in chat["tools"]]
    if mode == "named":
        functions = [f for f in functions if f["name"] == chat["tool_name"]]
    tags = [
        make.Tag(
            begin=f'{OPEN}\n{{"name": {json.dumps(f["name"])}, "arguments": ',
            content=_arguments(f),
            end=f"}}\n{CLOSE}",
        )
        for f in functions
    ]
    if mode in ("required", "named"):
        grammar = make.TagsWithSeparator(
            tags=tags,
            separator="\n",
            at_least_one=True,
            stop_after_first=single or mode == "named",
        )
        return make(structural_tags_config=grammar)
    if single or any(f.get("strict") for f in functions):
        grammar = make.TriggeredTags(triggers=[OPEN], tags=tags, stop_after_first=single)
        return make(structural_tags_config=grammar)
    return None


def _arguments(function: dict[str, Any]) -> Any:
    """The grammar of a tool's arguments: any object where the schema cannot be enforced. A grammar that
    does not compile would stop all answers."""
    schema = function["parameters"] or {"type": "object"}
    if not enforceable(schema):
        schema = {"type": "object"}
    regex = regex_of(schema)
    return make.Regex(regex) if regex else make.JSONSchema(json.dumps(schema))


def build(spec: dict[str, Any]) -> OpenVinoStepper:
    """The engine. Raises Refused with the library's words."""
    with contextlib.suppress(OSError):  # a sandbox may forbid it, and it is a courtesy
        os.nice(NICENESS)  # the pipeline's threads inherit it
    try:
        return OpenVinoStepper(spec)
    except Exception as e:
        raise Refused(_reason(e)) from None


if __name__ == "__main__":
    main(int(sys.argv[1]), build)
