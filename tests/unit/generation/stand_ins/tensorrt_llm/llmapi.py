"""See the package."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(kw_only=True)
class GuidedDecodingParams:
    """A form."""

    json: Any = None
    regex: str | None = None
    grammar: str | None = None
    json_object: bool = False
