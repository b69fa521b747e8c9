"""What answers need of a language model: the seam for GenerationService."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from forebay_server.core.call import Call

#: The default prompt. {context} are the numbered chunks.
PROMPT = """Answer the question from the following context alone. Put the number of the chunk that a \
statement rests on behind it, like [1]. Quote word by word where that helps. When the context does \
not hold the answer, reply exactly: NOT IN THE DOCUMENTS.

Context:
{context}

Question: {question}"""
#: What a model replies when the context does not hold the answer.
NOT_FOUND = "NOT IN THE DOCUMENTS"


@dataclass(frozen=True, slots=True)
class Message:
    """A message of a chat."""

    role: Literal["system", "user", "assistant"]
    text: str


class Writer(Protocol):
    """A language model that writes answers."""

    def write(self, call: Call, messages: Sequence[Message]) -> AsyncIterator[str]:
        """Pieces of the reply, as they come. The call's deadline and cancellation hold; its usage
        is added to the call's facts."""
        ...
