"""What is wrong with a file that a person wrote, in one line: the place, and what is allowed there."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import yaml
from pydantic import BaseModel, ValidationError

#: A path from the root, as runtimes name files in what they say; not that of a URL.
_PATH = re.compile(r"""(?<![\w/.])(?:/[^/\s'",;:()]+)*/([^/\s'",;:()]+)""")


def without_folders(text: str, root: Path) -> str:
    """A fault with its files named by their last part alone: where they lie is not for every caller.

    Args:
        root: of the model repository; its own name may have any characters.
    """
    for folder in {str(root), str(root.resolve())}:
        text = text.replace(f"{folder}/", "/")
    return _PATH.sub(r"\1", text)


def explain(error: Exception, kind: type[BaseModel]) -> str:
    """The first fault of a file that should have been a `kind`."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        where = ".".join(str(p) for p in first["loc"])
        if first["type"] != "extra_forbidden":
            return f"{where}: {first['msg']}"
        keys = ", ".join(_keys(kind, first["loc"]))
        return f"{where}: is no key here; known are {keys}"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark  # its own text draws the place, in several lines
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return str(error)


def _keys(kind: type[BaseModel], where: Sequence[int | str]) -> list[str]:
    """The keys of the section, or of the list's element, in which the last one of `where` is."""
    for part in where[:-1]:
        field = kind.model_fields.get(str(part))
        for inner in (field.annotation, *get_args(field.annotation)) if field else ():
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                kind = inner
    return list(kind.model_fields)
