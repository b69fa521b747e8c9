"""What the server and an engine's process say to each other.

Frames are a 4-byte length and a MessagePack object. To the process: first `spec`, then `generate`,
`abort`, `stats`. From it: `ready` or `failed`, then `stats`, and `step` with rows:

    [id, "prompt", cached tokens]             the prompt was worked on
    [id, "delta", index, text, tokens, reasoning, calls, logprobs, finish, stop, reasoning tokens]
    [id, "aborted"]
    [id, "error", kind, message, path]

Empty columns at a row's end are left out.
"""

from __future__ import annotations

import logging
import socket
import struct
from collections.abc import Mapping
from typing import Any

import msgspec
from forebay.errors import Internal, InvalidArgument, Unavailable

from forebay_server.core.generation import (
    GenerationDelta,
    GenerationRequest,
    Structure,
    TokenProbability,
    ToolCallPiece,
    ToolSpec,
)
from forebay_server.core.structure import enforceable
from forebay_server.generation.json_regex import regex_of

log = logging.getLogger("forebay.generation")

_encode = msgspec.msgpack.Encoder().encode


def pack(message: Mapping[str, Any]) -> bytes:
    """One frame."""
    data = _encode(message)
    return struct.pack("<I", len(data)) + data


def error_of(kind: str, message: str, path: str = "request") -> Exception:
    """The error of an `error` row."""
    if kind == "invalid":
        return InvalidArgument.at(path, f"the engine refuses it: {message}")
    if kind == "broken":
        return Internal(message, reason="OUTPUT_INVALID")
    if kind == "dead":
        return died()
    log.error("an engine failed on a request: %s", message)
    return Internal("the engine failed on this request", reason="ITEM_FAILED")


def delta_of(row: list[Any]) -> tuple[GenerationDelta, int]:
    """A `delta` row, and its count of reasoning tokens."""
    if len(row) == 5:  # text alone: nearly all of them
        return GenerationDelta(row[2], row[3], tokens=row[4]), 0
    row = row + [None] * (11 - len(row))
    _, _, index, text, tokens, reasoning, calls, logprobs, finish, stop, reasoned = row
    delta = GenerationDelta(
        index or 0,
        text or "",
        reasoning or "",
        [ToolCallPiece(*c) for c in calls or ()],
        tokens or 0,
        [_probability(p, top) for p, top in logprobs or ()],
        finish,
        stop or "",
    )
    return delta, reasoned or 0


def _probability(row: list[Any], top: list[Any] | None = None) -> TokenProbability:
    token, text, logprob = row
    return TokenProbability(
        token, text, logprob, text.encode(), tuple(_probability(t) for t in top or ())
    )


def plain(request: GenerationRequest) -> dict[str, Any]:
    """The request as the process reads it."""
    chat = request.chat
    return {
        "id": request.id,
        "prompt_ids": list(request.prompt_ids),
        "sampling": {
            **{
                name: getattr(request.sampling, name)
                for name in request.sampling.__dataclass_fields__
                if name != "logit_bias"
            },
            "logit_bias": {str(k): v for k, v in request.sampling.logit_bias.items()},
        },
        "structure": _structure(request.structure),
        "adapter": request.adapter,
        "priority": request.priority,
        "chat": None
        if chat is None
        else {
            "messages": list(chat.messages),
            "tools": [_tool(t, chat.tool_mode) for t in chat.tools],
            "tool_mode": chat.tool_mode,
            "tool_name": chat.tool_name,
            "parallel_tool_calls": chat.parallel_tool_calls,
        },
    }


def _tool(tool: ToolSpec, mode: str) -> dict[str, Any]:
    """A call that is forced keeps to the schema where a grammar can hold it: left free, vLLM lets a
    model write `false` for arguments, which no client takes."""
    out = tool.as_openai()
    if tool.strict or (mode in ("required", "named") and enforceable(tool.parameters)):
        out["function"]["strict"] = True
        out["function"]["parameters"].setdefault("type", "object")
    return out


def _structure(structure: Structure | None) -> list[Any] | None:
    """Schemas as expressions where those cover them: xgrammar's JSON grammar lets control characters
    into strings, which no JSON parser takes, and white space without end between parts."""
    if structure is None:
        return None
    if structure.kind == "json_schema":
        regex = regex_of(msgspec.json.decode(str(structure.value)))
        if regex is not None:
            return ["regex", regex]
    return [structure.kind, structure.value]


def receive(sock: socket.socket) -> Any:
    """One frame of a blocking socket. Raises EOFError."""
    (size,) = struct.unpack("<I", _exactly(sock, 4))
    return msgspec.msgpack.decode(_exactly(sock, size))


def _exactly(sock: socket.socket, size: int) -> bytes:
    parts = b""
    while len(parts) < size:
        part = sock.recv(size - len(parts))
        if not part:
            raise EOFError
        parts += part
    return parts


def died() -> Unavailable:
    """The error of calls whose process is gone."""
    return Unavailable(
        "the model's engine died; it is started anew", reason="ENGINE_DIED", retry_after_s=5.0
    )
