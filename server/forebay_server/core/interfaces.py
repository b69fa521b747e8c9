"""The types that meet at the engine's door. Plain Python and numpy: no grpc, asyncio, onnxruntime.

An `Item` is what the batcher counts: one text, one text pair, or a block of tabular rows. An
`EngineRequest` is one call's items. `submit` answers with a `Completion` per request.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from forebay.errors import ForebayError
from numpy.typing import NDArray

from forebay_server.core.generation import Capabilities, GenerationDelta, GenerationRequest

#: Monotonic seconds. Injected everywhere, so that tests own the time.
Clock = Callable[[], float]

InputKind = Literal["tokens", "tensors"]
Pooling = Literal["mean", "cls", "last_token", "none"]


@dataclass(frozen=True, slots=True)
class TokenInput:
    """One tokenised text (or pair). `ids` and `type_ids` are int64 arrays of shape [length]."""

    ids: NDArray[np.int64]
    type_ids: NDArray[np.int64] | None = None


#: Named tensors of one item; every array has the item's `rows` as its first dimension.
TensorInput = Mapping[str, NDArray[Any]]
#: What `finish` gives for an item: one array (tokens: vector or logits), or named tensors.
Result = NDArray[Any] | Mapping[str, NDArray[Any]]


@dataclass(slots=True)
class Item:
    """One unit of work.

    Attributes:
        inputs: what the engine's `prepare` understands, by the spec's `kind`.
        length: tokens before padding; 1 for tensors.
        rows: batch rows it takes; 1 for texts.
        group: items batch together only with an equal group (shapes of free tensors, say).
        fingerprint: hash of the input, to quarantine an item that crashes engines; may be empty.
    """

    inputs: TokenInput | TensorInput
    length: int = 1
    rows: int = 1
    group: str = ""
    fingerprint: bytes = b""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, OIP datatype (FP32, INT64, BYTES, ...) and shape with -1 for dynamic dimensions; None = any
    number of dimensions."""

    name: str
    datatype: str
    shape: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class BatchPolicy:
    """How batches are cut. Names follow Triton's model configuration where it has them.

    Attributes:
        max_batch_tokens: bound of padded length x rows.
        max_batch_size: bound of rows.
        max_padding_tokens: bound of what a batch pads; None = none. Best is about what a batch costs
            beyond its tokens, in tokens: an item that brings more padding is cheaper in another batch.
        max_queue_size: bound of waiting rows; beyond it `QueueFull`.
        max_queue_delay_s: 0 = cut at once when the engine is free.
        length_buckets: lengths are padded up to the next of these; empty = to the longest item.
        sort_window: oldest batches' worth of items that are sorted by length when they wait.
    """

    max_batch_tokens: int = 8192
    max_batch_size: int = 64
    max_padding_tokens: int | None = None
    max_queue_size: int = 4096
    max_queue_delay_s: float = 0.0
    length_buckets: tuple[int, ...] = ()
    sort_window: int = 8


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """All that an engine needs to load and run one model version. Plain data: it crosses processes.

    Attributes:
        engine: `onnxruntime` or `deterministic`.
        path: the model file.
        kind: `tokens` (padded id matrices) or `tensors` (concatenated along the first axis).
        output: for tokens, the output that results are taken from.
        pooling: applied to [batch, length, dim] outputs in `finish`, so that only [batch, dim]
            leaves the engine's process; `none` for outputs that are already [batch, n].
        batches: False when the model's first dimension is fixed: each item runs alone.
        providers: execution providers in order of preference: tensorrt, cuda, cpu.
        intra_op_threads: threads of a run; 0 = as the runtime chooses.
        instances: engines behind one queue, each with a thread of its own.
        lone_threads: threads of a run while no other instance runs, on a CPU in this process; 0 = as
            any other. Costs the weights' memory a second time.
        options: engine-specific options (cost model, TensorRT cache folder, ...).
    """

    model: str
    version: int
    engine: str
    path: str
    kind: InputKind
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    output: str = ""
    pooling: Pooling = "none"
    normalize: bool = False
    pad_id: int = 0
    pad_left: bool = False
    batches: bool = True
    policy: BatchPolicy = field(default_factory=BatchPolicy)
    providers: tuple[str, ...] = ("cpu",)
    intra_op_threads: int = 0
    instances: int = 1
    lone_threads: int = 0
    isolation: Literal["thread", "process"] = "thread"
    options: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; `from_json` is its inverse."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EngineSpec:
        """Inverse of `to_json`."""
        d = dict(data)
        for key in ("inputs", "outputs"):
            d[key] = tuple(
                TensorSpec(
                    t["name"], t["datatype"], None if t["shape"] is None else tuple(t["shape"])
                )
                for t in d.get(key, ())
            )
        policy = dict(d.get("policy", {}))
        policy["length_buckets"] = tuple(policy.get("length_buckets", ()))
        d["policy"] = BatchPolicy(**policy)
        d["providers"] = tuple(d.get("providers", ("cpu",)))
        return cls(**d)


