"""From vLLM's outputs to rows: text, tool calls and reasoning by its own parsers, likelihoods."""

from __future__ import annotations

from typing import Any

from forebay_worker.loop import Row, trimmed


class Answer:
    """One answer of a request.

    Args:
        parser: vLLM's parser of this answer; None where the text is passed on as it is.
    """

    def __init__(
        self, request: dict[str, Any], chat: Any, index: int, parser: Any, tokenizer: Any
    ) -> None:
        self._id = request["id"]
        self._index = index
        self._chat = chat
        self._prompt_ids = request["prompt_ids"]
        self._tokenizer = tokenizer
        self._parser = parser
        self._calls = False
        self._ids: list[int] = []
        self._reasoning = 0

    def row(self, out: Any) -> Row:
        """The row of one output; see generation/frames.py."""
        finish = out.finish_reason
        if self._parser is None and finish is None and not out.logprobs:  # nearly all of them
            return [self._id, "delta", self._index, out.text, len(out.token_ids)]
        text, reasoning, calls = out.text, "", []
        if self._parser is not None:
            text, reasoning, calls = self._parse(out)
        if finish is not None and finish not in ("stop", "length"):
            raise RuntimeError(f"vLLM ended the request with {finish!r}")
        if finish == "stop" and self._calls:
            finish = "tool_calls"
        stop = out.stop_reason if isinstance(out.stop_reason, str) else ""
        logprobs = self._logprobs(out) if out.logprobs else []
        if finish in ("stop", "tool_calls") and not stop:
            del logprobs[-1:]  # the token that ended the answer is no part of its text
        return trimmed(
            [
                self._id,
                "delta",
                self._index,
                text,
                len(out.token_ids),
                reasoning,
                calls,
                logprobs,
                finish,
                stop,
                self._reasoning,
            ]
        )

    def _parse(self, out: Any) -> tuple[str, str, list[Any]]:
        ids = list(out.token_ids)
        message = self._parser.parse_delta(
            delta_text=out.text,
            delta_token_ids=ids,
            request=self._chat,
            prompt_token_ids=self._prompt_ids,
            finished=out.finish_reason is not None,
        )
        self._ids += ids
        if out.finish_reason is not None:
            self._reasoning = self._parser.count_reasoning_tokens(tuple(self._ids))
        if message is None:
            return "", "", []
        calls = []
        for call in message.tool_calls or []:
            self._calls = True
            function = call.function
            name = (function.name if function else "") or ""
            arguments = (function.arguments if function else "") or ""
            calls.append([call.index, (call.id if name else "") or "", name, arguments])
        return message.content or "", message.reasoning or "", calls

    def _logprobs(self, out: Any) -> list[Any]:
        rows = []
        for token, found in zip(out.token_ids, out.logprobs, strict=True):
            ranked = sorted(found.items(), key=lambda kv: kv[1].rank or 0)
            rows.append([self._one(token, found[token]), [self._one(t, p) for t, p in ranked]])
        return rows

    def _one(self, token: int, found: Any) -> list[Any]:
        text = found.decoded_token
        if text is None:
            text = self._tokenizer.decode([token])
        return [token, text, found.logprob]
