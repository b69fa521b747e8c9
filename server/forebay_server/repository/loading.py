"""From a version's folder to a model that serves: check, load, warm up, probe. Runs in a thread."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from forebay.errors import ForebayError

from forebay_server.core.allocator import trim
from forebay_server.core.batcher import QUICK_S, BatchingEngineClient, BatchReport, hop_s
from forebay_server.core.interfaces import Batch, BatchPolicy, Engine, EngineSpec, Item, TensorSpec
from forebay_server.core.priority import lowered
from forebay_server.engines.factory import open_all, runtime
from forebay_server.repository import language_models
from forebay_server.repository.inspect import describe
from forebay_server.repository.manifest import (
    TEXT_TASKS,
    Batching,
    Manifest,
    ModelConfig,
    check_files,
    rejected,
)

log = logging.getLogger("forebay.repository")

#: Lengths and rows that are run once before a text model serves.
WARMUP = ((1, 16), (8, 64))

#: Token budget of a batch without and with a GPU. A CPU is busy with a few hundred tokens, and
#: small batches leave the queue more to choose equal lengths from: on MiniLM, 5-256 tokens, 1024
#: gave 65 texts/s, 4096 gave 49, first-come batches of 32 gave 32 (benchmarks/results).
BATCH_TOKENS = {False: 1024, True: 16384}
#: Tokens that a batch may pad, on a CPU and on a GPU.
PADDING_TOKENS = {False: 12, True: 4096}
#: Up to so many cores, a model gets an instance to each core unless model.yaml says otherwise.
FEW_CORES = 4
#: Runtimes whose instances share a loaded model, and can run a lone batch on all cores.
SHARING = ("onnxruntime", "openvino")


#: From a model and a version to what hears of its batches.
Observer = Callable[[str, int], Callable[[BatchReport], None] | None]
#: Full batches that may wait, where neither model.yaml nor the settings say how many rows: of texts,
#: and of others. More than some tenths of a second's work only makes answers late.
QUEUE_BATCHES = {True: 128, False: 64}


@dataclass(frozen=True, slots=True)
class Defaults:
    """The server's defaults for models whose model.yaml does not say."""

    providers: tuple[str, ...] = ("cpu",)
    intra_op_threads: int = 0
    max_batch_tokens: int = 0
    max_batch_size: int = 32
    max_batch_rows: int = 512
    max_queue_size: int = 0
    tensorrt_cache: str = ""
    vllm_python: str = ""
    vllm_cache_gb: int = 0
    engine_nice: int = 0
    trtllm_python: str = ""


@dataclass(slots=True, eq=False)
class LoadedModel:
    """A version that serves. `attachment` is room for the data plane's own view of it."""

    name: str
    version: int
    manifest: Manifest
    config: ModelConfig
    client: Any  # BatchingEngineClient, or GenerationClient for language models
    tokenizer: Any
    loaded_at: float
    attachment: object = None
    last_used: float = 0.0
    shadow_calls: int = field(default=0)

    @property
    def memory_bytes(self) -> int:
        """Resident bytes, measured for processes and estimated for threads."""
        return sum(int(e.info().get("memory_bytes", 0)) for e in self.client.engines)

    @property
    def providers(self) -> list[str]:
        """Execution providers in force."""
        return list(self.client.engines[0].info().get("providers", []))


