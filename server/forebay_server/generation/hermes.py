"""Tool calls in the form of Hermes, Qwen and many others, read from a stream.

`<tool_call>{"name": "f", "arguments": {...}}</tool_call>`: arguments are passed on as they come.
Text that begins like a call and is none is given as text. For engines without parsers of their own;
vLLM's are used where vLLM runs.
"""

from __future__ import annotations

import json
import re
import uuid

from forebay_server.core.generation import ToolCallPiece

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_HEAD = re.compile(
    r'\s*\{\s*"name"\s*:\s*"((?:[^"\\]|\\.)*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)


class HermesParser:
    """One answer's text, piece by piece."""

    def __init__(self) -> None:
        self._text = ""
        self._call: _Call | None = None
        self.calls = 0

    def feed(self, text: str) -> tuple[str, list[ToolCallPiece]]:
        """Text and pieces of calls that are sure by now."""
        self._text += text
        said: list[str] = []
        pieces: list[ToolCallPiece] = []
        while self._step(said, pieces):
            pass
        return "".join(said), pieces

    def _step(self, said: list[str], pieces: list[ToolCallPiece]) -> bool:
        """Take the next sure part of the text; False when more is needed."""
        if self._call is None:
            at = self._text.find(OPEN)
            if at < 0:
                keep = _overlap(self._text, OPEN)
                sure = self._text[: len(self._text) - keep]
                if self.calls and not sure.strip():  # line breaks between calls are no answer
                    return False
                self._text = self._text[len(sure) :]
                said.append(sure)
                return False
            before = self._text[:at]
            said.append(before.rstrip("\n") if not self.calls else before.strip())
            self._text = self._text[at + len(OPEN) :]
            self._call = _Call(self.calls)
            return True
        at = self._text.find(CLOSE)
        keep = 0 if at >= 0 else _overlap(self._text, CLOSE)
        part = self._text[: at if at >= 0 else len(self._text) - keep]
        self._text = self._text[len(part) :]
        pieces.extend(self._call.feed(part))
        if at < 0:
            return False
        self._text = self._text[len(CLOSE) :]
        self._close(said, pieces)
        return True

    def _close(self, said: list[str], pieces: list[ToolCallPiece]) -> None:
        call, self._call = self._call, None
        assert call is not None
        pieces.extend(call.close())
        if call.named:
            self.calls += 1
        else:
            said.append(OPEN + call.raw + CLOSE)

    def finish(self) -> tuple[str, list[ToolCallPiece]]:
        """What is left at the end. A call without its closing mark still counts when it is whole."""
        said: list[str] = []
        pieces: list[ToolCallPiece] = []
        if self._call is not None:
            call, self._call = self._call, None
            pieces.extend(call.feed(self._text))
            pieces.extend(call.close())
            if call.named:
                self.calls += 1
            else:
                said.append(OPEN + call.raw)
        elif not self.calls or self._text.strip():
            said.append(self._text)
        self._text = ""
        return "".join(said), pieces


class _Call:
    """One call's JSON."""

    def __init__(self, number: int) -> None:
        self._number = number
        self.raw = ""
        self.named = False
        self._depth = 0
        self._in_string = self._escaped = self._ended = False

    def feed(self, text: str) -> list[ToolCallPiece]:
        """Pieces, once the name is known and the arguments have begun."""
        self.raw += text
        if self.named:
            return self._arguments(text)
        head = _HEAD.match(self.raw)
        if head is None:
            return []
        self.named = True
        name = json.loads(f'"{head[1]}"')
        first = ToolCallPiece(self._number, call_id(), name)
        return [first, *self._arguments(self.raw[head.end() :])]

    def _arguments(self, text: str) -> list[ToolCallPiece]:
        """The part of the text that belongs to the arguments' value."""
        if self._ended:
            return []
        for i, c in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif c == "\\":
                    self._escaped = True
                elif c == '"':
                    self._in_string = False
            elif c == '"':
                self._in_string = True
            elif c in "{[":
                self._depth += 1
            elif c in "}]":
                self._depth -= 1
            if self._depth == 0 and not self._in_string:
                self._ended = True
                text = text[: i + 1]
                break
        return [ToolCallPiece(self._number, arguments=text)] if text else []

    def close(self) -> list[ToolCallPiece]:
        """Calls that are written in another order, all at once. Arguments are an object, or a string
        that holds one: what has others is no call."""
        if self.named:
            return []
        try:
            value = json.loads(self.raw)
            name, arguments = value["name"], value.get("arguments", value.get("parameters", {}))
            if isinstance(arguments, str):
                arguments = json.loads(arguments)
        except (ValueError, KeyError, TypeError, AttributeError):
            return []
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return []
        self.named = True
        text = json.dumps(arguments, ensure_ascii=False)
        return [ToolCallPiece(self._number, call_id(), name, text)]


def call_id() -> str:
    """Id of a new call."""
    return f"call_{uuid.uuid4().hex[:24]}"


def _overlap(text: str, mark: str) -> int:
    """How many characters at the text's end may be the beginning of the mark."""
    for n in range(min(len(mark) - 1, len(text)), 0, -1):
        if mark.startswith(text[-n:]):
            return n
    return 0
