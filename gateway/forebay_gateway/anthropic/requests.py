"""Bodies of /v1/messages and /v1/messages/count_tokens: Anthropic's requests to the contract's."""

from __future__ import annotations

from typing import Any

import orjson
from forebay.errors import InvalidArgument
from forebay.v1 import generation_pb2 as pb

from forebay_gateway.anthropic.places import Places
from forebay_gateway.openai import fields, generation

KNOWN = (
    "model",
    "messages",
    "system",
    "max_tokens",
    "stop_sequences",
    "temperature",
    "top_p",
    "top_k",
    "tools",
    "tool_choice",
    "stream",
    "metadata",
    "cache_control",
    "output_config",
)
#: Of /v1/messages/count_tokens: what the prompt is made of.
COUNTED = (
    "model",
    "messages",
    "system",
    "tools",
    "tool_choice",
    "cache_control",
    "output_config",
)
ROLES = {
    "user": pb.CHAT_ROLE_USER,
    "assistant": pb.CHAT_ROLE_ASSISTANT,
    "system": pb.CHAT_ROLE_SYSTEM,
}
#: What each kind of block may have, besides its type.
BLOCKS = {
    "text": ("text", "cache_control"),
    "image": ("source", "cache_control"),
    "tool_use": ("id", "name", "input", "cache_control"),
    "tool_result": ("tool_use_id", "content", "is_error", "cache_control"),
    "thinking": ("thinking", "signature"),
}
TOOL_FIELDS = ("type", "name", "description", "input_schema", "strict", "cache_control")
#: What the model reads before the result of a tool that failed: chat templates have no place for it.
FAILED = "Error: "


def read(body: dict[str, Any], places: Places) -> pb.ChatRequest:
    """The request, and where its parts came from. Raises InvalidArgument that names what is wrong, or
    not supported."""
    fields.only(body, KNOWN)
    out = _conversation(body, places)
    if body.get("max_tokens") is None:
        raise InvalidArgument.at("max_tokens", "is required")
    generation.sampling(
        {k: body.get(k) for k in ("max_tokens", "temperature", "top_p", "top_k")}, out.sampling
    )
    if body.get("stop_sequences"):
        out.sampling.stop.extend(fields.texts(body, "stop_sequences"))
    metadata = body.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise InvalidArgument.at("metadata", "an object is needed")
    fields.only(metadata, ("user_id",), "metadata")
    out.user = fields.text(metadata, "user_id", "", "metadata")
    return out


def read_counted(body: dict[str, Any], places: Places) -> pb.ChatRequest:
    """The request of a body of /v1/messages/count_tokens; as `read` otherwise."""
    fields.only(body, COUNTED)
    return _conversation(body, places)


def _conversation(body: dict[str, Any], places: Places) -> pb.ChatRequest:
    """What both have: all that the prompt is made of."""
    _cache_control(body)
    out = pb.ChatRequest(model=fields.text(body, "model"))
    system = body.get("system")
    if system:
        said = out.messages.add(role=pb.CHAT_ROLE_SYSTEM)
        places.add("messages[0]", "system")
        places.add("messages[0].content", "system")
        if isinstance(system, str):
            places.add("messages[0].content[0].text", "system")
        for part in _texts(body, "system"):
            said.content.add(text=part)
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise InvalidArgument.at("messages", "must be a list of messages that is not empty")
    for i, one in enumerate(messages):
        _message(one, f"messages[{i}]", out, places)
    _tools(body, out, places)
    _form(body, out)
    return out


