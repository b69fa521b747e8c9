"""The contract's responses as OpenAI's objects and events."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson
from forebay.v1 import generation_pb2 as generation
from forebay.v1 import response_pb2 as pb
from google.protobuf.timestamp_pb2 import Timestamp

STATUS = {
    pb.RESPONSE_STATUS_QUEUED: "queued",
    pb.RESPONSE_STATUS_IN_PROGRESS: "in_progress",
    pb.RESPONSE_STATUS_COMPLETED: "completed",
    pb.RESPONSE_STATUS_INCOMPLETE: "incomplete",
    pb.RESPONSE_STATUS_FAILED: "failed",
    pb.RESPONSE_STATUS_CANCELLED: "cancelled",
}
INCOMPLETE = {
    generation.FINISH_REASON_LENGTH: "max_output_tokens",
    generation.FINISH_REASON_CONTENT_FILTER: "content_filter",
}
_ROLES = {
    generation.CHAT_ROLE_SYSTEM: "system",
    generation.CHAT_ROLE_USER: "user",
    generation.CHAT_ROLE_ASSISTANT: "assistant",
}
_MODES = {
    generation.TOOL_MODE_UNSPECIFIED: "auto",
    generation.TOOL_MODE_AUTO: "auto",
    generation.TOOL_MODE_NONE: "none",
    generation.TOOL_MODE_REQUIRED: "required",
}


def response(r: pb.Response) -> dict[str, Any]:
    """The response object."""
    q = r.request
    s = q.sampling
    status = STATUS[r.status]
    failed = r.status == pb.RESPONSE_STATUS_FAILED
    reason = INCOMPLETE.get(r.incomplete_reason)
    cut = r.status == pb.RESPONSE_STATUS_INCOMPLETE
    last = len(r.output) - 1
    done = r.status not in (pb.RESPONSE_STATUS_QUEUED, pb.RESPONSE_STATUS_IN_PROGRESS)
    return {
        "id": r.id,
        "object": "response",
        "created_at": seconds(r.created_at),
        "completed_at": seconds(r.completed_at) if r.HasField("completed_at") else None,
        "status": status,
        "background": q.background,
        "error": _error(r.error) if failed else None,
        "incomplete_details": {"reason": reason} if reason else None,
        "instructions": q.instructions or None,
        "max_output_tokens": s.max_tokens if s.HasField("max_tokens") else None,
        "metadata": dict(q.metadata),
        "model": r.served_by.model or q.model,
        "output": [
            item(x, "incomplete" if cut and i == last else "completed", r.logprobs)
            for i, x in enumerate(r.output)
        ],
        "parallel_tool_calls": q.parallel_tool_calls if q.HasField("parallel_tool_calls") else True,
        "previous_response_id": q.previous_response or None,
        "reasoning": {"effort": None, "summary": None},
        "store": q.store if q.HasField("store") else True,
        "temperature": round(s.temperature, 6) if s.HasField("temperature") else None,
        "text": {"format": _format(q.response_format)},
        "tool_choice": _choice(q.tool_choice),
        "tools": [_tool(t) for t in q.tools],
        "top_logprobs": s.logprobs if s.HasField("logprobs") else 0,
        "top_p": round(s.top_p, 6) if s.HasField("top_p") else None,
        "truncation": "auto" if q.truncate_prompt else "disabled",
        "usage": _usage(r.generation_usage) if done and r.HasField("generation_usage") else None,
        "user": q.user or None,
    }


def seconds(at: Timestamp) -> int:
    """Whole seconds since the epoch."""
    return at.seconds


def _error(error: pb.ResponseError) -> dict[str, Any]:
    code = "server_error" if error.reason in ("INTERNAL", "ITEM_FAILED") else error.reason.lower()
    return {"code": code, "message": error.message}


def _usage(u: generation.GenerationUsage) -> dict[str, Any]:
    out: dict[str, Any] = {
        "input_tokens": u.prompt_tokens,
        "input_tokens_details": {"cached_tokens": u.cached_tokens},
        "output_tokens": u.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": u.reasoning_tokens},
        "total_tokens": u.prompt_tokens + u.completion_tokens,
    }
    if u.cached_answers:
        out["cached_answers"] = u.cached_answers
    return out


def _format(form: generation.ResponseFormat) -> dict[str, Any]:
    if form.json_schema:
        return {
            "type": "json_schema",
            "name": form.name or "answer",
            "schema": orjson.loads(form.json_schema),
            "strict": True,
        }
    return {"type": "json_object" if form.json_object else "text"}


def _choice(choice: generation.ToolChoice) -> Any:
    if choice.mode == generation.TOOL_MODE_NAMED:
        return {"type": "function", "name": choice.name}
    return _MODES[choice.mode]


def _tool(tool: generation.Tool) -> dict[str, Any]:
    return {
        "type": "function",
        "name": tool.name,
        "description": tool.description or None,
        "parameters": orjson.loads(tool.parameters) if tool.parameters else None,
        "strict": tool.strict,
    }


def item(x: pb.ResponseItem, status: str, logprobs: Any = ()) -> dict[str, Any]:
    """One item, of output or input."""
    kind = x.WhichOneof("item")
    if kind == "tool_call":
        return {
            "id": x.id,
            "type": "function_call",
            "status": status,
            "call_id": x.tool_call.id,
            "name": x.tool_call.name,
            "arguments": x.tool_call.arguments,
        }
    if kind == "tool_output":
        out = x.tool_output
        return {
            "id": x.id,
            "type": "function_call_output",
            "status": status,
            "call_id": out.call_id,
            "output": out.output,
        }
    if kind == "reasoning":
        return {
            "id": x.id,
            "type": "reasoning",
            "status": status,
            "summary": [],
            "content": [{"type": "reasoning_text", "text": x.reasoning.text}],
        }
    role = _ROLES.get(x.message.role, "user")
    said = role == "assistant"
    parts = [
        _image(p.image)
        if p.HasField("image")
        else text_part(p.text, logprobs)
        if said
        else {"type": "input_text", "text": p.text}
        for p in x.message.content
    ]
    if x.message.refusal:
        parts.append(refusal_part(x.message.refusal))
    return {"id": x.id, "type": "message", "status": status, "role": role, "content": parts}


def _image(image: generation.ImagePart) -> dict[str, Any]:
    if image.url:
        return {"type": "input_image", "image_url": image.url, "detail": "auto"}
    import base64

    data = base64.b64encode(image.data).decode()
    url = f"data:{image.media_type or 'image/png'};base64,{data}"
    return {"type": "input_image", "image_url": url, "detail": "auto"}


def text_part(text: str, tokens: Any = ()) -> dict[str, Any]:
    """What a message says."""
    return {
        "type": "output_text",
        "text": text,
        "annotations": [],
        "logprobs": [_logprob(t) for t in tokens],
    }


def refusal_part(text: str) -> dict[str, Any]:
    """Why the model does not answer."""
    return {"type": "refusal", "refusal": text}


def _logprob(t: generation.TokenLogprob) -> dict[str, Any]:
    top = [{"token": p.token, "logprob": p.logprob, "bytes": list(p.raw)} for p in t.top]
    return {"token": t.token, "logprob": t.logprob, "bytes": list(t.raw), "top_logprobs": top}


class Events:
    """OpenAI's events of a stream, numbered: several for some of the contract's."""

    def __init__(self) -> None:
        self._number = -1
        self._logprobs: list[generation.TokenLogprob] = []
        self._kinds: dict[int, str] = {}
        self._part_open = False

    def of(self, event: pb.CreateResponseStreamResponse) -> Iterator[bytes]:
        """The events that one of the contract's becomes."""
        kind = event.WhichOneof("event")
        if kind == "created":
            whole = response(event.created)
            yield self._frame("response.created", response=whole)
            yield self._frame("response.in_progress", response=whole)
        elif kind == "item_added":
            yield from self._added(event.item_added)
        elif kind == "item_delta":
            yield from self._delta(event.item_delta)
        elif kind == "item_done":
            yield from self._done(event.item_done)
        elif kind == "ended":
            status = STATUS[event.ended.status]
            yield self._frame(f"response.{status}", response=response(event.ended))

    def error(self, code: str, message: str, param: str | None) -> bytes:
        """The event of an error that no response tells of."""
        return self._frame("error", code=code, message=message, param=param)

    def _frame(self, kind: str, **facts: Any) -> bytes:
        self._number += 1
        data = orjson.dumps({"type": kind, "sequence_number": self._number, **facts})
        return b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n"

    def _added(self, added: pb.ResponseItemAdded) -> Iterator[bytes]:
        x, index = added.item, added.output_index
        kind = self._kinds[index] = x.WhichOneof("item") or ""
        self._logprobs, self._part_open = [], kind == "tool_call"  # which has no parts
        shown = item(x, "in_progress")
        if kind != "tool_call":
            shown["content"] = []
        yield self._frame("response.output_item.added", output_index=index, item=shown)

    def _part(self, at: dict[str, Any], kind: str, refused: bool) -> Iterator[bytes]:
        """The part of an item that has one begins; what it is shows with what it says."""
        if self._part_open:
            return
        self._part_open = True
        part = {"type": "reasoning_text", "text": ""} if kind == "reasoning" else text_part("")
        part = refusal_part("") if refused else part
        yield self._frame("response.content_part.added", **at, content_index=0, part=part)

    def _delta(self, delta: pb.ResponseItemDelta) -> Iterator[bytes]:
        at: dict[str, Any] = {"item_id": delta.item_id, "output_index": delta.output_index}
        kind = self._kinds[delta.output_index]
        if kind == "tool_call":
            yield self._frame("response.function_call_arguments.delta", **at, delta=delta.text)
            return
        yield from self._part(at, kind, bool(delta.refusal))
        at["content_index"] = 0
        if kind == "reasoning":
            yield self._frame("response.reasoning_text.delta", **at, delta=delta.text)
        elif delta.refusal:
            yield self._frame("response.refusal.delta", **at, delta=delta.refusal)
        else:
            self._logprobs.extend(delta.logprobs)
            tokens = [_logprob(t) for t in delta.logprobs]
            yield self._frame("response.output_text.delta", **at, delta=delta.text, logprobs=tokens)

    def _done(self, done: pb.ResponseItemDone) -> Iterator[bytes]:
        x, index = done.item, done.output_index
        kind = self._kinds[index]
        shown = item(x, "incomplete" if done.incomplete else "completed", self._logprobs)
        at: dict[str, Any] = {"item_id": x.id, "output_index": index}
        if kind == "tool_call":
            yield self._frame(
                "response.function_call_arguments.done",
                **at,
                name=x.tool_call.name,
                arguments=x.tool_call.arguments,
            )
        else:
            yield from self._part(at, kind, bool(x.message.refusal))
            at["content_index"] = 0
            part = shown["content"][0]
            if kind == "reasoning":
                yield self._frame("response.reasoning_text.done", **at, text=part["text"])
            elif x.message.refusal:
                yield self._frame("response.refusal.done", **at, refusal=part["refusal"])
            else:
                yield self._frame(
                    "response.output_text.done",
                    **at,
                    text=part["text"],
                    logprobs=part["logprobs"],
                )
            yield self._frame("response.content_part.done", **at, part=part)
        yield self._frame("response.output_item.done", output_index=index, item=shown)