def load(
    name: str,
    version: int,
    folder: Path,
    config: ModelConfig,
    defaults: Defaults,
    observer: Observer,
) -> LoadedModel:
    """Load a version. Raises FailedPrecondition (MODEL_REJECTED) naming the fault; leaves nothing."""
    if config.engine == "deterministic" and not (folder / "manifest.json").exists():
        raise rejected("the deterministic engine needs a manifest.json")
    manifest = describe(folder)
    check_files(folder, manifest)
    if manifest.task == "generation":
        tokenizer = language_models.tokenizer_of(folder, manifest)
        generation = language_models.load(
            name, version, folder, config, manifest, tokenizer, defaults
        )
        return LoadedModel(name, version, manifest, config, generation, tokenizer, time.time())
    if "prices" in config.generation.model_fields_set:
        raise rejected(
            f"model.yaml: generation.prices: is for language models alone; calls of a model for "
            f"{manifest.task} have no price"
        )
    tokenizer = tokenizer_of(folder, manifest)
    spec = engine_spec(name, version, folder, manifest, config, defaults, tokenizer)
    nice = defaults.engine_nice if spec.isolation == "thread" else 0

    def load_one(engine: Engine) -> None:
        if nice:  # the engine's own threads inherit the priority of the one that loads
            lowered(engine.load, nice)
        else:
            engine.load()
        _prove(engine, manifest)

    try:
        engines = open_all(spec, load_one)
    except ForebayError:
        raise
    except Exception as e:
        raise rejected(f"the model fails on a first run: {e}") from e
    trim()
    client = BatchingEngineClient(
        engines,
        observer=observer(name, version),
        hop_s=hop_s(len(engines)),
        here_s=QUICK_S,
        nice=nice,
    )
    return LoadedModel(name, version, manifest, config, client, tokenizer, time.time())


def tokenizer_of(folder: Path, manifest: Manifest) -> Any:
    """A text model's tokenizer; None for others. Raises FailedPrecondition (MODEL_REJECTED)."""
    if manifest.task not in TEXT_TASKS or manifest.tokenizer_file is None:
        return None
    from tokenizers import Tokenizer

    path = folder / manifest.tokenizer_file
    try:
        return Tokenizer.from_file(str(path))
    except Exception as e:
        raise rejected(f"{path.name} cannot be read: {e}") from None


def engine_spec(
    name: str,
    version: int,
    folder: Path,
    manifest: Manifest,
    config: ModelConfig,
    defaults: Defaults,
    tokenizer: Any,
) -> EngineSpec:
    """The engine's view of a version: manifest, then model.yaml, then the server's defaults."""
    head = manifest.text_head
    embedding = manifest.embedding
    inputs = tuple(t.spec for t in manifest.inputs)
    outputs = tuple(t.spec for t in manifest.outputs)
    padding = (tokenizer.padding or {}) if tokenizer is not None else {}
    model = (folder / manifest.model_file).resolve()
    if folder.resolve() not in model.parents:
        raise rejected(f"model_file {manifest.model_file!r} lies outside of the model's folder")
    _check_buckets(config.batching.length_buckets or [], head.max_tokens if head else 0)
    execution = config.execution
    spec = EngineSpec(
        model=name,
        version=version,
        engine="onnxruntime" if config.engine == "auto" else config.engine,
        path=str(model),
        kind="tokens" if head else "tensors",
        inputs=inputs,
        outputs=outputs,
        output=head.output if head else "",
        pooling=embedding.pooling if embedding else "none",
        normalize=embedding.normalize if embedding else False,
        pad_id=int(padding.get("pad_id", _pad_id(tokenizer))),
        pad_left=padding.get("direction") == "left",
        batches=head is not None or _batches(manifest),
        policy=_policy(
            config.batching,
            defaults,
            head is not None,
            head.max_tokens if head else 1,
            any(p != "cpu" for p in execution.providers or defaults.providers),
        ),
        providers=tuple(execution.providers or defaults.providers),
        isolation=execution.isolation,
        options={"tensorrt_cache": defaults.tensorrt_cache, **config.engine_options},
    )
    instances, threads, lone = _threads(config, defaults, head is not None, runtime(spec)[0])
    return replace(spec, instances=instances, intra_op_threads=threads, lone_threads=lone)


def _check_buckets(lengths: list[int], longest: int) -> None:
    """Raise unless texts may be padded to these lengths. `longest`: tokens; 0 for rows and tensors."""
    where = "model.yaml: batching.length_buckets"
    if lengths and not longest:
        raise rejected(f"{where}: is for models that read texts; this one has no lengths")
    if lengths and lengths[-1] > longest:
        raise rejected(
            f"{where}: has {lengths[-1]}; allowed are lengths up to the model's max_tokens, {longest}"
        )


