"""/v1/responses: ResponseService in OpenAI's shape."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Any

import orjson
from forebay.errors import InvalidArgument
from forebay.methods import methods
from forebay.v1 import generation_pb2 as generation_pb
from forebay.v1 import response_pb2 as pb
from google.rpc import status_pb2
from starlette.requests import Request
from starlette.responses import Response

from forebay_gateway import http_errors
from forebay_gateway.json_codec import dumps, parse_json
from forebay_gateway.openai import fields, generation, response_objects
from forebay_gateway.openai.chat import MODES, ROLES
from forebay_gateway.upstream import Upstream

_SERVICE = "/forebay.v1.ResponseService/"
CREATE, STREAM, GET, DELETE, ITEMS, CANCEL = (
    methods()[_SERVICE + name]
    for name in (
        "CreateResponse",
        "CreateResponseStream",
        "GetResponse",
        "DeleteResponse",
        "ListInputItems",
        "CancelResponse",
    )
)
KNOWN = (
    "model",
    "input",
    "instructions",
    "previous_response_id",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "text",
    "max_output_tokens",
    "top_logprobs",
    "include",
    "store",
    "background",
    "metadata",
    "truncation",
    "service_tier",
    "stream",
    "stream_options",
    "user",
    "safety_identifier",
    "chat_template_kwargs",
    "priority",
    "adapter",
    "cache",
    *(n for n in generation.SAMPLING if n not in ("n", "max_tokens")),
)
LOGPROBS = "message.output_text.logprobs"
#: The contract's paths in OpenAI's words.
_PATHS = (
    ("request.", ""),
    ("sampling.max_tokens", "max_output_tokens"),
    ("sampling.logprobs", "top_logprobs"),
    ("sampling.", ""),
    ("response_format.json_schema", "text.format.schema"),
    ("response_format", "text.format"),
    ("previous_response", "previous_response_id"),
    ("tool_choice.mode", "tool_choice"),
    ("template_values", "chat_template_kwargs"),
    ("truncate_prompt", "truncation"),
)
_ITEM = re.compile(r"(input\[\d+\])\.(?:message|tool_call|tool_output|reasoning)\b")


def renamed(status: status_pb2.Status) -> status_pb2.Status:
    """The status with the contract's field paths in this door's words."""
    out = generation.renamed(status, _PATHS)
    return generation.rewritten(out, lambda path: _ITEM.sub(r"\1", path))


def endpoint(upstream: Upstream) -> Any:
    """POST /v1/responses."""

    async def responses(request: Request) -> Response:
        body = parse_json(await upstream.body(request))
        message = read(body)
        if fields.flag(body, "stream"):
            return await stream(upstream, request, message)
        data, headers = await upstream.unary(CREATE, request, message.SerializeToString())
        out = response_objects.response(pb.CreateResponseResponse.FromString(data).response)
        return Response(dumps(out), media_type="application/json", headers=headers)

    return responses


async def stream(
    upstream: Upstream, request: Request, message: pb.CreateResponseRequest
) -> Response:
    """The response as OpenAI's events."""
    wrapped = pb.CreateResponseStreamRequest(request=message)
    call, events, first = await generation.begin(upstream, STREAM, request, wrapped)
    out = response_objects.Events()

    async def frames() -> AsyncIterator[bytes]:
        data: bytes | None = first
        while data is not None:
            event = pb.CreateResponseStreamResponse.FromString(data)
            for frame in out.of(event):
                yield frame
            if event.HasField("ended"):  # an error that follows has been told by it
                return
            data = await anext(events, None)

    def error_frame(status: status_pb2.Status) -> bytes:
        e, _ = http_errors.error_object(renamed(status))
        return out.error(e.reason.lower(), e.message, e.param)

    return generation.event_stream(call, frames(), error_frame)


def get_endpoint(upstream: Upstream) -> Any:
    """GET /v1/responses/{response}."""

    async def get(request: Request) -> Response:
        if request.query_params.get("stream") == "true":
            raise InvalidArgument.at("stream", "is not supported here: a stream cannot be resumed")
        message = pb.GetResponseRequest(response=request.path_params["response"])
        data, headers = await upstream.unary(GET, request, message.SerializeToString())
        out = response_objects.response(pb.GetResponseResponse.FromString(data).response)
        return Response(dumps(out), media_type="application/json", headers=headers)

    return get


def delete_endpoint(upstream: Upstream) -> Any:
    """DELETE /v1/responses/{response}."""

    async def delete(request: Request) -> Response:
        name = request.path_params["response"]
        message = pb.DeleteResponseRequest(response=name)
        _, headers = await upstream.unary(DELETE, request, message.SerializeToString())
        out = {"id": name, "object": "response", "deleted": True}
        return Response(dumps(out), media_type="application/json", headers=headers)

    return delete


