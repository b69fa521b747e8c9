"""The tree of settings: a section for each part."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from string import Formatter
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationInfo,
    field_validator,
    model_validator,
)

from forebay.settings.prompts import (
    ANSWER_PROMPT,
    EXPAND_PROMPT,
    HYDE_PROMPT,
    PLACES,
    REWRITE_PROMPT,
)

#: Times of the transport, in seconds: gRPC's core counts milliseconds in 31 bits.
LONGEST_S = 2_000_000.0


class SettingsError(Exception):
    """A setting that stops the start; the message names it, its source and what is allowed."""


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
        allow_inf_nan=False,  # times become whole numbers of milliseconds, which infinity is not
    )

    @field_validator("*", mode="after")
    @classmethod
    def _expand_home(cls, value: Any) -> Any:
        """Paths may start with ~."""
        return value.expanduser() if isinstance(value, Path) else value


class PortSettings(Section):
    """TLS of a port that is listened on."""

    tls_certificate: Path | None = None
    tls_key: Path | None = None
    tls_reload_s: float = Field(
        default=10.0, gt=0, le=LONGEST_S, description="how often the files are looked at"
    )
    tls_client_ca: Path | None = Field(default=None, description="set: clients need a certificate")

    @property
    def secure(self) -> bool:
        """Whether the port speaks TLS."""
        return self.tls_key is not None

    @model_validator(mode="after")
    def _whole_tls(self) -> PortSettings:
        """Half of a TLS setting would listen in the clear: refuse it."""
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key belong together; one of them is missing")
        if self.tls_client_ca is not None and self.tls_key is None:
            raise ValueError("tls_client_ca needs tls_certificate and tls_key")
        return self


class GrpcSettings(PortSettings):
    """The gRPC server."""

    host: str = "127.0.0.1"
    port: int = Field(default=50051, ge=0, le=65535)
    max_message_bytes: int = Field(default=16 << 20, ge=1024, le=1 << 30)
    max_items_per_call: int = Field(default=8192, ge=1)
    max_connection_age_s: float = Field(
        default=0.0, ge=0, le=LONGEST_S, description="0 = connections stay"
    )
    keepalive_s: float = Field(default=60.0, ge=1, le=LONGEST_S)
    drain_s: float = Field(
        default=30.0, ge=0, le=LONGEST_S, description="time for running calls at shutdown"
    )
    lane: Literal["auto", "fast", "ordinary"] = Field(
        default="auto", description="auto: the fast lane where its extension is installed"
    )
    ingest_threads: int = Field(default=1, ge=1, le=64)
    transport_threads: int = Field(default=1, ge=1, le=64, description="of the fast lane")
    max_connections: int = Field(default=4096, ge=1, description="of the fast lane")
    max_streams: int = Field(default=1024, ge=1, description="calls in progress per connection")
    max_header_bytes: int = Field(default=16 << 10, ge=1024, le=1 << 20)
    max_waiting_calls: int = Field(default=16384, ge=1)
    max_waiting_bytes: int = Field(default=512 << 20, ge=1 << 20)
    max_waiting_s: float = Field(
        default=0.5,
        gt=0,
        le=LONGEST_S,
        description="while a call waits longer to be taken, others are refused",
    )
    keepalive_timeout_s: float = Field(default=20.0, ge=1, le=LONGEST_S)
    receive_timeout_s: float = Field(
        default=30.0,
        gt=0,
        le=LONGEST_S,
        description="time for a handshake, and for a unary request to come in",
    )
    gateway_socket: str = Field(
        default="",
        description="Unix socket in the clear for the gateway, where the port has TLS; `up` sets it",
    )

    @property
    def address(self) -> str:
        """`host:port`, or `unix:path` as it stands in `host`."""
        if self.host.startswith("unix:"):
            return self.host
        host = f"[{self.host}]" if ":" in self.host and "[" not in self.host else self.host
        return f"{host}:{self.port}"


class HttpSettings(PortSettings):
    """The gateway."""

    enabled: bool = True
    host: str = "127.0.0.1"
    port: int = Field(default=8080, ge=0, le=65535)
    workers: int = Field(default=1, ge=1, le=256, description="processes that share the port")
    upstream: str = Field(default="", description="gRPC target; empty = this machine's server")
    direct: bool = Field(
        default=True, description="`up`: the server has the port, and answers quick routes itself"
    )
    gateway: str = Field(
        default="",
        description="Unix socket of the gateway, when the server has the port; `up` sets it",
    )
    max_body_bytes: int = Field(default=16 << 20, ge=1024)
    max_upload_bytes: int = Field(default=4 << 30, ge=1024, description="of multipart forms")
    cors_origins: list[str] = []
    timeout_s: float = Field(
        default=300.0, gt=0, le=LONGEST_S, description="when the caller names none"
    )
    idle_timeout_s: float = Field(
        default=75.0,
        ge=1,
        le=LONGEST_S,
        description="for connections that have no request, and slow bodies",
    )
    flagged_labels: list[str] = Field(
        default=["negative", "toxic"], description="labels that /v1/moderations flags"
    )


class ClientSettings(Section):
    """How commands, and a gateway with `http.upstream`, call a gRPC server."""

    tls: bool = Field(default=False, description="call by TLS; the files below imply it")
    tls_ca: Path | None = Field(
        default=None, description="who vouches for the server; default: whom gRPC's library trusts"
    )
    tls_certificate: Path | None = Field(
        default=None, description="for servers with grpc.tls_client_ca"
    )
    tls_key: Path | None = None
    tls_name: str = Field(
        default="", description="name in the server's certificate, where its address has another"
    )

    @property
    def secure(self) -> bool:
        """Whether servers are called by TLS."""
        return self.tls or self.tls_ca is not None or self.tls_key is not None

    @model_validator(mode="after")
    def _whole_tls(self) -> ClientSettings:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key belong together; one of them is missing")
        return self


class ModelSettings(Section):
    """The model repository."""

    root: Path | None = Field(default=None, description="default: models in the home folder")
    starters: bool = True
    poll_s: float = Field(default=5.0, gt=0)
    memory_budget_bytes: int = Field(default=0, ge=0, description="0 = no bound")
    providers: list[Literal["tensorrt", "cuda", "cpu"]] = ["cpu"]
    intra_op_threads: int = Field(default=0, ge=0, description="0 = by the model's kind")
    max_batch_tokens: int = Field(default=0, ge=0, description="0 = by the device")
    max_batch_size: int = Field(default=32, ge=1)
    max_batch_rows: int = Field(default=512, ge=1, description="for models on rows and tensors")
    max_queue_size: int = Field(
        default=0, ge=0, description="rows; 0 = 128 full batches of texts, 64 of rows"
    )
    engine_nice: int = Field(
        default=6,
        ge=0,
        le=19,
        description="models' threads give way to those that take calls; 0 = they do not",
    )


class GenerationSettings(Section):
    """Language models."""

    vllm_python: Path | None = Field(
        default=None, description="Python of the environment that has vLLM; default: this one"
    )
    vllm_cache_gb: int = Field(
        default=0, ge=0, description="key-value cache on the CPU; 0 = vLLM's own default"
    )
    trtllm_python: Path | None = Field(
        default=None, description="Python of the environment that has tensorrt_llm; default: this"
    )


class KnowledgeSettings(Section):
    """Answers from knowledge bases by a language model. Prompts: `{context}` are the numbered
    chunks, `{history}` earlier messages."""

    writer: str = Field(
        default="", description="language model that writes answers; empty = they are extracted"
    )
    max_answer_tokens: int = Field(default=512, ge=1)
    answer_prompt: str = ANSWER_PROMPT
    rewrite_prompt: str = REWRITE_PROMPT
    expand_prompt: str = EXPAND_PROMPT
    hyde_prompt: str = HYDE_PROMPT

    @field_validator("answer_prompt", "rewrite_prompt", "expand_prompt", "hyde_prompt")
    @classmethod
    def _places(cls, value: str, info: ValidationInfo) -> str:
        """A prompt has its places, and no others."""
        needed = PLACES[info.field_name or ""]
        try:
            found = {name for _, name, _, _ in Formatter().parse(value) if name is not None}
        except ValueError as e:
            raise ValueError(f"{e}; write {{{{ and }}}} for braces") from None
        if found != needed:
            names = ", ".join(f"{{{n}}}" for n in sorted(needed))
            raise ValueError(f"must have the places {names}, each of them and no others")
        return value


class RetrievalSettings(Section):
    """Collections' dense indexes."""

    faiss_device: Literal["cpu", "gpu"] = Field(
        default="cpu",
        description="gpu: flat and IVF-PQ indexes are searched there; needs faiss-gpu",
    )
    qdrant: str = Field(
        default="",
        description="URL of a Qdrant server for collections of INDEX_TYPE_QDRANT; "
        "`local`: the client's local mode, to try it out",
    )
    qdrant_api_key: SecretStr = SecretStr("")
    qdrant_prefix: str = Field(default="forebay", pattern="[A-Za-z0-9_]{1,32}")
    qdrant_timeout_s: int = Field(default=10, ge=1, le=600)