@dataclass(slots=True)
class Batch:
    """Items that run together. `length` is the padded length (after buckets), `rows` the sum."""

    items: Sequence[Item]
    length: int
    rows: int


class Engine(Protocol):
    """A loaded model. `execute` runs on one thread; `prepare` and `finish` may overlap it."""

    spec: EngineSpec

    def load(self) -> None:
        """Load. Raises FailedPrecondition (reason MODEL_REJECTED) naming the fault of a bad file."""
        ...

    def warmup(self, shapes: Sequence[tuple[int, int]]) -> None:
        """Run once for each (rows, length), so that the first caller pays nothing."""
        ...

    def prepare(self, batch: Batch) -> Any:
        """Pad or concatenate the items into the arrays of one run."""
        ...

    def execute(self, inputs: Any) -> Any:
        """Run the model. Releases the GIL. Any exception fails this batch (it is bisected);
        Unavailable (ENGINE_DIED) means the engine itself is gone."""
        ...

    def finish(self, outputs: Any, batch: Batch) -> Sequence[Result]:
        """Exactly one result per item, in the batch's order."""
        ...

    def check_health(self) -> None:
        """Raise Unavailable when a run cannot succeed."""
        ...

    def close(self) -> None:
        """Give everything back. Idempotent."""
        ...

    def info(self) -> Mapping[str, Any]:
        """Facts in force: providers, threads, memory_bytes (resident), pid of its process."""
        ...


@dataclass(slots=True)
class Timing:
    """Where one request's time went, seconds; and the last batch that it rode in."""

    queue_s: float = 0.0
    prepare_s: float = 0.0
    execute_s: float = 0.0
    finish_s: float = 0.0
    batch_rows: int = 0
    batch_tokens: int = 0


#: Below all that callers may ask for: work that nobody waits for.
BACKGROUND_PRIORITY = -100


@dataclass(slots=True)
class EngineRequest:
    """One call's items. `deadline` is on the client's clock; higher `priority` is served first.

    Small calls may share a request: `calls` is how many statistics count it as.
    """

    items: Sequence[Item]
    request_id: str = ""
    deadline: float | None = None
    priority: int = 0
    calls: int = 1


class Completion(Protocol):
    """The answer to one request, thread-safe. Done exactly once."""

    timing: Timing

    def done(self) -> bool: ...

    def result(self) -> Sequence[Result]:
        """The results, one per item in order; raises the error. Only after done()."""
        ...

    def error(self) -> BaseException | None:
        """The error, None when it succeeded. `failed_item` of the completion says which item."""
        ...

    @property
    def failed_item(self) -> int | None: ...

    def cancel(self) -> None:
        """Take the request back: dropped from the queue, or its result is thrown away."""
        ...

    def add_done_callback(self, callback: Callable[[Completion], None]) -> None:
        """Called once, on the thread that completes (or at once when already done)."""
        ...


class EngineClient(Protocol):
    """The way to an engine, whether in a thread or in a process of its own."""

    spec: EngineSpec

    def submit(self, requests: Sequence[EngineRequest]) -> list[Completion]:
        """Queue all. A request that does not fit comes back already failed with QueueFull."""
        ...

    def refusal(
        self, deadline: float | None, rows: int = 1, calls: int = 1, ahead: int = 0
    ) -> ForebayError | None:
        """Why a request of so many rows would be refused now, so that nothing is spent on preparing
        it; None when it would be queued. `calls`: how many end with it, for the statistics. `ahead`:
        rows of requests that are not queued yet, and will be before it."""
        ...

    @property
    def trees(self) -> int | None:
        """Where the model is nothing but a regressor's trees in this process: the number by which the
        extension has them, so that the transport may walk them by itself. Else None."""
        ...

    def answered(self, rows: int, calls: int, engine_s: float) -> None:
        """The transport has answered calls of so many rows each, which took the model so many seconds
        together."""
        ...

    def stats(self) -> Mapping[str, Any]:
        """Counts and seconds since load, queue depth, memory; see ModelStatistics."""
        ...

    def check_health(self) -> None: ...

    def close(self, timeout_s: float = 10.0) -> None:
        """Stop taking requests, finish what is queued within the time, fail the rest."""
        ...


class GenerationEngine(Protocol):
    """A language model that batches by itself. Its methods run on the server's event loop, but
    for `load` and `close`, which may block and run in threads."""

    capabilities: Capabilities

    def load(self) -> None:
        """Load. Raises FailedPrecondition (reason MODEL_REJECTED) naming the fault."""
        ...

    def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationDelta, None]:
        """The answer as it is made. Closing the iterator aborts the request; `request.tally` is
        exact by then. Unavailable (ENGINE_DIED) when the engine is gone."""
        ...

    def check_health(self) -> None:
        """Raise Unavailable when a request cannot succeed."""
        ...

    def info(self) -> Mapping[str, Any]:
        """Facts in force: providers, memory_bytes, pid; running, waiting, KV use where known."""
        ...

    def close(self) -> None:
        """Give everything back. Idempotent."""
        ...
