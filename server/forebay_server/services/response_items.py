"""Items of conversations: to the messages that models read, and from the deltas that they write."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from forebay.errors import FieldViolation, InvalidArgument
from forebay.v1 import generation_pb2 as generation
from forebay.v1 import response_pb2 as pb

from forebay_server.core.generation import GenerationDelta, TokenProbability, ToolCallPiece
from forebay_server.services import generation_messages as messages

Event = pb.CreateResponseStreamResponse
_PREFIX = {
    "message": "msg",
    "tool_call": "fc",
    "tool_output": "fco",
    "reasoning": "rs",
    "refusal": "msg",
}


def new_id(prefix: str) -> str:
    """An id that nobody guesses."""
    return f"{prefix}_{secrets.token_hex(16)}"


def name_items(items: Iterable[pb.ResponseItem], path: str) -> None:
    """Give ids to items that have none. Raises InvalidArgument for items that are nothing."""
    for i, item in enumerate(items):
        kind = item.WhichOneof("item")
        if kind is None:
            raise InvalidArgument.at(f"{path}[{i}].item", "is required")
        if not item.id:
            item.id = new_id(_PREFIX[kind])


@dataclass(slots=True)
class Conversation:
    """Messages of a conversation, and the input item that each came from (-1: from before)."""

    messages: list[generation.ChatMessage] = field(default_factory=list)
    origin: list[int] = field(default_factory=list)
    _calls: set[str] = field(default_factory=set)
    _thought: str = ""

    def instructions(self, text: str) -> None:
        """What the application says first."""
        message = generation.ChatMessage(role=generation.CHAT_ROLE_SYSTEM)
        message.content.add(text=text)
        self._add(message, -1)

    def extend(self, items: Iterable[pb.ResponseItem], new: bool, path: str) -> None:
        """Add items. Raises InvalidArgument for tool outputs that answer no call."""
        for i, item in enumerate(items):
            kind, at = item.WhichOneof("item"), i if new else -1
            if kind == "reasoning":
                self._thought = item.reasoning.text
            elif kind == "tool_call":
                self._calls.add(item.tool_call.id)
                self._assistant(at).tool_calls.append(item.tool_call)
            elif kind == "tool_output":
                output = item.tool_output
                if output.call_id not in self._calls:
                    raise InvalidArgument.at(
                        f"{path}[{i}].tool_output.call_id",
                        f"is {output.call_id!r:.80}, which no call of this conversation has",
                    )
                message = generation.ChatMessage(
                    role=generation.CHAT_ROLE_TOOL, tool_call_id=output.call_id
                )
                message.content.add(text=output.output)
                self._add(message, at)
            elif kind == "message":
                said = item.message
                message = generation.ChatMessage(
                    role=said.role, content=said.content, name=said.name, refusal=said.refusal
                )
                if said.role == generation.CHAT_ROLE_ASSISTANT:
                    message.reasoning, self._thought = self._thought, ""
                self._add(message, at)

    def _assistant(self, at: int) -> generation.ChatMessage:
        """The assistant's turn that a call belongs to: calls follow what was said with them."""
        last = self.messages[-1] if self.messages else None
        if last is None or last.role != generation.CHAT_ROLE_ASSISTANT:
            last = generation.ChatMessage(role=generation.CHAT_ROLE_ASSISTANT)
            last.reasoning, self._thought = self._thought, ""
            self._add(last, at)
        return last

    def _add(self, message: generation.ChatMessage, at: int) -> None:
        self.messages.append(message)
        self.origin.append(at)

    def blamed(self, error: InvalidArgument, path: str) -> InvalidArgument:
        """An error about messages, in terms of the request's items."""
        out = []
        for v in error.violations:
            name = v.field
            start = f"{path}messages"
            if name.startswith(f"{start}["):
                number, _, rest = name[len(start) + 1 :].partition("]")
                at = self.origin[int(number)]
                name = f"{path}input[{at}]{rest}" if at >= 0 else f"{path}previous_response"
            elif name == start:
                name = f"{path}input"
            out.append(FieldViolation(name, v.description))
        return InvalidArgument(out, reason=error.reason, metadata=error.metadata)


