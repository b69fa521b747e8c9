"""manifest.json (what an artefact is) and model.yaml (how it is served), strictly read.

An unknown key is refused with its path: a typo in a configuration must not be ignored.
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import yaml
from forebay.errors import FailedPrecondition
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from forebay_server.core.interfaces import TensorSpec
from forebay_server.repository.explain import explain

Task = Literal[
    "embedding",
    "text-classification",
    "zero-shot-classification",
    "rerank",
    "tabular-regression",
    "tabular-classification",
    "generation",
    "tensor",
]
TEXT_TASKS = ("embedding", "text-classification", "zero-shot-classification", "rerank")


def rejected(message: str) -> FailedPrecondition:
    """The error of a model folder that is not served, naming its fault."""
    return FailedPrecondition(message, reason="MODEL_REJECTED")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Tensor(_Strict):
    """Name, OIP datatype, shape with -1 for dynamic dimensions; null = any number of dimensions."""

    name: str
    dtype: str
    shape: list[int] | None

    @property
    def spec(self) -> TensorSpec:
        """The same as the engine's type."""
        shape = None if self.shape is None else tuple(self.shape)
        return TensorSpec(self.name, self.dtype, shape)


class EmbeddingHead(_Strict):
    """How vectors are made from the model's output."""

    output: str
    pooling: Literal["mean", "cls", "last_token", "none"]
    normalize: bool = True
    dimensions: int
    matryoshka: list[int] = []
    max_tokens: int
    prompts: dict[str, str] = {}


class ClassificationHead(_Strict):
    """How labels are made from the model's output."""

    output: str = "logits"
    labels: list[str]
    multi_label: bool = False
    activation: Literal["softmax", "sigmoid", "none"] = "softmax"
    max_tokens: int


class ZeroShotHead(_Strict):
    """Which classes of an NLI model mean yes and no."""

    output: str = "logits"
    hypothesis_template: str = "This example is {}."
    entailment_index: int
    contradiction_index: int
    max_tokens: int


class RerankHead(_Strict):
    """How a pair's relevance is made from its logit."""

    output: str = "logits"
    activation: Literal["sigmoid", "none"] = "sigmoid"
    max_tokens: int


class Feature(_Strict):
    """One feature of a tabular model."""

    name: str
    type: Literal["number", "string", "boolean"]
    nullable: bool = False
    min: float | None = None
    max: float | None = None
    categories: list[str] | None = None
    description: str | None = None
    unit: str | None = None


class Target(_Strict):
    """What a tabular model predicts."""

    name: str
    unit: str | None = None


class TabularHead(_Strict):
    """Features in, predictions out. `input` names the one input of the `matrix` layout."""

    features: list[Feature]
    layout: Literal["columns", "matrix"]
    input: str = "input"
    output: str
    probabilities_output: str | None = None
    classes: list[str] | None = None
    target: Target

    @cached_property
    def by_name(self) -> dict[str, Feature]:
        """Features by name, in the model's order."""
        return {f.name: f for f in self.features}


class GenerationHead(_Strict):
    """How a language model is spoken to.

    `sampling`: the model's own defaults of temperature, top_p, top_k, min_p, repetition_penalty.
    """

    context_length: int = Field(ge=1)
    template_file: str | None = None
    eos_token_ids: list[int] = []
    sampling: dict[str, float] = {}


class FileFacts(_Strict):
    """Hash and size of a file."""

    sha256: str
    bytes: int