class FileSettings(Section):
    """Files of callers."""

    max_file_bytes: int = Field(default=200 << 20, ge=1)
    max_bytes_per_key: int = Field(default=10 << 30, ge=1)
    keep_s: float = Field(
        default=0.0, ge=0, description="when the caller says nothing; 0 = until they are deleted"
    )


class BatchSettings(Section):
    """Batches of requests."""

    max_items: int = Field(default=50_000, ge=1, description="per batch")
    max_open_per_key: int = Field(default=100, ge=1, description="batches that have not ended")
    max_running: int = Field(default=32, ge=1, le=4096, description="items at once, of all batches")
    keep_s: float = Field(default=30 * 86400.0, gt=0, description="of ended batches' results")


class ResponseSettings(Section):
    """Stored conversations."""

    keep_s: float = Field(default=30 * 86400.0, gt=0, description="after the last use")
    max_turns: int = Field(default=1000, ge=1, description="responses that follow one another")
    max_background: int = Field(default=64, ge=1, description="responses in the background at once")


class AuthSettings(Section):
    """Who may call."""

    required: Literal["auto", "always", "never"] = Field(
        default="auto", description="auto: keys are needed unless every address is loopback"
    )
    allow_insecure_bind: bool = Field(
        default=False, description="let a server without keys listen beyond loopback"
    )
    reload_s: float = Field(default=2.0, gt=0)