class Output:
    """The items of one answer, put together from its deltas; each step as events."""

    def __init__(self) -> None:
        self.items: list[pb.ResponseItem] = []
        self.logprobs: list[generation.TokenLogprob] = []
        self.finish = "stop"
        self._open = ""
        self._call = -1
        self._parts: list[str] = []
        self._blanks = ""
        self._tokens: list[TokenProbability] = []

    def add(self, delta: GenerationDelta) -> Iterator[Event]:
        """One more delta."""
        if delta.reasoning:
            yield from self._begin("reasoning")
            yield self._delta(delta.reasoning)
        if delta.text or delta.logprobs:
            yield from self._say(delta)
        if delta.refusal:  # a message of its own: what was said before it stands
            yield from self._begin("refusal")
            event = self._delta(delta.refusal)
            event.item_delta.refusal, event.item_delta.text = event.item_delta.text, ""
            yield event
        for piece in delta.tool_calls:
            yield from self._tool(piece)
        if delta.finish_reason is not None:
            self.finish = delta.finish_reason

    def _say(self, delta: GenerationDelta) -> Iterator[Event]:
        """Text. Blanks that come first wait: before a tool call they are no message of their own."""
        text, tokens = delta.text, list(delta.logprobs)
        if self._open != "message":
            self._blanks += text
            self._tokens += tokens
            if not self._blanks.strip():
                return
            text, tokens = self._blanks, self._tokens
            self._blanks, self._tokens = "", []
        yield from self._begin("message")
        event = self._delta(text)
        messages.fill_logprobs(event.item_delta.logprobs, tokens)
        self.logprobs.extend(event.item_delta.logprobs)
        yield event

    def end(self) -> Iterator[Event]:
        """The answer has ended. One that said nothing is a message without words."""
        if not self.items:
            yield from self._begin("message")
            if self._blanks:
                yield self._delta(self._blanks)
        yield from self.close()

    def _tool(self, piece: ToolCallPiece) -> Iterator[Event]:
        if self._open != "tool_call" or self._call != piece.call:
            yield from self.close()
            self._call = piece.call
            call = generation.ToolCall(id=piece.id, name=piece.name)
            yield from self._begin("tool_call", pb.ResponseItem(tool_call=call))
        if piece.arguments:
            yield self._delta(piece.arguments)

    def _begin(self, kind: str, item: pb.ResponseItem | None = None) -> Iterator[Event]:
        if self._open == kind:
            return
        yield from self.close()
        item = item or pb.ResponseItem()
        item.id = new_id(_PREFIX[kind])
        if kind in ("message", "refusal"):
            item.message.role = generation.CHAT_ROLE_ASSISTANT
        elif kind == "reasoning":
            item.reasoning.SetInParent()
        self.items.append(item)
        self._open = kind
        added = pb.ResponseItemAdded(output_index=len(self.items) - 1, item=item)
        yield Event(item_added=added)

    def _delta(self, text: str) -> Event:
        self._parts.append(text)
        index = len(self.items) - 1
        delta = pb.ResponseItemDelta(output_index=index, item_id=self.items[-1].id, text=text)
        return Event(item_delta=delta)

    def close(self) -> Iterator[Event]:
        """The open item ends; nothing when none is open."""
        if not self._open:
            return
        item, text = self.items[-1], "".join(self._parts)
        if self._open == "message":
            item.message.content.add(text=text)
        elif self._open == "refusal":
            item.message.refusal = text
        elif self._open == "reasoning":
            item.reasoning.text = text
        else:
            item.tool_call.arguments = text
        self._open, self._parts = "", []
        done = pb.ResponseItemDone(
            output_index=len(self.items) - 1,
            item=item,
            incomplete=self.finish in ("length", "content_filter"),
        )
        yield Event(item_done=done)