def _form(body: dict[str, Any], out: pb.ChatRequest) -> None:
    """The form of the answer, as `messages.parse` of the SDK asks for it."""
    config = body.get("output_config")
    if config is None:
        return
    if not isinstance(config, dict):
        raise InvalidArgument.at("output_config", "an object is needed")
    fields.only(config, ("format",), "output_config")
    form, at = config.get("format"), "output_config.format"
    if form is None:
        return
    if not isinstance(form, dict) or form.get("type") != "json_schema":
        raise InvalidArgument.at(f"{at}.type", "allowed is json_schema")
    fields.only(form, ("type", "schema"), at)
    if not isinstance(form.get("schema"), dict):
        raise InvalidArgument.at(f"{at}.schema", "an object is needed")
    out.response_format.json_schema = orjson.dumps(form["schema"]).decode()


def _cache_control(value: dict[str, Any], at: str = "") -> None:
    """A hint where a prompt may be cached. Engines that have a prefix cache need none: it is read, so
    that a mistake is told, and has no effect."""
    hint, path = value.get("cache_control"), f"{at}.cache_control" if at else "cache_control"
    if hint is None:
        return
    if not isinstance(hint, dict):
        raise InvalidArgument.at(path, f"is a {fields.kind(hint)}; an object is needed")
    fields.only(hint, ("type", "ttl"), path)
    for name, allowed in (("type", ("ephemeral",)), ("ttl", (None, "5m", "1h"))):
        if hint.get(name) not in allowed:
            words = ", ".join(w for w in allowed if w)
            raise InvalidArgument.at(
                f"{path}.{name}", f"is {hint.get(name)!r:.40}; allowed are {words}"
            )


def _known(block: Any, path: str) -> str:
    """The kind of a block, all of whose fields are known."""
    kind = block.get("type") if isinstance(block, dict) else None
    known = fields.named(BLOCKS, kind)
    if known is None:
        raise InvalidArgument.at(
            f"{path}.type", f"is {kind!r:.40}; supported are {', '.join(BLOCKS)}"
        )
    fields.only(block, ("type", *known), path)
    _cache_control(block, path)
    return block["type"]


def _texts(value: dict[str, Any], name: str, at: str = "") -> list[str]:
    """A string, or text blocks."""
    if isinstance(value.get(name), str):
        return [value[name]]
    out, path = [], f"{at}.{name}" if at else name
    for i, part in enumerate(fields.items(value, name, at)):
        here = f"{path}[{i}]"
        if not isinstance(part, dict) or part.get("type") != "text":
            raise InvalidArgument.at(here, "must be a text block")
        _known(part, here)
        out.append(fields.text(part, "text", at=here))
    return out


def _message(value: Any, path: str, out: pb.ChatRequest, places: Places) -> None:
    given = value.get("role") if isinstance(value, dict) else None
    role = fields.named(ROLES, given)
    if role is None:
        raise InvalidArgument.at(
            f"{path}.role", f"is {given!r:.40}; allowed are {', '.join(ROLES)}"
        )
    fields.only(value, ("role", "content"), path)
    content = value.get("content")
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(blocks, list):
        raise InvalidArgument.at(f"{path}.content", "must be a string or a list of blocks")
    # Results of tools come within a user's turn here; in the contract they are messages.
    said = pb.ChatMessage(role=role)
    parts: list[tuple[str, str]] = []
    for i, block in enumerate(blocks):
        parts += _block(block, f"{path}.content[{i}]", said, out, places)
    if isinstance(content, str):
        parts = [("content[0].text", f"{path}.content")]
    if said.content or said.tool_calls or said.reasoning:
        here = f"messages[{len(out.messages)}]"
        places.add(here, path)
        for name, place in parts:
            places.add(f"{here}.{name}", place)
        out.messages.append(said)