def cancel_endpoint(upstream: Upstream) -> Any:
    """POST /v1/responses/{response}/cancel."""

    async def cancel(request: Request) -> Response:
        message = pb.CancelResponseRequest(response=request.path_params["response"])
        data, headers = await upstream.unary(CANCEL, request, message.SerializeToString())
        out = response_objects.response(pb.CancelResponseResponse.FromString(data).response)
        return Response(dumps(out), media_type="application/json", headers=headers)

    return cancel


def items_endpoint(upstream: Upstream) -> Any:
    """GET /v1/responses/{response}/input_items."""

    async def items(request: Request) -> Response:
        query = fields.query(request, ("limit", "order", "after"))
        message = pb.ListInputItemsRequest(
            response=request.path_params["response"],
            oldest_first=fields.order(query),
            page_size=fields.limit(query, 100),
            after=query.get("after", ""),
        )
        data, headers = await upstream.unary(ITEMS, request, message.SerializeToString())
        page = pb.ListInputItemsResponse.FromString(data)
        found = [response_objects.item(x, "completed") for x in page.items]
        out = fields.listed(found, bool(page.next_page_token))
        return Response(dumps(out), media_type="application/json", headers=headers)

    return items


def read(body: dict[str, Any]) -> pb.CreateResponseRequest:
    """The request. Raises InvalidArgument that names what is wrong, or not supported."""
    fields.only(body, KNOWN)
    out = pb.CreateResponseRequest(
        model=fields.text(body, "model"),
        instructions=fields.text(body, "instructions", ""),
        previous_response=fields.text(body, "previous_response_id", ""),
        background=fields.flag(body, "background"),
        adapter=fields.text(body, "adapter", ""),
        priority=fields.number(body, "priority") or 0,
        user=fields.text(body, "user", "") or fields.text(body, "safety_identifier", ""),
        truncate_prompt=_truncation(body),
        metadata=fields.metadata(body),
    )
    for name in ("store", "parallel_tool_calls", "cache"):
        if body.get(name) is not None:
            setattr(out, name, fields.flag(body, name))
    tier = body.get("service_tier")
    if tier not in (None, "auto", "default"):
        raise InvalidArgument.at("service_tier", f"is {tier!r:.40}; allowed are auto, default")
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise InvalidArgument.at("stream_options", "an object is needed")
    for name, value in options.items():
        if name != "include_obfuscation" or value:
            raise InvalidArgument.at(f"stream_options.{name}", "is not supported here")
    _input(body.get("input"), out)
    _tools(body, out)
    _text(body.get("text"), out.response_format)
    _sampling(body, out.sampling)
    values = body.get("chat_template_kwargs")
    if values is not None:
        out.template_values = orjson.dumps(values).decode()
    return out


def _truncation(body: dict[str, Any]) -> bool:
    value = body.get("truncation")
    if value not in (None, "auto", "disabled"):
        raise InvalidArgument.at("truncation", f"is {value!r:.40}; allowed are auto, disabled")
    return value == "auto"


def _sampling(body: dict[str, Any], out: generation_pb.Sampling) -> None:
    generation.sampling({k: v for k, v in body.items() if k != "max_tokens"}, out)
    most = generation.whole(body, "max_output_tokens")
    if most is not None:
        out.max_tokens = most
    include = fields.items(body, "include")
    for i, name in enumerate(include):
        if name != LOGPROBS:
            raise InvalidArgument.at(
                f"include[{i}]", f"is {name!r:.60}; supported here is {LOGPROBS}"
            )
    top = fields.number(body, "top_logprobs")
    if top or include:
        out.logprobs = top or 0


def _input(value: Any, out: pb.CreateResponseRequest) -> None:
    if value is None:
        return
    if isinstance(value, str):
        message = out.input.add().message
        message.role = generation_pb.CHAT_ROLE_USER
        message.content.add(text=value)
        return
    if not isinstance(value, list):
        raise InvalidArgument.at("input", "must be a string or a list of items")
    for i, one in enumerate(value):
        at = f"input[{i}]"
        if not isinstance(one, dict):
            raise InvalidArgument.at(at, "an object is needed")
        kind = one.get("type", "message")
        reader = fields.named(_READERS, kind)
        if reader is None:
            raise InvalidArgument.at(
                f"{at}.type", f"is {kind!r:.40}; supported are {', '.join(_READERS)}"
            )
        item = out.input.add(id=fields.text(one, "id", "", at))
        reader(one, at, item)


def _message(value: dict[str, Any], at: str, item: pb.ResponseItem) -> None:
    role = fields.named(ROLES, value.get("role"))
    if role is None or role == generation_pb.CHAT_ROLE_TOOL:
        raise InvalidArgument.at(
            f"{at}.role",
            f"is {value.get('role')!r:.40}; allowed are user, assistant, system, developer",
        )
    fields.only(value, ("type", "id", "role", "content", "status", "phase"), at)
    item.message.role = role
    content = value.get("content")
    if isinstance(content, str):
        item.message.content.add(text=content)
        return
    if not isinstance(content, list):
        raise InvalidArgument.at(f"{at}.content", "must be a string or a list of parts")
    for i, part in enumerate(content):
        _part(part, f"{at}.content[{i}]", item.message)


