"""What the doors to language models share: the request's parts, events, and errors' words."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

import orjson
from forebay.errors import ForebayError, InvalidArgument
from forebay.methods import Method
from forebay.v1 import generation_pb2 as pb
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc import aio
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from forebay_gateway import http_errors
from forebay_gateway.json_codec import dumps, parse_json
from forebay_gateway.openai import fields
from forebay_gateway.rest import Rename
from forebay_gateway.upstream import Upstream, with_heartbeats

#: Seconds of silence after which a stream says that it lives.
HEARTBEAT_S = 10.0
FINISH = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_TOOL_CALLS: "tool_calls",
    pb.FINISH_REASON_CONTENT_FILTER: "content_filter",
}
#: Sampling fields that both doors of OpenAI have under the contract's names: number or whole number.
NUMBERS = (
    "temperature",
    "top_p",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
)
WHOLE = ("n", "seed", "top_k", "min_tokens", "max_tokens")
SAMPLING = (*NUMBERS, *WHOLE, "stop", "stop_token_ids", "ignore_eos", "logit_bias")
#: The contract's paths in OpenAI's words.
_PATHS = (
    ("request.", ""),
    ("sampling.", ""),
    ("prompts", "prompt"),
    ("token_ids", "prompt"),
    ("template_values", "chat_template_kwargs"),
)


#: vLLM's names of the forms.
_FORMS = (
    ("response_format.json_schema", "structured_outputs.json"),
    ("response_format.choices", "structured_outputs.choice"),
    ("response_format", "structured_outputs"),
)


def words(body: Mapping[str, Any], first: Sequence[tuple[str, str]]) -> Rename:
    """`renamed` for a body: in those of several words that its caller used. `first` is what its door
    alone has."""
    paths = [("request.", ""), *first]
    if body.get("structured_outputs") is not None:
        paths += _FORMS
    return lambda status: renamed(status, (*paths, *_PATHS))


def sampling(body: Mapping[str, Any], out: pb.Sampling) -> None:
    """The fields that both doors have."""
    for name in NUMBERS:
        value = body.get(name)
        if value is None:
            continue
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not math.isfinite(value)
        ):
            raise InvalidArgument.at(name, f"is {value!r:.40}; a number is needed")
        setattr(out, name, value)
    for name in WHOLE:
        value = whole(body, name)
        if value is not None:
            setattr(out, name, value)
    if body.get("stop") is not None:
        out.stop.extend(fields.texts(dict(body), "stop"))
    for i, value in enumerate(fields.items(dict(body), "stop_token_ids")):
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
            raise InvalidArgument.at(f"stop_token_ids[{i}]", "a token id is needed")
        out.stop_token_ids.append(value)
    out.ignore_eos = fields.flag(dict(body), "ignore_eos")
    biases = body.get("logit_bias") or {}
    if not isinstance(biases, dict):
        raise InvalidArgument.at("logit_bias", f"is a {fields.kind(biases)}; an object is needed")
    for token, bias in biases.items():
        if not str(token).isascii() or not str(token).isdigit() or len(str(token)) > 9:
            raise InvalidArgument.at(f"logit_bias.{token}", "the name must be a token id")
        if isinstance(bias, bool) or not isinstance(bias, (int, float)):
            raise InvalidArgument.at(f"logit_bias.{token}", "a number is needed")
        out.logit_bias.add(token_id=int(token), bias=bias)


def whole(body: Mapping[str, Any], name: str) -> int | None:
    """A whole number of up to 63 bits."""
    value = body.get(name)
    if value is None:
        return None
    limit = 2**63 if name == "seed" else 2**31
    if not isinstance(value, int) or isinstance(value, bool) or not -limit <= value < limit:
        raise InvalidArgument.at(name, f"is {value!r:.40}; a whole number is needed")
    return value


def response_format(body: Mapping[str, Any], out: pb.ResponseFormat) -> None:
    """OpenAI's response_format, or vLLM's structured_outputs."""
    form = body.get("response_format")
    if form is not None:
        if not isinstance(form, dict):
            raise InvalidArgument.at("response_format", "an object is needed")
        kind = form.get("type")
        if kind == "json_object":
            out.json_object = True
        elif kind == "json_schema":
            described = form.get("json_schema")
            schema = described.get("schema") if isinstance(described, dict) else None
            if not isinstance(schema, dict):
                raise InvalidArgument.at("response_format.json_schema.schema", "is required")
            out.json_schema = orjson.dumps(schema).decode()
        elif kind != "text":
            raise InvalidArgument.at(
                "response_format.type",
                f"is {kind!r:.40}; allowed are text, json_object, json_schema",
            )
    wanted = body.get("structured_outputs")
    if wanted is None:
        return
    if not isinstance(wanted, dict) or len(wanted) != 1 or out.ByteSize():
        raise InvalidArgument.at("structured_outputs", "must have exactly one form")
    kind, value = next(iter(wanted.items()))
    if kind == "json":
        out.json_schema = value if isinstance(value, str) else orjson.dumps(value).decode()
    elif kind == "choice":
        out.choices.extend(fields.texts(wanted, "choice", "structured_outputs"))
    elif kind in ("regex", "grammar"):
        setattr(out, kind, fields.text(wanted, kind, at="structured_outputs"))
    else:
        raise InvalidArgument.at(
            f"structured_outputs.{kind}", "is not known; known are json, regex, choice, grammar"
        )


def image(url: Any, path: str, out: pb.ImagePart) -> None:
    """A picture by its address, or in a data: address."""
    if not isinstance(url, str) or not url:
        raise InvalidArgument.at(path, "an address is needed")
    if not url.startswith("data:"):
        out.url = url
        return
    head, _, data = url[5:].partition(",")
    if not head.endswith(";base64"):
        raise InvalidArgument.at(path, "a data: address must be in base64")
    try:
        out.data = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidArgument.at(path, "is no base64") from None
    out.media_type = head.removesuffix(";base64")


def usage(found: pb.GenerationUsage) -> dict[str, Any]:
    """OpenAI's usage object; `cached_answers` is ours, where the response cache answered."""
    out: dict[str, Any] = {
        "prompt_tokens": found.prompt_tokens,
        "completion_tokens": found.completion_tokens,
        "total_tokens": found.prompt_tokens + found.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": found.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": found.reasoning_tokens},
    }
    if found.cached_answers:
        out["cached_answers"] = found.cached_answers
    return out


