"""Texts, pairs and ids to token arrays, with truncation that is said.

Tokenizers are Rust (the `tokenizers` library): a batch is encoded with the GIL released. Encoding
is done without truncation first, since the number of tokens of the whole text is part of the
answer; only texts that are too long are encoded a second time, cut to what the model takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
from forebay.errors import InvalidArgument
from numpy.typing import NDArray

from forebay_server.core.interfaces import TokenInput

Truncate = Literal["end", "start", "none"]
#: A text, a pair (query, document), or ids that were tokenised by the caller.
TextInput = str | tuple[str, str] | NDArray[np.int64]
#: From so many characters on, texts are encoded on several threads. Fewer are done before those have
#: got a core, which takes milliseconds while the engine has all of them.
TOGETHER = 2000


@dataclass(frozen=True, slots=True)
class Encoded:
    """Tokens of one input, ready for the engine. `original` counts them before truncation."""

    tokens: TokenInput
    original: int
    truncated: bool


class TextEncoder:
    """A model's tokenizer with its limits.

    Args:
        tokenizer: a `tokenizers.Tokenizer`; its own truncation and padding are switched off.
        max_tokens: greatest number of tokens the model takes, special tokens included.
        type_ids: whether the model wants token_type_ids.
    """

    def __init__(self, tokenizer: Any, max_tokens: int, type_ids: bool) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self._type_ids = type_ids
        self._special_single = int(tokenizer.num_special_tokens_to_add(False))
        self._special_pair = int(tokenizer.num_special_tokens_to_add(True))

    def encode(
        self, inputs: Sequence[TextInput], truncate: Sequence[Truncate], paths: Sequence[str]
    ) -> list[Encoded | InvalidArgument]:
        """Encode all inputs in one batch. A bad input gives its error at its own place.

        Args:
            inputs: texts, pairs or ids.
            truncate: what to do with each when it is too long.
            paths: each input's path in its request, for errors.
        """
        out: list[Encoded | InvalidArgument | None] = [None] * len(inputs)
        texts = [i for i, value in enumerate(inputs) if not isinstance(value, np.ndarray)]
        if texts:
            batch = [inputs[i] for i in texts]
            for i, encoding in zip(texts, self._tokens(batch), strict=True):
                ids = np.array(encoding.ids, np.int64)
                if len(ids) <= self.max_tokens:
                    types = np.array(encoding.type_ids, np.int64) if self._type_ids else None
                    out[i] = Encoded(TokenInput(ids, types), len(ids), False)
                else:
                    out[i] = self._cut(inputs[i], len(ids), truncate[i], paths[i])
        for i, value in enumerate(inputs):
            if isinstance(value, np.ndarray):
                out[i] = self._given(value, truncate[i], paths[i])
        return cast("list[Encoded | InvalidArgument]", out)

    def _tokens(self, batch: Sequence[Any]) -> Sequence[Any]:
        size = sum(len(t) if isinstance(t, str) else len(t[0]) + len(t[1]) for t in batch)
        if size > TOGETHER:
            return self.tokenizer.encode_batch_fast(list(batch))
        encode = self.tokenizer.encode
        return [encode(t) if isinstance(t, str) else encode(*t) for t in batch]

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, special tokens included."""
        return [len(e.ids) for e in self.tokenizer.encode_batch_fast(list(texts))]

    def _too_long(self, path: str, size: int) -> InvalidArgument:
        return InvalidArgument.at(
            path, f"has {size} tokens; the model takes {self.max_tokens} and truncation is off"
        )

    def _cut(
        self, value: TextInput, size: int, truncate: Truncate, path: str
    ) -> Encoded | InvalidArgument:
        if truncate == "none":
            return self._too_long(path, size)
        direction = "left" if truncate == "start" else "right"
        if isinstance(value, str):
            text = self.tokenizer.encode(value, add_special_tokens=False)
            text.truncate(self.max_tokens - self._special_single, direction=direction)
            whole = self.tokenizer.post_process(text)
        else:
            query, document = (
                self.tokenizer.encode(part, add_special_tokens=False) for part in value
            )
            room = self.max_tokens - self._special_pair - len(query.ids)
            if room < 1:
                return InvalidArgument.at(
                    "query",
                    f"has {len(query.ids)} tokens, which leaves no room for a document; "
                    f"the model takes {self.max_tokens} for both",
                )
            document.truncate(room, direction=direction)
            whole = self.tokenizer.post_process(query, document)
        types = np.array(whole.type_ids, np.int64) if self._type_ids else None
        return Encoded(TokenInput(np.array(whole.ids, np.int64), types), size, True)

    def _given(
        self, ids: NDArray[np.int64], truncate: Truncate, path: str
    ) -> Encoded | InvalidArgument:
        size = len(ids)
        if size == 0:
            return InvalidArgument.at(path, "has no ids; at least 1 is needed")
        vocabulary = self.tokenizer.get_vocab_size()
        worst = int(ids.max())
        if worst >= vocabulary or int(ids.min()) < 0:
            return InvalidArgument.at(
                f"{path}.ids", f"has the id {worst}; allowed are 0 to {vocabulary - 1}"
            )
        if size <= self.max_tokens:
            return Encoded(TokenInput(ids, self._zeros(size)), size, False)
        if truncate == "none":
            return self._too_long(path, size)
        # The caller's ids hold special tokens at both ends: keep those, cut between them.
        keep = self.max_tokens
        if truncate == "start":
            cut = np.concatenate([ids[:1], ids[size - keep + 1 :]])
        else:
            cut = np.concatenate([ids[: keep - 1], ids[-1:]])
        return Encoded(TokenInput(cut, self._zeros(keep)), size, True)

    def _zeros(self, n: int) -> NDArray[np.int64] | None:
        return np.zeros(n, np.int64) if self._type_ids else None