def _batches(manifest: Manifest) -> bool:
    """Whether rows of several calls may go into one run.

    Not where an output has nothing for each row, such as a mean over all of them: it would be one of
    strangers' rows. Nor where nothing says how many dimensions there are: the first may be none of rows.
    """
    tensors = manifest.inputs
    if manifest.task == "tensor":
        tensors = [*tensors, *manifest.outputs]
    return all(t.shape and t.shape[0] == -1 for t in tensors)


def _threads(
    config: ModelConfig, defaults: Defaults, text: bool, engine: str
) -> tuple[int, int, int]:
    """Instances, threads of each, and threads of a run that has the machine to itself.

    On few cores, each gets an instance with one thread: none waits for another at the end of each
    operator (ADR 0026). A text that comes alone is computed by all; a row of a tree ensemble would be
    done before a second thread has woken up.
    """
    execution = config.execution
    cores = os.cpu_count() or 1
    unset = execution.instances is None and execution.intra_op_threads is None
    on_cpu = tuple(execution.providers or defaults.providers) == ("cpu",)
    alone = execution.isolation == "thread" and engine in SHARING and on_cpu
    if unset and alone and not defaults.intra_op_threads and 1 < cores <= FEW_CORES:
        return cores, 1, cores if text else 0
    threads = execution.intra_op_threads
    if threads is None:
        threads = defaults.intra_op_threads or (cores if text else 1)
    return execution.instances or 1, threads, execution.lone_threads


def _pad_id(tokenizer: Any) -> int:
    for token in ("[PAD]", "<pad>", "<|endoftext|>"):
        found = tokenizer.token_to_id(token) if tokenizer is not None else None
        if found is not None:
            return int(found)
    return 0


def _policy(
    batching: Batching, defaults: Defaults, text: bool, longest: int, gpu: bool
) -> BatchPolicy:
    rows = defaults.max_batch_size if text else defaults.max_batch_rows
    tokens = batching.max_batch_tokens or defaults.max_batch_tokens or BATCH_TOKENS[gpu]
    padding = batching.max_padding_tokens
    size = batching.max_batch_size or rows
    return BatchPolicy(
        # A budget below the longest text would only mean that it runs alone; say so by its number.
        max_batch_tokens=max(tokens, longest),
        max_batch_size=size,
        max_padding_tokens=PADDING_TOKENS[gpu] if padding is None else padding,
        max_queue_size=batching.max_queue_size
        or defaults.max_queue_size
        or QUEUE_BATCHES[text] * size,
        max_queue_delay_s=batching.max_queue_delay_ms / 1e3,
        length_buckets=tuple(batching.length_buckets or ()),
    )


def _prove(engine: Engine, manifest: Manifest) -> None:
    """Warm up and run once: a model that cannot answer must not replace one that can."""
    if manifest.text_head is not None:
        longest = manifest.text_head.max_tokens
        engine.warmup([(rows, min(length, longest)) for rows, length in WARMUP])
        return
    item = Item(probe_inputs(manifest))
    batch = Batch([item], 1, 1)
    try:
        engine.finish(engine.execute(engine.prepare(batch)), batch)
    except Exception as e:
        if (
            manifest.task == "tensor"
        ):  # zeros need not be a good input of a model we know nothing of
            log.warning("the probe of %s failed: %s", engine.spec.model, e)
            return
        raise


def probe_inputs(manifest: Manifest) -> dict[str, Any]:
    """One row of harmless values."""
    features = manifest.tabular.by_name if manifest.tabular else {}

    def value(spec: TensorSpec) -> Any:
        shape = [1] if spec.shape is None else [1 if d < 0 else d for d in spec.shape]
        feature = features.get(spec.name)
        if spec.datatype == "BYTES":
            text = (feature.categories or [""])[0] if feature else ""
            return np.full(shape, text, object)
        from forebay_server.engines.arrays import NUMPY

        return np.zeros(shape, NUMPY.get(spec.datatype, np.float32))

    return {t.name: value(t.spec) for t in manifest.inputs}