def renamed(
    status: status_pb2.Status, paths: Sequence[tuple[str, str]] = _PATHS
) -> status_pb2.Status:
    """The status with the contract's field paths in OpenAI's words: beginnings and what they become."""
    return rewritten(status, lambda path: in_words(path, paths))


def in_words(path: str, paths: Sequence[tuple[str, str]] = _PATHS) -> str:
    """A field's path of the contract in OpenAI's words."""
    for theirs, ours in paths:
        if path.startswith(theirs):
            path = ours + path[len(theirs) :]
    return path


def rewritten(status: status_pb2.Status, rename: Callable[[str], str]) -> status_pb2.Status:
    """The status with other field paths."""
    out = status_pb2.Status()
    out.CopyFrom(status)
    bad = error_details_pb2.BadRequest()
    for detail in out.details:
        if not detail.Unpack(bad):
            continue
        for violation in bad.field_violations:
            old, violation.field = violation.field, rename(violation.field)
            out.message = out.message.replace(f"{old}:", f"{violation.field}:")
        detail.Pack(bad)
    return out


def endpoint(
    upstream: Upstream,
    method: Method,
    read: Callable[[dict[str, Any]], Any],
    words: Callable[[dict[str, Any]], Rename],
    written: Callable[[bytes], dict[str, Any]],
    stream: Callable[[Upstream, Request, dict[str, Any], Any], Awaitable[Response]],
) -> Any:
    """POST of a door of OpenAI's: a whole answer, or a stream.

    Args:
        method: gives whole answers.
        read: the contract's message from a body.
        words: how the contract's field paths are called in a body.
        written: the answer from the response's bytes.
    """

    async def answer(request: Request) -> Response:
        body = parse_json(await upstream.body(request))
        message = read(body)
        request.state.rename = words(body)
        if fields.flag(body, "stream"):
            return await stream(upstream, request, body, message)
        if body.get("stream_options") is not None:
            raise InvalidArgument.at("stream_options", "needs stream: true")
        data, headers = await upstream.unary(method, request, message.SerializeToString())
        return Response(dumps(written(data)), media_type="application/json", headers=headers)

    return answer


def head(
    kind: str, answer: pb.ChatResponse | pb.CompleteResponse | pb.GenerationStarted, created: int
) -> dict[str, Any]:
    """What an answer, or each chunk of one, says of itself."""
    by = answer.served_by
    return {
        "id": answer.id,
        "object": kind,
        "created": created,
        "model": by.model,
        "system_fingerprint": f"{by.model}@{by.version}",
    }


def include_usage(body: dict[str, Any]) -> bool:
    """stream_options, of which include_usage is known."""
    options = body.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict):
        raise InvalidArgument.at("stream_options", "an object is needed")
    for name, value in options.items():
        if name not in ("include_usage", "include_obfuscation") or (
            name == "include_obfuscation" and value
        ):
            raise InvalidArgument.at(
                f"stream_options.{name}", "is not supported here; supported is include_usage"
            )
    return fields.flag(options, "include_usage", at="stream_options")


async def begin(
    upstream: Upstream, method: Method, request: Request, message: Message
) -> tuple[Any, AsyncIterator[bytes], bytes]:
    """Start a stream and read its first event: an error of the start is a real HTTP status."""
    call, stream, first = await upstream.stream(method, request, message.SerializeToString())
    return call, stream, first or b""


def event_stream(
    call: Any,
    frames: AsyncIterator[bytes],
    error_frame: Any,
    beat: bytes = b": heartbeat\n\n",
    headers: dict[str, str] | None = None,
) -> StreamingResponse:
    """SSE of the frames, with heartbeats; an error becomes the last event, never a silent end."""

    async def body() -> AsyncIterator[bytes]:
        try:
            async for frame in with_heartbeats(frames, HEARTBEAT_S, lambda: beat):
                yield frame
        except aio.AioRpcError as e:
            yield error_frame(http_errors.from_rpc(e))
        except ForebayError as e:
            yield error_frame(e.to_status())
        finally:
            call.cancel()

    return StreamingResponse(
        body(),
        media_type="text/event-stream",
        headers={"cache-control": "no-cache", "x-accel-buffering": "no", **(headers or {})},
    )


def data(value: Any) -> bytes:
    """One SSE event."""
    return b"data: " + orjson.dumps(value) + b"\n\n"


def error_frame(status: status_pb2.Status) -> bytes:
    """The event of an error whose paths are in the caller's words."""
    _, body = http_errors.error_object(status)
    return b"event: error\ndata: " + orjson.dumps(body) + b"\n\n"
