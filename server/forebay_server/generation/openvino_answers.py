"""Requests in OpenVINO's pipeline: their answers' text, stop strings and tool calls are made here,
since the pipeline gives tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from forebay_server.generation.detokenize import Detokenizer
from forebay_server.generation.hermes import HermesParser
from forebay_server.generation.workers.forebay_worker.loop import trimmed

#: Blank characters in a row after which a JSON answer is given up.
MAX_BLANK = 64


class Broken(RuntimeError):
    """The answer has lost its form."""


class Running:
    """One request in the pipeline."""

    def __init__(
        self, number: int, request: dict[str, Any], config: Any, tokenizer: Any, eos: Sequence[int]
    ) -> None:
        self.number = number
        self.request = request
        self.config = config
        self.handle: Any = None
        self.read = False
        self.constrained = config.structured_output_config is not None
        self.stopped_early = False
        self.open = request["sampling"]["n"]
        self._tokenizer = tokenizer
        self._eos = eos
        self._answers: dict[int, Answer] = {}

    def take(self, outputs: Mapping[int, Any]) -> list[list[Any]]:
        """Rows of what the pipeline read out."""
        rows = []
        for sequence, output in sorted(outputs.items()):
            answer = self._answers.get(sequence)
            if answer is None:
                index = len(self._answers)
                answer = self._answers[sequence] = Answer(
                    index, self.request, self._tokenizer, self._eos
                )
            if answer.ended:
                continue
            rows.append(answer.take(output))
            if answer.ended:
                self.open -= 1
                self.stopped_early |= answer.stopped_early
        return rows


class Answer:
    """Text, stop strings and tool calls of one answer."""

    def __init__(
        self, index: int, request: dict[str, Any], tokenizer: Any, eos: Sequence[int]
    ) -> None:
        s, chat = request["sampling"], request["chat"]
        self._id = request["id"]
        self._index = index
        self._tokenizer = tokenizer
        self._silent = {*s["stop_token_ids"], *(() if s["ignore_eos"] else eos)}
        self._logprobs = s["logprobs"] is not None
        self._text = Detokenizer(tokenizer, s["stop"], s["min_tokens"])
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
        return trimmed(row)