class StorageSettings(Section):
    """Relational state, cache and limits."""

    database: SecretStr = Field(default=SecretStr(""), description="default: SQLite in home")
    redis: SecretStr = Field(
        default=SecretStr(""), description="empty: cache and limits in process"
    )
    cache_bytes: int = Field(default=64 << 20, ge=0)
    cache_ttl_s: int = Field(default=3600, ge=1, description="for Redis")


class ObservabilitySettings(Section):
    """Logs, metrics, traces."""

    log_format: Literal["json", "console"] = "json"
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    access_log: bool = True
    metrics_port: int = Field(default=0, ge=-1, le=65535, description="0 = any free; -1 = none")
    otlp_endpoint: str = ""


class Settings(Section):
    """The whole tree."""

    home: Path = Path("~/.forebay").expanduser()
    data: Path | None = Field(default=None, description="folder with data for the starter models")
    grpc: GrpcSettings = GrpcSettings()
    http: HttpSettings = HttpSettings()
    client: ClientSettings = ClientSettings()
    models: ModelSettings = ModelSettings()
    generation: GenerationSettings = GenerationSettings()
    knowledge: KnowledgeSettings = KnowledgeSettings()
    retrieval: RetrievalSettings = RetrievalSettings()
    files: FileSettings = FileSettings()
    batches: BatchSettings = BatchSettings()
    responses: ResponseSettings = ResponseSettings()
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
        bound = [("grpc.host", self.grpc.host)]
        if self.http.enabled:
            bound.append(("http.host", self.http.host))
        for name, host in bound:
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
