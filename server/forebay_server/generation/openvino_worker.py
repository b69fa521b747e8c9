"""OpenVINO GenAI with continuous batching, in a process of its own: see process.py for the frames.

One thread steps the pipeline for all requests and writes what the step brought; another reads
commands. The answers' text, stop strings and tool calls are made here, since the pipeline gives
tokens.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import queue
import socket
import struct
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import openvino_genai  # pyright: ignore[reportMissingImports]

from forebay_server.generation.detokenize import Detokenizer
from forebay_server.generation.hermes import CLOSE, OPEN, HermesParser
from forebay_server.generation.json_regex import regex_of

log = logging.getLogger("forebay.generation")

#: Gigabytes of key-value cache, unless engine_options say `kv_cache_gb`.
KV_CACHE_GB = 1
#: The engine fills all cores; those that hand its tokens on need little and go first.
NICENESS = 5
#: Blank characters in a row after which a JSON answer is given up.
MAX_BLANK = 64
MAX_FRAME = 256 << 20
make: Any = openvino_genai.StructuredOutputConfig


class Refused(ValueError):
    """The request cannot run; `path` is the field that is to blame."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(message)
        self.path = path


class Broken(RuntimeError):
    """The answer has lost its form."""


class Stepper:
    """The pipeline with its requests. One thread runs all of it."""

    def __init__(self, spec: Mapping[str, Any]) -> None:
        from tokenizers import Tokenizer

        self._spec = spec
        folder = Path(spec["folder"])
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.eos = tuple(spec["eos_token_ids"])
        self.running: dict[int, _Running] = {}
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

    def stats(self) -> dict[str, Any]:
        """Facts for metrics."""
        use = self._pipeline.get_metrics().cache_usage / 100 if self.running else 0.0
        return {"running": len(self.running), "kv_use": use}

    def add(self, request: dict[str, Any]) -> list[list[Any]]:
        """Begin a request; rows that say why it cannot."""
        try:
            run = _Running(next(self._ids), request, self._config(request), self)
            self._start(run)
        except Refused as e:
            return [[request["id"], "error", "invalid", str(e), e.path]]
        return []

    def _start(self, run: _Running) -> None:
        ids = np.array([run.request["prompt_ids"]], np.int64)
        try:
            run.handle = self._pipeline.add_request(
                run.number, openvino_genai.openvino.Tensor(ids), run.config
            )
        except Exception as e:
            raise Refused("request", _reason(e)) from None
        self.running[run.number] = run
        self._numbers[run.request["id"]] = run.number

    def abort(self, identifier: str) -> list[list[Any]]:
        """Stop a request."""
        run = self.running.pop(self._numbers.pop(identifier, 0), None)
        if run is not None:
            run.handle.cancel()
        return [[identifier, "aborted"]]

    def step(self) -> list[list[Any]]:
        """One step, and the rows that it brought."""
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

    def _forget(self, run: _Running) -> None:
        self.running.pop(run.number, None)
        self._numbers.pop(run.request["id"], None)

    def _fail(
        self, run: _Running, kind: str, message: str, path: str = "request"
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
            raise Refused("sampling", _reason(e)) from None
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
    """The grammar of a tool's arguments."""
    schema = function["parameters"] or {"type": "object"}
    regex = regex_of(schema)
    return make.Regex(regex) if regex else make.JSONSchema(json.dumps(schema))


class _Running:
    """One request in the pipeline."""

    def __init__(self, number: int, request: dict[str, Any], config: Any, stepper: Stepper) -> None:
        self.number = number
        self.request = request
        self.config = config
        self.handle: Any = None
        self.read = False
        self.constrained = config.structured_output_config is not None
        self.stopped_early = False
        self.open = request["sampling"]["n"]
        self._stepper = stepper
        self._answers: dict[int, _Answer] = {}

    def take(self, outputs: Mapping[int, Any]) -> list[list[Any]]:
        """Rows of what the pipeline read out."""
        rows = []
        for sequence, output in sorted(outputs.items()):
            answer = self._answers.get(sequence)
            if answer is None:
                index = len(self._answers)
                answer = self._answers[sequence] = _Answer(index, self.request, self._stepper)
            if answer.ended:
                continue
            rows.append(answer.take(output))
            if answer.ended:
                self.open -= 1
                self.stopped_early |= answer.stopped_early
        return rows


class _Answer:
    """Text, stop strings and tool calls of one answer."""

    def __init__(self, index: int, request: dict[str, Any], stepper: Stepper) -> None:
        s, chat = request["sampling"], request["chat"]
        self._id = request["id"]
        self._index = index
        self._tokenizer = stepper.tokenizer
        self._silent = {*s["stop_token_ids"], *(() if s["ignore_eos"] else stepper.eos)}
        self._logprobs = s["logprobs"] is not None
        self._text = Detokenizer(stepper.tokenizer, s["stop"], s["min_tokens"])
        structure = request["structure"]
        self._json = structure is not None and structure[0] in ("json_schema", "json_object")
        self._blank = 0
        tools = chat is not None and chat["tools"] and chat["tool_mode"] != "none"
        self._parser = HermesParser() if tools and structure is None else None
        self.ended = False
        self.stopped_early = False

    def take(self, output: Any) -> list[Any]:
        """The row of one output of the pipeline."""
        ids = list(output.generated_ids)
        reason = output.finish_reason.name
        said = ids[:-1] if reason == "STOP" and ids and ids[-1] in self._silent else ids
        text = self._text.feed(said)
        finish, stop, calls, logprobs = None, "", [], []
        if self._logprobs:
            pairs = zip(said, output.generated_log_probs, strict=False)
            logprobs = [[[i, self._tokenizer.decode([i], False), p], []] for i, p in pairs]
        if self._text.stopped_by:
            finish, stop = "stop", self._text.stopped_by
            self.stopped_early = reason == "NONE"
        elif reason != "NONE":
            finish = "stop" if reason == "STOP" else "length"
            text += self._text.rest()
        self.ended = finish is not None
        if self._json:
            # The grammar allows any white space in JSON, and a model may say line breaks for ever.
            self._blank = 0 if text.strip() else self._blank + len(text)
            if self._blank > MAX_BLANK:
                raise Broken("the model lost itself in white space")
        if self._parser is not None:
            text, pieces = self._parser.feed(text)
            if self.ended:
                rest, more = self._parser.finish()
                text, pieces = text + rest, [*pieces, *more]
                if self._parser.calls and finish == "stop":
                    finish = "tool_calls"
            calls = [[p.call, p.id, p.name, p.arguments] for p in pieces]
        row = [self._id, "delta", self._index, text, len(ids), "", calls, logprobs, finish, stop, 0]
        while not row[-1]:
            row.pop()
        return row


def serve(sock: socket.socket) -> None:
    """Until the server closes the socket."""
    commands: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    encode = msgspec.msgpack.Encoder().encode

    def send(message: dict[str, Any]) -> None:
        data = encode(message)
        sock.sendall(struct.pack("<I", len(data)) + data)

    def read() -> dict[str, Any]:
        (size,) = struct.unpack("<I", exactly(4))
        if size > MAX_FRAME:
            raise EOFError
        return msgspec.msgpack.decode(exactly(size))

    def exactly(size: int) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            part = sock.recv(size - len(parts))
            if not part:
                raise EOFError
            parts += part
        return bytes(parts)

    def reading() -> None:
        try:
            while True:
                commands.put(read())
        except (OSError, EOFError):
            commands.put(None)

    spec = read()["spec"]
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, NICENESS)  # the pipeline's threads inherit it
    try:
        stepper = Stepper(spec)
    except Exception as e:
        send({"op": "failed", "message": _reason(e)})
        return
    send({"op": "ready"})
    threading.Thread(target=reading, daemon=True).start()
    while True:
        rows: list[list[Any]] = []
        while True:
            try:
                command = commands.get(block=not stepper.running and not rows)
            except queue.Empty:
                break
            if command is None:
                return
            if command["op"] == "generate":
                rows += stepper.add(command["request"])
            elif command["op"] == "abort":
                rows += stepper.abort(command["id"])
            elif command["op"] == "stats":
                send({"op": "stats", "stats": stepper.stats()})
        if stepper.running:
            rows += stepper.step()
        if rows:
            send({"op": "step", "deltas": rows})


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        serve(socket.socket(fileno=int(sys.argv[1])))
    os._exit(0)  # nothing is left to do; the pipeline's own end takes seconds
