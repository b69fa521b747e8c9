"""TokenService: a model's own tokenizer."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from forebay.errors import InvalidArgument
from forebay.v1 import common_pb2, token_pb2

from forebay_server.core.call import Call
from forebay_server.dataplane.generation_jobs import count_chat
from forebay_server.dataplane.models import ModelAccess, ServedModel
from forebay_server.services.base import Service
from forebay_server.services.common import served_by
from forebay_server.services.generation_messages import chat_ask

#: Tasks whose models have a tokenizer; the first one's default model answers an empty name.
TEXT_TASKS = ("embedding", "text-classification", "rerank", "zero-shot-classification")


class TokenService(Service):
    """See protos/forebay/v1/token.proto. Encoding runs in a thread, with the GIL released."""

    name = "forebay.v1.TokenService"

    def __init__(self, access: ModelAccess) -> None:
        self._access = access

    async def tokenize(self, call: Call) -> token_pb2.TokenizeResponse:
        """Tokenize."""
        request = cast(token_pb2.TokenizeRequest, call.request)
        model = await self._model(call, request.model)
        special = request.add_special_tokens if request.HasField("add_special_tokens") else True
        encodings = await asyncio.to_thread(
            model.encoder.tokenizer.encode_batch, list(request.texts), add_special_tokens=special
        )
        response = token_pb2.TokenizeResponse(served_by=self._facts(call, model, encodings))
        for encoding in encodings:
            tokens = response.results.add().tokens
            for id_, text, (start, end), mask in zip(
                encoding.ids,
                encoding.tokens,
                encoding.offsets,
                encoding.special_tokens_mask,
                strict=True,
            ):
                tokens.add(id=id_, text=text, start=start, end=end, special=bool(mask))
        return response

    async def detokenize(self, call: Call) -> token_pb2.DetokenizeResponse:
        """Detokenize."""
        request = cast(token_pb2.DetokenizeRequest, call.request)
        model = await self._model(call, request.model)
        tokenizer = model.encoder.tokenizer
        size = tokenizer.get_vocab_size()
        for i, one in enumerate(request.token_ids):
            if one.ids and max(one.ids) >= size:
                raise InvalidArgument.at(
                    f"token_ids[{i}].ids", f"has the id {max(one.ids)}; allowed are 0 to {size - 1}"
                )
        skip = request.skip_special_tokens if request.HasField("skip_special_tokens") else True
        texts = await asyncio.to_thread(
            tokenizer.decode_batch, [list(t.ids) for t in request.token_ids], skip
        )
        call.facts.items = len(texts)
        call.facts.model, call.facts.version = model.name, model.version
        return token_pb2.DetokenizeResponse(texts=texts, served_by=served_by(call))

    async def count_tokens(self, call: Call) -> token_pb2.CountTokensResponse:
        """CountTokens."""
        request = cast(token_pb2.CountTokensRequest, call.request)
        model = await self._model(call, request.model)
        counts = await asyncio.to_thread(model.encoder.count, request.texts)
        call.facts.items, call.facts.tokens = len(counts), sum(counts)
        call.facts.model, call.facts.version = model.name, model.version
        return token_pb2.CountTokensResponse(
            counts=counts, max_tokens=model.encoder.max_tokens, served_by=served_by(call)
        )

    async def count_chat_tokens(self, call: Call) -> token_pb2.CountChatTokensResponse:
        """CountChatTokens."""
        request = cast(token_pb2.CountChatTokensRequest, call.request).request
        tokens, context = await count_chat(self._access, call, chat_ask(request, "request."))
        call.facts.items = 1  # no tokens: those of a prompt are charged where it is answered
        return token_pb2.CountChatTokensResponse(
            tokens=tokens, context_length=context, served_by=served_by(call)
        )

    async def _model(self, call: Call, ref: str) -> ServedModel:
        return await self._access.resolve_async(call, ref, TEXT_TASKS)

    def _facts(self, call: Call, model: ServedModel, encodings: list[Any]) -> common_pb2.ServedBy:
        call.facts.model, call.facts.version = model.name, model.version
        call.facts.items = len(encodings)
        call.facts.tokens = sum(len(e.ids) for e in encodings)
        return served_by(call)
