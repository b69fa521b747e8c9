"""Requests of language models, and what is read from their answers and refusals."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from forebay.v1 import generation_pb2 as pb
from google.rpc import error_details_pb2, status_pb2

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}},
    "required": ["city"],
    "additionalProperties": False,
}


def user(text: str, **kwargs: Any) -> pb.ChatRequest:
    """A conversation of one message; sampling fields as keywords."""
    message = pb.ChatMessage(role=pb.CHAT_ROLE_USER, content=[pb.ContentPart(text=text)])
    sampling = pb.Sampling(**{"temperature": 0, "max_tokens": 64, **kwargs})
    return pb.ChatRequest(messages=[message], sampling=sampling)


def text_of(choice: pb.ChatChoice) -> str:
    return "".join(p.text for p in choice.message.content)


def violations(error: grpc.RpcError) -> dict[str, str]:
    details = dict(error.trailing_metadata())["grpc-status-details-bin"]  # type: ignore[attr-defined]
    bad = error_details_pb2.BadRequest()
    for detail in status_pb2.Status.FromString(details).details:
        if detail.Unpack(bad):
            return {v.field: v.description for v in bad.field_violations}
    return {}


def refused(call: Any) -> dict[str, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, caught.value.details()
    return violations(caught.value)