class Manifest(_Strict):
    """One artefact. Exactly the block of its task is there."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), populate_by_name=True)

    schema_: int = Field(default=1, alias="schema")
    task: Task
    description: str = ""
    source: dict[str, Any] = {}
    exporter: dict[str, Any] = {}
    created: str | None = None
    precision: str = "fp32"
    model_file: str = "model.onnx"
    tokenizer_file: str | None = None
    files: dict[str, FileFacts] = {}
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    embedding: EmbeddingHead | None = None
    classification: ClassificationHead | None = None
    zero_shot: ZeroShotHead | None = None
    rerank: RerankHead | None = None
    tabular: TabularHead | None = None
    generation: GenerationHead | None = None
    metrics: dict[str, Any] = {}
    parity: dict[str, Any] = {}

    @property
    def embedding_head(self) -> EmbeddingHead:
        """The block of embedding models."""
        return _block(self.embedding, self.task)

    @property
    def classification_head(self) -> ClassificationHead:
        """The block of text classifiers."""
        return _block(self.classification, self.task)

    @property
    def zero_shot_head(self) -> ZeroShotHead:
        """The block of zero-shot classifiers."""
        return _block(self.zero_shot, self.task)

    @property
    def rerank_head(self) -> RerankHead:
        """The block of rerankers."""
        return _block(self.rerank, self.task)

    @property
    def tabular_head(self) -> TabularHead:
        """The block of tabular models."""
        return _block(self.tabular, self.task)

    @property
    def generation_head(self) -> GenerationHead:
        """The block of language models."""
        return _block(self.generation, self.task)

    @property
    def text_head(self) -> EmbeddingHead | ClassificationHead | ZeroShotHead | RerankHead | None:
        """The block of a text model; None for the others."""
        return self.embedding or self.classification or self.zero_shot or self.rerank

    @property
    def max_tokens(self) -> int | None:
        """Greatest number of tokens, for text models."""
        head = self.text_head
        return head.max_tokens if head else None

    @property
    def number_metrics(self) -> dict[str, float]:
        """The metrics that are numbers."""
        return {
            k: float(v)
            for k, v in self.metrics.items()
            if isinstance(v, (int, float)) and not isinstance(v, bool)
        }

    @property
    def labels(self) -> list[str]:
        """Labels or classes of a classifier."""
        if self.classification:
            return self.classification.labels
        return list(self.tabular.classes or []) if self.tabular else []

    def check(self) -> None:
        """Raise unless the block of the task is there."""
        blocks = {
            "embedding": self.embedding,
            "text-classification": self.classification,
            "zero-shot-classification": self.zero_shot,
            "rerank": self.rerank,
            "tabular-regression": self.tabular,
            "tabular-classification": self.tabular,
            "generation": self.generation,
            "tensor": True,
        }
        if not blocks[self.task]:
            raise rejected(f"manifest.json: the block of the task {self.task!r} is missing")
        if self.task in TEXT_TASKS and not self.tokenizer_file:
            raise rejected("manifest.json: tokenizer_file is missing")


def _block(block: Any, task: str) -> Any:
    if block is None:
        raise rejected(f"the manifest of a {task} model lacks the block that was asked for")
    return block


class Execution(_Strict):
    """model.yaml: execution."""

    providers: list[Literal["tensorrt", "cuda", "cpu"]] | None = None
    isolation: Literal["thread", "process"] = "thread"
    intra_op_threads: int | None = Field(default=None, ge=0, le=1024)
    instances: int | None = Field(default=None, ge=1, le=64)
    lone_threads: int = Field(default=0, ge=0, le=1024)
    preload: bool = True

    @model_validator(mode="after")
    def _lone_threads_fit(self) -> Execution:
        if self.lone_threads and self.isolation == "process":
            raise ValueError("lone_threads needs isolation: thread")
        return self


class Batching(_Strict):
    """model.yaml: batching. Unset means the server's default."""

    max_batch_tokens: int | None = Field(default=None, ge=1)
    max_batch_size: int | None = Field(default=None, ge=1)
    max_padding_tokens: int | None = Field(default=None, ge=0)
    max_queue_size: int | None = Field(default=None, ge=1)
    max_queue_delay_ms: float = Field(default=0.0, ge=0, le=10_000)
    length_buckets: list[int] | None = None

    @field_validator("length_buckets")
    @classmethod
    def _lengths_rise(cls, lengths: list[int] | None) -> list[int] | None:
        for before, length in pairwise([0, *(lengths or ())]):
            if length <= before:
                after = f" after {before}" if before else ""
                raise ValueError(f"has {length}{after}; allowed are lengths from 1 that rise")
        return lengths


class CachePolicy(_Strict):
    """model.yaml: cache."""

    enabled: bool = False


class Prices(_Strict):
    """model.yaml: generation: prices, in money per million tokens."""

    prompt: float = Field(default=0.0, ge=0)
    completion: float = Field(default=0.0, ge=0)
    cached: float | None = Field(default=None, ge=0)


class Generation(_Strict):
    """model.yaml: generation. How a language model is served.

    `max_running`: answers generated at once; more wait in the fair queue, `max_queue_size` at most.
    `stream_interval_ms`: least time between two messages of a stream after its first; 0 = each
    engine step is sent on. Many streams on few cores cost less with 50.
    `tool_parser` and `reasoning_parser`: names of vLLM's parsers. `adapters`: LoRA folders by name.
    """

    context_length: int | None = Field(default=None, ge=1)
    max_running: int = Field(default=64, ge=1, le=4096)
    max_queue_size: int = Field(default=1024, ge=0)
    stream_interval_ms: float = Field(default=0.0, ge=0, le=10_000)
    tool_parser: str = ""
    reasoning_parser: str = ""
    adapters: dict[str, str] = {}
    prices: Prices = Prices()


class ModelConfig(_Strict):
    """model.yaml: how a model is served. All of it is optional."""

    description: str = ""
    engine: Literal[
        "auto", "onnxruntime", "deterministic", "openvino", "vllm", "tensorrt_llm", "openai"
    ] = "auto"
    engine_options: dict[str, Any] = {}
    default_for: list[Task] = []
    version_policy: Literal["latest", "all"] | list[int] = "latest"
    execution: Execution = Execution()
    batching: Batching = Batching()
    cache: CachePolicy = CachePolicy()
    generation: Generation = Generation()
    aliases: dict[str, int] = {}


def read_manifest(path: Path) -> Manifest:
    """manifest.json of a version folder. Raises FailedPrecondition naming file and key."""
    try:
        manifest = Manifest.model_validate(json.loads(path.read_bytes()))
    except (OSError, ValueError) as e:
        raise rejected(f"{path.name}: {explain(e, Manifest)}") from None
    manifest.check()
    return manifest


def read_config(path: Path) -> ModelConfig:
    """model.yaml of a model folder; the defaults when there is none."""
    if not path.exists():
        return ModelConfig()
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        return ModelConfig.model_validate(data)
    except (OSError, ValueError, yaml.YAMLError) as e:
        raise rejected(f"{path.name}: {explain(e, ModelConfig)}") from None


def check_files(folder: Path, manifest: Manifest) -> None:
    """Raise unless every file of the manifest is there with its size and hash."""
    for name, facts in manifest.files.items():
        path = (folder / name).resolve()
        if folder.resolve() not in path.parents:
            raise rejected(f"manifest.json: files: {name!r} lies outside of the model's folder")
        if not path.is_file():
            raise rejected(f"{name} is missing")
        size = path.stat().st_size
        if size != facts.bytes:
            raise rejected(f"{name} has {size} bytes; its manifest says {facts.bytes}")
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        if digest.hexdigest() != facts.sha256:
            raise rejected(f"{name} does not have the hash that its manifest says")
