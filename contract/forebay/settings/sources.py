"""Where settings come from: a file, the environment, flags."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from forebay.settings.sections import Section, Settings, SettingsError

PREFIX = "FOREBAY_"
#: Short names of the settings that everybody sets.
SHORT = {
    "FOREBAY_HOME": "home",
    "FOREBAY_GRPC_PORT": "grpc.port",
    "FOREBAY_HTTP_PORT": "http.port",
    "FOREBAY_CONFIG": "",
    "FOREBAY_KEY": "",  # of commands that call a server; no setting
    "FOREBAY_DATA": "data",
}
#: Settings that may hold passwords: never shown, not even in an error.
SECRET = ("storage.database", "storage.redis", "retrieval.qdrant_api_key")
#: What Kubernetes puts into the environment of pods for each service of their namespace.
_SERVICE_LINK = re.compile(
    r"FOREBAY_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)"
)
_SERVICE_URL = re.compile(r"(tcp|udp|sctp)://")


@dataclass(frozen=True, slots=True)
class Loaded:
    """Settings in force and where each one came from."""

    settings: Settings
    sources: dict[str, str]

    def explain(self) -> list[tuple[str, str, str]]:
        """Dotted name, value (secrets masked) and source of every setting."""
        return [
            (name, str(value), self.sources.get(name, "default"))
            for name, value in _flatten(self.settings.model_dump(mode="json"))
        ]


def load_settings(
    flags: Mapping[str, Any] | None = None,
    config_file: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> Loaded:
    """Read all sources.

    Args:
        flags: dotted names to values; None values are left out.
        config_file: the YAML file; default: FOREBAY_CONFIG.
        environ: the environment; default: the process's own.

    Raises:
        SettingsError: naming the key, its source, and what is allowed.
    """
    env = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    path = config_file or (Path(env["FOREBAY_CONFIG"]) if env.get("FOREBAY_CONFIG") else None)
    if path is not None:
        for name, value in _flatten(_read_yaml(path)):
            values[name], sources[name] = value, str(path)
    for variable, value in env.items():
        if not variable.startswith(PREFIX) or (variable in SHORT and not SHORT[variable]):
            continue
        if _SERVICE_LINK.fullmatch(variable) or _SERVICE_URL.match(value):
            continue
        name = SHORT.get(variable) or variable.removeprefix(PREFIX).lower().replace("__", ".")
        if name not in _NAMES:
            raise SettingsError(f"{variable} names no setting.{_hint(name)}")
        values[name], sources[name] = _typed(name, value), variable
    for name, value in (flags or {}).items():
        if value is not None:
            values[name], sources[name] = value, "--" + name.replace(".", "-")
    try:
        settings = Settings.model_validate(_nest(values))
    except ValidationError as e:
        raise SettingsError(_complaint(e, values, sources)) from None
    return Loaded(settings.model_copy(update={"home": settings.home.absolute()}), sources)


def _complaint(
    error: ValidationError, values: Mapping[str, Any], sources: Mapping[str, str]
) -> str:
    """One line on the first fault: key, value, source, what is allowed."""
    first = error.errors(include_url=False, include_input=False)[0]
    name = ".".join(str(p) for p in first["loc"])
    given = next((n for n in values if name == n or name.startswith(f"{n}.")), None)
    if given is None:  # a rule about a whole section: blame what was given of it
        given = next((n for n in values if n.startswith(f"{name}.")), None)
    source = sources[given] if given is not None else "default"
    if first["type"] == "extra_forbidden":
        # Of an unknown section, what was given in it tells more than its own name.
        name = given or name
        return f"{name} (from {source}) names no setting.{_hint(name)}"
    said = first["msg"].removeprefix("Value error, ")
    if given is None or not name.startswith(given):
        return f"{name} (from {source}): {said}"
    secret = any(name == s or s.startswith(f"{name}.") for s in SECRET)
    return f"{name} is {'<hidden>' if secret else repr(values[given])} (from {source}): {said}"


def _hint(name: str) -> str:
    known = _NAMES if "." in name else (_NAMES | _SECTIONS) - {name}
    last = name.rpartition(".")[2]
    near = difflib.get_close_matches(name, known, n=3)
    near = near or sorted(n for n in _NAMES if n.rpartition(".")[2] == last)[:3]
    meant = f" Did you mean {', '.join(near)}?" if near else ""
    return f"{meant} `forebay config` lists them all"


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as e:
        raise SettingsError(f"{path}: {_place(e)}") from None
    except (OSError, ValueError) as e:  # bytes that are no text, a 13th month
        raise SettingsError(f"{path}: {e}") from None
    if not isinstance(data, dict):
        raise SettingsError(f"{path}: a mapping is needed at the top")
    return data


def _place(error: yaml.YAMLError) -> str:
    """What is wrong and where. The error's own text quotes the line, which may hold a password."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return str(error)
    mark = error.problem_mark
    return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"


def _typed(name: str, text: str) -> Any:
    """A variable's value: lists as YAML, everything else as text, which Pydantic converts."""
    if name not in _LISTS:
        return text
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return [value] if isinstance(value, str) else value


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    out: list[tuple[str, Any]] = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if value is None and not prefix and name in _SECTIONS:
            continue  # `grpc:` with nothing below it
        out.extend(_flatten(value, f"{name}.") if isinstance(value, dict) else [(name, value)])
    return out


def _nest(values: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in values.items():
        at = out
        *parents, last = name.split(".")
        for part in parents:
            below = at.setdefault(part, {})
            if not isinstance(below, dict):  # `grpc: 5` in the file: let Pydantic name it
                break
            at = below
        else:
            at[last] = value
    return out


_SECTIONS = frozenset(
    name
    for name, field in Settings.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
)
_DEFAULTS = dict(_flatten(Settings().model_dump(mode="json")))
_NAMES = frozenset(_DEFAULTS)
_LISTS = frozenset(name for name, value in _DEFAULTS.items() if isinstance(value, list))
