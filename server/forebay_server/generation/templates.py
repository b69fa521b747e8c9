"""Chat templates as Hugging Face writes them: Jinja in a sandbox, with its few helpers."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from jinja2 import Template, nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from forebay_server.generation.errors import TemplateRefused


class _Generation(Extension):
    """`{% generation %}`: marks what the model says, for training; nothing to do here."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any
) -> str:
    # Jinja's own filter escapes for HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise(message: str) -> None:
    raise TemplateRefused(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


@lru_cache(maxsize=64)
def _compile(source: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=_raise, strftime_now=_now)
    return environment.from_string(source)


def render(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    values: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """The prompt's text. Raises TemplateRefused when the template cannot take the messages."""
    try:
        # As one mapping: callers name values, and a name such as `self` is a parameter of `render`.
        return _compile(source).render({**values, "messages": messages})
    except TemplateRefused:
        raise
    except (TemplateError, TypeError, ValueError, KeyError) as e:
        raise TemplateRefused(str(e)[:300]) from None
