"""The response cache of language models: equal requests get the answer that was given before.

Opt-in, by the request or by the model's configuration, and only for answers that an equal request
would get again: temperature 0, or a seed. The key holds the model's files, the prompt's tokens and
all that shapes the answer, and nothing of the caller: keys share it. A hit costs no engine time and
is not charged.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import msgspec

from forebay_server.core.generation import (
    GenerationDelta,
    GenerationRequest,
    SamplingParameters,
    Tally,
)
from forebay_server.dataplane.models import ItemCache, ServedModel

log = logging.getLogger("forebay.dataplane")

#: Answers of more bytes are not kept.
MAX_BYTES = 1 << 20


@dataclass(slots=True)
class Kept:
    """Whole answers, one delta each, and each request's tokens."""

    answers: list[GenerationDelta]
    tallies: list[Tally]


class NoCache:
    """Where there is none."""

    enabled = False

    def get_many(self, model: str, version: int, keys: Sequence[bytes]) -> list[bytes | None]:
        """Nothing."""
        return [None] * len(keys)

    def put_many(self, model: str, version: int, values: Any) -> None:
        """Nothing."""


class AnswerCache:
    """See the module."""

    def __init__(self, cache: ItemCache) -> None:
        self._cache = cache
        self._decoder = msgspec.msgpack.Decoder(Kept)

    def key(
        self, model: ServedModel, requests: Sequence[GenerationRequest], wanted: bool | None
    ) -> bytes | None:
        """The key of a call; None when it is not for the cache."""
        if not (model.cache_enabled if wanted is None else wanted) or not self._cache.enabled:
            return None
        if not all(_repeats(r.sampling) for r in requests):
            return None
        digest = hashlib.blake2b(model.artefact, digest_size=32)
        for request in requests:
            facts = {
                "ids": list(request.prompt_ids),
                "prompt": request.prompt,
                "chat": asdict(request.chat) if request.chat is not None else None,
                "sampling": asdict(request.sampling),
                "structure": asdict(request.structure) if request.structure else None,
                "adapter": request.adapter,
            }
            if request.prompt_ids and facts["chat"]:
                facts["chat"]["messages"] = ()  # they are in the prompt, after truncation
            digest.update(msgspec.msgpack.encode(facts, order="sorted"))
        return digest.digest()

    async def get(self, model: ServedModel, key: bytes) -> Kept | None:
        """The answers that were kept; None when there are none."""
        # Redis may take its time: not on the event loop.
        found = await asyncio.to_thread(self._cache.get_many, model.name, model.version, [key])
        if found[0] is None:
            return None
        try:
            return self._decoder.decode(found[0])
        except msgspec.MsgspecError:
            log.warning("an answer in the cache cannot be read; it is made anew")
            return None

    def put(self, model: ServedModel, key: bytes, kept: Kept) -> None:
        """Keep answers."""
        data = msgspec.msgpack.encode(kept)
        if len(data) <= MAX_BYTES:
            self._cache.put_many(model.name, model.version, {key: data})


@dataclass(slots=True)
class Collected:
    """Answers that are put together from their deltas."""

    answers: dict[int, GenerationDelta] = field(default_factory=dict)

    def add(self, delta: GenerationDelta) -> None:
        """One more delta."""
        into = self.answers.get(delta.index)
        if into is None:
            into = self.answers[delta.index] = GenerationDelta(
                delta.index, tool_calls=[], logprobs=[]
            )
        into.text += delta.text
        into.reasoning += delta.reasoning
        into.refusal += delta.refusal
        into.tokens += delta.tokens
        cast(list[Any], into.tool_calls).extend(delta.tool_calls)
        cast(list[Any], into.logprobs).extend(delta.logprobs)
        if delta.finish_reason is not None:
            into.finish_reason, into.stop_reason = delta.finish_reason, delta.stop_reason

    def whole(self) -> list[GenerationDelta] | None:
        """The answers; None unless each has ended as a model's answers end."""
        out = [self.answers[i] for i in sorted(self.answers)]
        good = all(a.finish_reason in ("stop", "length", "tool_calls") for a in out)
        return out if out and good else None


def _repeats(sampling: SamplingParameters) -> bool:
    """Whether an equal request gets an equal answer."""
    return sampling.greedy or sampling.seed is not None