def _block(
    block: Any, path: str, said: pb.ChatMessage, out: pb.ChatRequest, places: Places
) -> list[tuple[str, str]]:
    """Read a block; gives which parts of what is said came from where."""
    kind = _known(block, path)
    here = f"content[{len(said.content)}]"
    if kind == "text":
        said.content.add(text=fields.text(block, "text", at=path))
        return [(here, path)]
    if kind == "image":
        generation.image(_address(block, path), f"{path}.source", said.content.add().image)
        return [(here, path), (f"{here}.image", f"{path}.source")]
    if kind == "tool_use":
        given = block.get("input") or {}
        if not isinstance(given, dict):
            raise InvalidArgument.at(f"{path}.input", "an object is needed")
        said.tool_calls.add(
            id=fields.text(block, "id", at=path),
            name=fields.text(block, "name", at=path),
            arguments=orjson.dumps(given).decode(),
        )
        call = f"tool_calls[{len(said.tool_calls) - 1}]"
        return [(call, path), (f"{call}.arguments", f"{path}.input")]
    if kind == "tool_result":
        _result(block, path, out, places)
    else:
        said.reasoning += fields.text(block, "thinking", "", path)
    return []


def _address(block: dict[str, Any], path: str) -> Any:
    """A picture's address, which may have its data."""
    source, at = block.get("source"), f"{path}.source"
    if not isinstance(source, dict):
        raise InvalidArgument.at(at, "an object is needed")
    kind = source.get("type")
    if kind == "base64":
        fields.only(source, ("type", "media_type", "data"), at)
        media = fields.text(source, "media_type", at=at)
        return f"data:{media};base64,{fields.text(source, 'data', at=at)}"
    if kind != "url":
        raise InvalidArgument.at(f"{at}.type", f"is {kind!r:.40}; supported are base64, url")
    fields.only(source, ("type", "url"), at)
    return source.get("url")


def _result(block: dict[str, Any], path: str, out: pb.ChatRequest, places: Places) -> None:
    """What a tool answered: a message of its own."""
    here = f"messages[{len(out.messages)}]"
    places.add(here, path)
    places.add(f"{here}.tool_call_id", f"{path}.tool_use_id")
    if isinstance(block.get("content"), str):
        places.add(f"{here}.content[0].text", f"{path}.content")
    result = out.messages.add(
        role=pb.CHAT_ROLE_TOOL, tool_call_id=fields.text(block, "tool_use_id", at=path)
    )
    texts = _texts(block, "content", path)
    if fields.flag(block, "is_error", at=path):
        first, *others = texts or ["the tool failed"]
        texts = [FAILED + first, *others]
    for text in texts:
        result.content.add(text=text)


def _tools(body: dict[str, Any], out: pb.ChatRequest, places: Places) -> None:
    for i, tool in enumerate(fields.items(body, "tools")):
        if not isinstance(tool, dict) or (tool.get("type") or "custom") != "custom":
            raise InvalidArgument.at(f"tools[{i}].type", "only tools of the caller are supported")
        schema, at = tool.get("input_schema") or {}, f"tools[{i}]"
        fields.only(tool, TOOL_FIELDS, at)
        _cache_control(tool, at)
        places.add(f"{at}.parameters", f"{at}.input_schema")
        out.tools.add(
            name=fields.text(tool, "name", at=at),
            description=fields.text(tool, "description", "", at),
            parameters=orjson.dumps(schema).decode(),
            strict=fields.flag(tool, "strict", at=at),
        )
    choice = body.get("tool_choice")
    if choice is None:
        return
    modes = {
        "auto": pb.TOOL_MODE_AUTO,
        "any": pb.TOOL_MODE_REQUIRED,
        "none": pb.TOOL_MODE_NONE,
        "tool": pb.TOOL_MODE_NAMED,
    }
    kind = choice.get("type") if isinstance(choice, dict) else None
    mode = fields.named(modes, kind)
    if mode is None:
        raise InvalidArgument.at(
            "tool_choice.type", f"is {kind!r:.40}; allowed are {', '.join(modes)}"
        )
    fields.only(choice, ("type", "name", "disable_parallel_tool_use"), "tool_choice")
    out.tool_choice.mode = mode
    out.tool_choice.name = fields.text(choice, "name", "", "tool_choice")
    if fields.flag(choice, "disable_parallel_tool_use", at="tool_choice"):
        out.parallel_tool_calls = False
