"""Language models on the CPU without torch: OpenVINO GenAI with continuous batching.

One thread steps the pipeline for all requests; what a step brings goes to the event loop at once.
The answers' text, stop strings and tool calls are made here, since the pipeline gives tokens.
Why this engine: docs/adr/0020.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import queue
import threading
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from forebay.errors import (
    FailedPrecondition,
    ForebayError,
    Internal,
    InvalidArgument,
    Unavailable,
)

from forebay_server.core.generation import (
    Capabilities,
    GenerationDelta,
    GenerationRequest,
    GenerationSpec,
    TokenProbability,
    ToolSpec,
)
from forebay_server.generation.channel import Channel
from forebay_server.generation.detokenize import Detokenizer
from forebay_server.generation.hermes import CLOSE, OPEN, HermesParser
from forebay_server.generation.json_regex import regex_of

log = logging.getLogger("forebay.generation")

#: Gigabytes of key-value cache, unless engine_options say `kv_cache_gb`.
KV_CACHE_GB = 1
#: Seconds for an abort to be acknowledged: the time of the longest step.
ABORT_S = 10.0
NICENESS = 5
#: Blank characters in a row after which a JSON answer is given up.
MAX_BLANK = 64
OPTIONS = ("kv_cache_gb", "max_num_batched_tokens", "device", "properties", "prefix_caching")


class OpenVinoEngine:
    """See interfaces.GenerationEngine."""

    def __init__(self, spec: GenerationSpec, tokenizer: Any, eos: tuple[int, ...]) -> None:
        unknown = sorted(set(spec.options) - set(OPTIONS))
        if unknown:
            raise FailedPrecondition(
                f"model.yaml: engine_options: {unknown[0]!r} is not known; "
                f"known are {', '.join(OPTIONS)}",
                reason="MODEL_REJECTED",
            )
        self._spec = spec
        self._tokenizer = tokenizer
        self._eos = eos
        self.capabilities = Capabilities(
            # Grammars of the caller cannot be checked beforehand, and a bad one stops all.
            structures=frozenset({"json_schema", "json_object", "regex", "choice"}),
            logit_bias=False,
            top_logprobs=0,
        )
        self._commands: queue.SimpleQueue[tuple[str, Any] | None] = queue.SimpleQueue()
        self._running: dict[int, _Running] = {}
        self._ids = itertools.count(1)
        self._pipeline: Any = None
        self._genai: Any = None
        self._thread: threading.Thread | None = None
        self._dead: BaseException | None = None
        self._closed = False
        self._building = threading.Lock()

    def load(self) -> None:
        """See GenerationEngine."""
        try:
            import openvino_genai
        except ImportError:
            raise FailedPrecondition(
                "the embedded engine is not installed: pip install 'forebay[openvino]'",
                reason="MODEL_REJECTED",
            ) from None
        self._genai = openvino_genai
        built: queue.SimpleQueue[ForebayError | None] = queue.SimpleQueue()
        self._thread = threading.Thread(
            target=self._serve, args=(built,), name=f"generate-{self._spec.model}", daemon=True
        )
        self._thread.start()
        fault = built.get()
        if fault is not None:
            self._thread = None
            raise fault

    def _build(self) -> None:
        options = self._spec.options
        scheduler = self._genai.SchedulerConfig()
        scheduler.cache_size = int(options.get("kv_cache_gb", KV_CACHE_GB))
        scheduler.max_num_seqs = self._spec.max_running
        scheduler.enable_prefix_caching = bool(options.get("prefix_caching", True))
        scheduler.dynamic_split_fuse = True
        if "max_num_batched_tokens" in options:
            scheduler.max_num_batched_tokens = int(options["max_num_batched_tokens"])
        try:
            self._pipeline = self._genai.ContinuousBatchingPipeline(
                self._spec.folder,
                scheduler,
                str(options.get("device", "CPU")),
                dict(options.get("properties", {})),
            )
        except Exception as e:
            raise FailedPrecondition(
                f"openvino_model.xml cannot be loaded: {str(e).strip()[:300]}",
                reason="MODEL_REJECTED",
            ) from None

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationDelta, None]:
        """See GenerationEngine."""
        self.check_health()
        number = next(self._ids)
        config = self._config(request)
        loop = asyncio.get_running_loop()
        run = _Running(
            number,
            request,
            config,
            Channel(request.sampling.n, self._spec.stream_interval_s),
            loop,
            self,
        )
        self._commands.put(("add", run))
        try:
            async for delta in run.channel.read():
                yield delta
        finally:
            if not run.channel.done or run.open:
                run.aborted = True
                self._commands.put(("abort", run))
                # The step that is running may still count tokens: the tally is exact after it.
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(run.closed, ABORT_S)

    def _config(self, request: GenerationRequest) -> Any:
        s = request.sampling
        config = self._genai.GenerationConfig()
        config.max_new_tokens = s.max_tokens
        config.min_new_tokens = s.min_tokens
        config.ignore_eos = s.ignore_eos
        config.stop_token_ids = {*s.stop_token_ids, *(() if s.ignore_eos else self._eos)}
        config.do_sample = not s.greedy or s.n > 1
        if s.greedy and s.n > 1:  # the pipeline takes several answers from sampling alone
            config.top_k = 1
        elif not s.greedy:
            config.temperature = s.temperature
            config.top_p = s.top_p
            if s.top_k:
                config.top_k = s.top_k
            if s.min_p:
                config.min_p = s.min_p
        config.num_return_sequences = s.n
        config.frequency_penalty = s.frequency_penalty
        config.presence_penalty = s.presence_penalty
        config.repetition_penalty = s.repetition_penalty
        if s.logprobs is not None:
            config.logprobs = 1
        # Unseeded requests must differ: the pipeline's own default is one fixed seed.
        config.rng_seed = s.seed if s.seed is not None else int.from_bytes(np.random.bytes(4))
        structured = self._structured(request)
        if structured is not None:
            config.structured_output_config = structured
        try:
            config.validate()
        except Exception as e:
            reason = str(e).strip().partition(" failed at ")[0][-200:]
            raise InvalidArgument.at("sampling", reason) from None
        return config

    def _structured(self, request: GenerationRequest) -> Any:
        """What the grammar engine is to enforce; None for free text."""
        make = self._genai.StructuredOutputConfig
        wanted = request.structure
        if wanted is not None:
            if wanted.kind == "json_schema":
                regex = regex_of(json.loads(str(wanted.value)))
                return make(regex=regex) if regex else make(json_schema=wanted.value)
            if wanted.kind == "json_object":
                return make(json_schema='{"type": "object"}')
            if wanted.kind == "regex":
                return make(regex=wanted.value)
            return make(grammar=choice_grammar(wanted.value))
        chat = request.chat
        if chat is None or not chat.tools or chat.tool_mode == "none":
            return None
        named = [t for t in chat.tools if chat.tool_mode != "named" or t.name == chat.tool_name]
        tags = [
            make.Tag(
                begin=f'{OPEN}\n{{"name": {json.dumps(t.name)}, "arguments": ',
                content=self._arguments(t),
                end=f"}}\n{CLOSE}",
            )
            for t in named
        ]
        single = not chat.parallel_tool_calls
        if chat.tool_mode in ("required", "named"):
            grammar = make.TagsWithSeparator(
                tags=tags,
                separator="\n",
                at_least_one=True,
                stop_after_first=single or chat.tool_mode == "named",
            )
            return make(structural_tags_config=grammar)
        if any(t.strict for t in named) or single:
            grammar = make.TriggeredTags(triggers=[OPEN], tags=tags, stop_after_first=single)
            return make(structural_tags_config=grammar)
        return None

    def _arguments(self, tool: ToolSpec) -> Any:
        """The grammar of a tool's arguments."""
        make = self._genai.StructuredOutputConfig
        schema = dict(tool.parameters) or {"type": "object"}
        regex = regex_of(schema)
        return make.Regex(regex) if regex else make.JSONSchema(json.dumps(schema))

    # The engine's thread.

    def _serve(self, built: queue.SimpleQueue[ForebayError | None]) -> None:
        # The threads that the pipeline makes here inherit this. They fill all cores, and the event
        # loop, which hands their tokens on, would wait for a whole slice of each.
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        try:
            self._build()
        except ForebayError as e:
            built.put(e)
            return
        built.put(None)
        try:
            while not self._closed:
                self._take_commands()
                if self._running:
                    try:
                        self._pipeline.step()
                    except Exception as e:
                        self._recover(e)
                        continue
                    self._deliver()
        except BaseException as e:
            log.exception("the generation engine of %s stopped", self._spec.model)
            self._dead = e
            error = Unavailable("the model's engine stopped", reason="ENGINE_DIED", retry_after_s=1)
            for run in list(self._running.values()):
                run.fail(error)
                run.close()
            self._running.clear()

    def _recover(self, error: Exception) -> None:
        """A step failed, and would fail for ever: the pipeline keeps what is to blame.

        Grammars are compiled in a request's first step, so newcomers with one are to blame and are
        refused. The pipeline is built anew; requests that have said nothing yet start again there,
        the others fail as Unavailable.
        """
        reason = str(error).strip().rsplit(": ", 1)[-1][:200]
        log.error("a step of %s failed, its pipeline is built anew: %s", self._spec.model, reason)
        runs, self._running = list(self._running.values()), {}
        with self._building:
            self._pipeline = None
            self._build()
        for run in runs:
            if run.read:
                run.fail(
                    Unavailable("the model's engine failed", reason="ENGINE_DIED", retry_after_s=1)
                )
            elif run.constrained:
                run.fail(InvalidArgument.at("response_format", f"the engine refuses it: {reason}"))
            else:
                self._add(run)

    def _take_commands(self) -> None:
        """New requests and aborts; waits when there is nothing else to do."""
        while True:
            try:
                command = self._commands.get(block=not self._running)
            except queue.Empty:
                return
            if command is None:
                self._closed = True
                return
            kind, what = command
            if kind == "add":
                self._add(what)
            else:
                if self._running.pop(what.number, None) is not None:
                    what.handle.cancel()
                what.close()

    def _add(self, run: _Running) -> None:
        if run.aborted:
            return
        ids = np.array([run.request.prompt_ids], np.int64)
        try:
            run.handle = self._pipeline.add_request(
                run.number, self._genai.openvino.Tensor(ids), run.config
            )
        except Exception as e:
            run.fail(
                InvalidArgument.at("request", f"the engine refuses it: {str(e).strip()[:300]}")
            )
            return
        self._running[run.number] = run

    def _deliver(self) -> None:
        """Give each request what the step brought; one wake-up of each loop for all of them."""
        status = self._genai.GenerationStatus if hasattr(self._genai, "GenerationStatus") else None
        posts: dict[asyncio.AbstractEventLoop, list[tuple[Channel, GenerationDelta]]] = {}
        for number, run in list(self._running.items()):
            if not run.handle.can_read():
                if status is not None and run.handle.get_status() == status.IGNORED:
                    del self._running[number]
                    run.fail(
                        Unavailable(
                            "the key-value cache has no room", reason="NO_ROOM", retry_after_s=1
                        )
                    )
                continue
            run.read = True
            run.request.tally.prompt = len(run.request.prompt_ids)
            try:
                deltas = run.take(run.handle.read())
            except Internal as e:
                del self._running[number]
                run.handle.cancel()
                run.fail(e)
                continue
            posts.setdefault(run.loop, []).extend((run.channel, d) for d in deltas)
            if not run.open:
                del self._running[number]
                run.handle.cancel() if run.stopped_early else None
        for loop, batch in posts.items():
            post(loop, batch)

    def check_health(self) -> None:
        """See GenerationEngine."""
        with self._building:
            gone = self._dead is not None or self._closed or self._pipeline is None
        if gone:
            raise Unavailable("the model's engine stopped", reason="ENGINE_DIED", retry_after_s=1)

    def info(self) -> Mapping[str, Any]:
        """See GenerationEngine."""
        out: dict[str, Any] = {"providers": ["openvino"], "pid": 0, "running": len(self._running)}
        weights = Path(self._spec.folder) / "openvino_model.bin"
        out["memory_bytes"] = weights.stat().st_size if weights.exists() else 0
        pipeline = self._pipeline
        if pipeline is not None and not self._closed:
            metrics = pipeline.get_metrics()
            out["kv_use"] = metrics.cache_usage / 100
            out["memory_bytes"] += metrics.kv_cache_size_in_bytes
        return out

    def close(self) -> None:
        """See GenerationEngine."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._commands.put(None)
        thread.join(10)
        self._pipeline = None


def post(loop: asyncio.AbstractEventLoop, batch: list[tuple[Channel, GenerationDelta]]) -> None:
    """Hand deltas over to their loop."""

    def put() -> None:
        for channel, delta in batch:
            channel.put(delta)

    try:
        loop.call_soon_threadsafe(put)
    except RuntimeError:  # the loop is closed: nobody waits any more
        return


def choice_grammar(choices: tuple[str, ...] | str) -> str:
    """A grammar of these texts."""
    return "root ::= " + " | ".join(json.dumps(c, ensure_ascii=False) for c in choices)


class _Running:
    """One request in the pipeline. All but `aborted` belongs to the engine's thread."""

    def __init__(
        self,
        number: int,
        request: GenerationRequest,
        config: Any,
        channel: Channel,
        loop: asyncio.AbstractEventLoop,
        engine: OpenVinoEngine,
    ) -> None:
        self.number = number
        self.request = request
        self.config = config
        self.channel = channel
        self.loop = loop
        self.handle: Any = None
        self.aborted = False
        self.stopped_early = False
        self.read = False
        self.constrained = config.structured_output_config is not None
        self.closed: asyncio.Future[None] = loop.create_future()
        self._engine = engine
        self._answers: dict[int, _Answer] = {}
        self.open = request.sampling.n

    def close(self) -> None:
        """Say that an abort is done."""

        def say() -> None:
            if not self.closed.done():
                self.closed.set_result(None)

        self.loop.call_soon_threadsafe(say)

    def fail(self, error: BaseException) -> None:
        """End with an error."""
        self.loop.call_soon_threadsafe(self.channel.fail, error)
        self.open = 0

    def take(self, outputs: Mapping[int, Any]) -> list[GenerationDelta]:
        """Deltas of what the pipeline read out."""
        out = []
        for sequence, output in sorted(outputs.items()):
            answer = self._answers.get(sequence)
            if answer is None:
                answer = self._answers[sequence] = _Answer(
                    len(self._answers), self.request, self._engine._tokenizer, self._engine._eos
                )
            if answer.ended:
                continue
            out.append(answer.take(output))
            self.request.tally.completion += out[-1].tokens
            if answer.ended:
                self.open -= 1
                self.stopped_early |= answer.stopped_early
        return out


