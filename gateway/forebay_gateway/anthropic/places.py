"""Where the fields of the contract's request came from in a body of Anthropic's shape.

Its messages are not the contract's: `system` is one of those, results of tools are messages of their own,
and a call is no part of the content. So a path in an error is looked up, longest beginning first.
"""

from __future__ import annotations

from google.rpc import status_pb2

from forebay_gateway.openai import generation

_FIXED = {
    "sampling.stop": "stop_sequences",
    "tool_choice.mode": "tool_choice.type",
    "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
    "user": "metadata.user_id",
    "response_format": "output_config.format",
    "response_format.json_schema": "output_config.format.schema",
}


class Places:
    """Paths of one body by the contract's."""

    def __init__(self) -> None:
        self._known = dict(_FIXED)

    def add(self, path: str, place: str) -> None:
        """What is at `path` in the contract's request is at `place` in the body."""
        self._known[path] = place

    def of(self, path: str) -> str:
        """The body's path."""
        path = path.removeprefix("request.")
        head = path
        while head not in self._known:
            cut = max(head.rfind("."), head.rfind("["))
            if cut < 0:
                return path.removeprefix("sampling.")
            head = head[:cut]
        return self._known[head] + path[len(head) :]

    def rename(self, status: status_pb2.Status) -> status_pb2.Status:
        """The status with the body's paths."""
        return generation.rewritten(status, self.of)