def _part(value: Any, at: str, message: generation_pb.ChatMessage) -> None:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind in ("input_text", "output_text", "text"):
        message.content.add(text=fields.text(value, "text", at=at))
    elif kind == "refusal":
        message.refusal += fields.text(value, "refusal", at=at)
    elif kind == "input_image":
        if value.get("file_id"):
            raise InvalidArgument.at(f"{at}.file_id", "is not supported here; give image_url")
        generation.image(value.get("image_url"), f"{at}.image_url", message.content.add().image)
    else:
        raise InvalidArgument.at(
            f"{at}.type", f"is {kind!r:.40}; supported are input_text, output_text, input_image"
        )


def _call(value: dict[str, Any], at: str, item: pb.ResponseItem) -> None:
    fields.only(value, ("type", "id", "call_id", "name", "arguments", "status"), at)
    item.tool_call.id = fields.text(value, "call_id", at=at)
    item.tool_call.name = fields.text(value, "name", at=at)
    item.tool_call.arguments = fields.text(value, "arguments", "{}", at)


def _output(value: dict[str, Any], at: str, item: pb.ResponseItem) -> None:
    fields.only(value, ("type", "id", "call_id", "output", "status"), at)
    item.tool_output.call_id = fields.text(value, "call_id", at=at)
    given = value.get("output")
    if isinstance(given, str):
        item.tool_output.output = given
        return
    if not isinstance(given, list):
        raise InvalidArgument.at(f"{at}.output", "must be a string or a list of text parts")
    texts = []
    for i, part in enumerate(given):
        if not isinstance(part, dict) or part.get("type") not in ("input_text", "output_text"):
            raise InvalidArgument.at(f"{at}.output[{i}].type", "only input_text is supported here")
        texts.append(fields.text(part, "text", at=f"{at}.output[{i}]"))
    item.tool_output.output = "".join(texts)


def _reasoning(value: dict[str, Any], at: str, item: pb.ResponseItem) -> None:
    fields.only(value, ("type", "id", "summary", "content", "status"), at)
    name = "content" if value.get("content") else "summary"
    texts = []
    for i, part in enumerate(fields.items(value, name, at)):
        if not isinstance(part, dict):
            raise InvalidArgument.at(f"{at}.{name}[{i}]", "an object is needed")
        texts.append(fields.text(part, "text", "", f"{at}.{name}[{i}]"))
    item.reasoning.text = "".join(texts)


_READERS = {
    "message": _message,
    "function_call": _call,
    "function_call_output": _output,
    "reasoning": _reasoning,
}


def _tools(body: dict[str, Any], out: pb.CreateResponseRequest) -> None:
    for i, tool in enumerate(fields.items(body, "tools")):
        if not isinstance(tool, dict) or tool.get("type") != "function":
            kind = tool.get("type") if isinstance(tool, dict) else None
            raise InvalidArgument.at(
                f"tools[{i}].type", f"is {kind!r:.40}; supported here is function"
            )
        parameters, at = tool.get("parameters"), f"tools[{i}]"
        out.tools.add(
            name=fields.text(tool, "name", at=at),
            description=fields.text(tool, "description", "", at),
            parameters="" if parameters is None else orjson.dumps(parameters).decode(),
            strict=fields.flag(tool, "strict", at=at),
        )
    choice = body.get("tool_choice")
    if isinstance(choice, str):
        if choice not in MODES:
            raise InvalidArgument.at(
                "tool_choice", f"is {choice!r:.40}; allowed are {', '.join(MODES)}, or a function"
            )
        out.tool_choice.mode = MODES[choice]
    elif choice is not None:
        if not isinstance(choice, dict) or choice.get("type") != "function":
            raise InvalidArgument.at("tool_choice.type", "supported here is function")
        out.tool_choice.mode = generation_pb.TOOL_MODE_NAMED
        out.tool_choice.name = fields.text(choice, "name", at="tool_choice")


def _text(value: Any, out: generation_pb.ResponseFormat) -> None:
    if value is None:
        return
    if not isinstance(value, dict):
        raise InvalidArgument.at("text", "an object is needed")
    fields.only(value, ("format",), "text")
    form = value.get("format")
    if form is None:
        return
    kind = form.get("type") if isinstance(form, dict) else None
    if kind == "json_schema":
        schema = form.get("schema")
        if not isinstance(schema, dict):
            raise InvalidArgument.at("text.format.schema", "is required")
        out.json_schema = orjson.dumps(schema).decode()
        out.name = fields.text(form, "name", "", "text.format")
    elif kind == "json_object":
        out.json_object = True
    elif kind != "text":
        raise InvalidArgument.at(
            "text.format.type", f"is {kind!r:.40}; allowed are text, json_object, json_schema"
        )
