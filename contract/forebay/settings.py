"""All settings, and the only reader of the environment.

In rising order: defaults, a YAML file (`--config` or FOREBAY_CONFIG), environment variables, flags.
A variable names its setting with two underscores between levels: FOREBAY_GRPC__PORT is `grpc.port`.
FOREBAY_HOME, FOREBAY_GRPC_PORT and FOREBAY_HTTP_PORT are short names. An unknown key, in the file
or in the environment, stops the start as a wrong value does, with a line that names it.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

PREFIX = "FOREBAY_"
#: Short names of the settings that everybody sets.
SHORT = {
    "FOREBAY_HOME": "home",
    "FOREBAY_GRPC_PORT": "grpc.port",
    "FOREBAY_HTTP_PORT": "http.port",
    "FOREBAY_CONFIG": "",
    "FOREBAY_DATA": "data",
}


class SettingsError(Exception):
    """A setting that stops the start; the message names it, its source and what is allowed."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class GrpcSettings(_Section):
    """The gRPC server."""

    host: str = "127.0.0.1"
    port: int = Field(default=50051, ge=0, le=65535)
    max_message_bytes: int = Field(default=16 << 20, ge=1024, le=1 << 30)
    max_items_per_call: int = Field(default=8192, ge=1)
    max_connection_age_s: float = Field(default=0.0, ge=0, description="0 = connections stay")
    keepalive_s: float = Field(default=60.0, ge=1)
    drain_s: float = Field(default=30.0, ge=0, description="time for running calls at shutdown")
    ingest_threads: int = Field(default=1, ge=1, le=64)
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = Field(default=None, description="set: clients need a certificate")


class HttpSettings(_Section):
    """The gateway."""

    enabled: bool = True
    host: str = "127.0.0.1"
    port: int = Field(default=8080, ge=0, le=65535)
    upstream: str = Field(default="", description="gRPC target; empty = this machine's server")
    max_body_bytes: int = Field(default=16 << 20, ge=1024)
    cors_origins: list[str] = []
    timeout_s: float = Field(default=300.0, gt=0, description="when the caller names none")
    flagged_labels: list[str] = Field(
        default=["negative", "toxic"], description="labels that /v1/moderations flags"
    )


class ModelSettings(_Section):
    """The model repository."""

    root: Path | None = Field(default=None, description="default: models in the home folder")
    starters: bool = True
    poll_s: float = Field(default=5.0, gt=0)
    memory_budget_bytes: int = Field(default=0, ge=0, description="0 = no bound")
    providers: list[Literal["tensorrt", "cuda", "cpu"]] = ["cpu"]
    intra_op_threads: int = Field(default=0, ge=0, description="0 = by the model's kind")
    max_batch_tokens: int = Field(default=0, ge=0, description="0 = by the device")
    max_batch_size: int = Field(default=32, ge=1)
    max_batch_rows: int = Field(default=256, ge=1, description="for models on rows and tensors")
    max_queue_size: int = Field(default=4096, ge=1)


class AuthSettings(_Section):
    """Who may call."""

    required: Literal["auto", "always", "never"] = Field(
        default="auto", description="auto: keys are needed unless every address is loopback"
    )
    allow_insecure_bind: bool = Field(
        default=False, description="let a server without keys listen beyond loopback"
    )
    reload_s: float = Field(default=2.0, gt=0)


class StorageSettings(_Section):
    """Relational state, cache and limits."""

    database: SecretStr = Field(default=SecretStr(""), description="default: SQLite in home")
    redis: SecretStr = Field(
        default=SecretStr(""), description="empty: cache and limits in process"
    )
    cache_bytes: int = Field(default=64 << 20, ge=0)
    cache_ttl_s: int = Field(default=3600, ge=1, description="for Redis")


class ObservabilitySettings(_Section):
    """Logs, metrics, traces."""

    log_format: Literal["json", "console"] = "json"
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    access_log: bool = True
    metrics_port: int = Field(default=0, ge=-1, le=65535, description="0 = any free; -1 = none")
    otlp_endpoint: str = ""


class Settings(_Section):
    """The whole tree."""

    home: Path = Path("~/.forebay")
    data: Path | None = Field(default=None, description="folder with data for the starter models")
    grpc: GrpcSettings = GrpcSettings()
    http: HttpSettings = HttpSettings()
    models: ModelSettings = ModelSettings()
    auth: AuthSettings = AuthSettings()
    storage: StorageSettings = StorageSettings()
    observability: ObservabilitySettings = ObservabilitySettings()

    @property
    def models_root(self) -> Path:
        """Folder of the model repository."""
        return self.models.root or self.home / "models"

    @property
    def database_url(self) -> str:
        """SQLAlchemy's URL of the database."""
        given = self.storage.database.get_secret_value()
        return given or f"sqlite+aiosqlite:///{self.home / 'forebay.db'}"

    @property
    def keys_required(self) -> bool:
        """Whether calls need a key."""
        if self.auth.required == "auto":
            hosts = [self.grpc.host] + ([self.http.host] if self.http.enabled else [])
            return not all(is_loopback(h) for h in hosts)
        return self.auth.required == "always"

    def check_exposure(self) -> None:
        """Raise SettingsError for a server that listens beyond loopback and asks for no keys."""
        for name, host in (("grpc.host", self.grpc.host), ("http.host", self.http.host)):
            if (
                not is_loopback(host)
                and not self.keys_required
                and not self.auth.allow_insecure_bind
            ):
                raise SettingsError(
                    f"{name} is {host!r}, which others can reach, and auth.required is 'never'. "
                    "Set auth.required to 'always', or auth.allow_insecure_bind to true"
                )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost" or host.startswith("unix:"):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


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
        name = SHORT.get(variable) or variable.removeprefix(PREFIX).lower().replace("__", ".")
        if name not in _NAMES:
            raise SettingsError(f"{variable} names no setting; `forebay config` lists them all")
        values[name], sources[name] = _typed(value), variable
    for name, value in (flags or {}).items():
        if value is not None:
            values[name], sources[name] = value, "--" + name.replace(".", "-")
    try:
        settings = Settings.model_validate(_nest(values))
    except ValidationError as e:
        first = e.errors()[0]
        parts = [str(p) for p in first["loc"]]
        name = ".".join(parts)
        source = next((s for n, s in sources.items() if name.startswith(n) or n == name), "default")
        secret = parts[-1] in ("database", "redis")
        shown = "" if secret else f" is {first.get('input')!r}"
        raise SettingsError(f"{name}{shown} (from {source}): {first['msg']}") from None
    home = settings.home.expanduser()
    home = home if home.is_absolute() else Path.cwd() / home
    return Loaded(settings.model_copy(update={"home": home}), sources)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as e:
        raise SettingsError(f"{path}: {e}") from None
    if not isinstance(data, dict):
        raise SettingsError(f"{path}: a mapping is needed at the top")
    return data


def _typed(text: str) -> Any:
    """A variable's value as YAML would read it, so that lists and booleans can be set."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return text if value is None or isinstance(value, dict) else value


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    out: list[tuple[str, Any]] = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        out.extend(_flatten(value, f"{name}.") if isinstance(value, dict) else [(name, value)])
    return out


def _nest(values: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in values.items():
        at = out
        *parents, last = name.split(".")
        for part in parents:
            at = at.setdefault(part, {})
        at[last] = value
    return out


_NAMES = {name for name, _ in _flatten(Settings().model_dump(mode="json"))}