class _Answer:
    """Text, stop strings and tool calls of one answer."""

    def __init__(
        self, index: int, request: GenerationRequest, tokenizer: Any, eos: tuple[int, ...]
    ) -> None:
        s = request.sampling
        self._index = index
        self._tokenizer = tokenizer
        self._silent = {*s.stop_token_ids, *(() if s.ignore_eos else eos)}
        self._logprobs = s.logprobs is not None
        self._text = Detokenizer(tokenizer, s.stop, s.min_tokens)
        chat = request.chat
        tools = chat is not None and bool(chat.tools) and chat.tool_mode != "none"
        kind = request.structure.kind if request.structure is not None else ""
        self._json = kind in ("json_schema", "json_object")
        self._blank = 0
        self._parser = HermesParser() if tools and request.structure is None else None
        self.ended = False
        self.stopped_early = False

    def take(self, output: Any) -> GenerationDelta:
        """The delta of one output of the pipeline."""
        ids = list(output.generated_ids)
        reason = output.finish_reason.name
        said = ids[:-1] if reason == "STOP" and ids and ids[-1] in self._silent else ids
        text = self._text.feed(said)
        delta = GenerationDelta(self._index, tokens=len(ids))
        if self._logprobs:
            delta.logprobs = [
                self._probability(i, p)
                for i, p in zip(said, output.generated_log_probs, strict=False)
            ]
        if self._text.stopped_by:
            delta.finish_reason, delta.stop_reason = "stop", self._text.stopped_by
            self.stopped_early = reason == "NONE"
        elif reason != "NONE":
            delta.finish_reason = "stop" if reason == "STOP" else "length"
            text += self._text.rest()
        self.ended = delta.finish_reason is not None
        if self._json:
            # The grammar allows any white space in JSON, and a model may say line breaks for ever.
            self._blank = 0 if text.strip() else self._blank + len(text)
            if self._blank > MAX_BLANK:
                raise Internal("the model lost itself in white space", reason="OUTPUT_INVALID")
        if self._parser is None:
            delta.text = text
            return delta
        delta.text, pieces = self._parser.feed(text)
        if self.ended:
            rest, more = self._parser.finish()
            delta.text += rest
            pieces = [*pieces, *more]
            if self._parser.calls and delta.finish_reason == "stop":
                delta.finish_reason = "tool_calls"
        delta.tool_calls = pieces
        return delta

    def _probability(self, token: int, logprob: float) -> TokenProbability:
        text = self._tokenizer.decode([token], skip_special_tokens=False)
        return TokenProbability(token, text, logprob, text.encode())
