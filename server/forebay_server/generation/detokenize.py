"""Tokens to text, token by token: whole characters only, and stop strings that may span tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream


class Detokenizer:
    """The text of one answer.

    Args:
        tokenizer: a `tokenizers.Tokenizer`.
        stop: strings that end the answer; they are not part of it.
        min_tokens: stop strings count only after so many tokens.
        prompt_ids: end of the prompt, for decoders that look at the token before.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), min_tokens: int = 0) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stop = stop
        self._hold = max((len(s) for s in stop), default=1) - 1
        self._min_tokens = min_tokens
        self._held = ""
        self.tokens = 0
        self.stopped_by = ""

    def feed(self, ids: Sequence[int]) -> str:
        """Text that is sure not to belong to a stop string. `stopped_by` is set at the end."""
        out = []
        for token in ids:
            if self.stopped_by:
                break
            self.tokens += 1
            piece = self._stream.step(self._tokenizer, token)
            if piece:
                out.append(self._pass(piece))
        return "".join(out)

    def _pass(self, piece: str) -> str:
        if not self._stop:
            return piece
        text = self._held + piece
        if self.tokens > self._min_tokens:
            found = [(at, s) for s in self._stop if (at := text.find(s)) >= 0]
            if found:
                at, self.stopped_by = min(found, key=lambda f: (f[0], -len(f[1])))
                self._held = ""
                return text[:at]
        keep = min(self._hold, len(text))
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> str:
        """What was held back, at the end of an answer that no stop string ended."""
        held, self._held = self._held, ""
        return held
