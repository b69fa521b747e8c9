"""The ONNX Runtime engine: token models (padded ids) and tensor models (concatenated rows)."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnxruntime as ort
from forebay.errors import FailedPrecondition, Unavailable
from numpy.typing import NDArray

from forebay_server.core.interfaces import (
    Batch,
    EngineSpec,
    Result,
    TensorInput,
    TensorSpec,
    TokenInput,
)
from forebay_server.engines import providers
from forebay_server.engines.pooling import pool

log = logging.getLogger("forebay.engines")

#: ONNX Runtime's type names -> the Open Inference Protocol's.
DATATYPES = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
}
#: The Open Inference Protocol's datatypes -> numpy's; BYTES is object.
NUMPY = {
    "BOOL": np.bool_,
    "UINT8": np.uint8,
    "UINT16": np.uint16,
    "UINT32": np.uint32,
    "UINT64": np.uint64,
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
}
#: Inputs that the engine fills by itself from token ids.
TOKEN_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


@dataclass(slots=True)
class Prepared:
    """The arrays of one run, and the mask that pooling needs."""

    feeds: dict[str, NDArray[Any]]
    mask: NDArray[Any] | None


@dataclass(slots=True)
class Executed:
    """Outputs by name, with the mask of their inputs."""

    outputs: dict[str, NDArray[Any]]
    mask: NDArray[Any] | None


def rejected(message: str) -> FailedPrecondition:
    """The error of a model that is not served, naming its fault."""
    return FailedPrecondition(message, reason="MODEL_REJECTED")


class OnnxEngine:
    """See interfaces.Engine."""

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        self._session: ort.InferenceSession | None = None
        self._providers: list[str] = []
        self._lacking: list[str] = []
        self._outputs: list[str] = []
        self._dtypes: dict[str, Any] = {}

    def load(self) -> None:
        """Open the model. Raises FailedPrecondition (MODEL_REJECTED) that names the fault."""
        path = Path(self.spec.path)
        if not path.is_file():
            raise rejected(f"{path.name} is not there")
        if path.stat().st_size == 0:
            raise rejected(f"{path.name} is empty")
        order, self._lacking = providers.chain(self.spec.providers)
        cache = str(self.spec.options.get("tensorrt_cache", "tensorrt-cache"))
        device = int(self.spec.options.get("device", 0))
        chosen = [
            (providers.NAMES[name], providers.options(name, path, cache, device)) for name in order
        ]
        try:
            session = ort.InferenceSession(str(path), self._session_options(), providers=chosen)
        except Exception as e:
            raise rejected(f"{path.name} cannot be loaded: {_first_line(e)}") from e
        self._check_signature(session)
        self._session = session
        self._providers = [providers.OURS.get(p, p) for p in session.get_providers()]
        self._outputs = (
            [self.spec.output]
            if self.spec.kind == "tokens"
            else [o.name for o in session.get_outputs()]
        )

    def _session_options(self) -> ort.SessionOptions:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self.spec.intra_op_threads
        options.inter_op_num_threads = 1
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        # Spinning threads burn the cores that the transport needs: on 2 cores, 64 callers and
        # 20-token texts, throughput rose by a tenth without it (benchmarks/README.md).
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # Weights live once in memory: the file's own copy is not kept beside the packed one.
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        _share_arena()
        options.add_session_config_entry("session.use_env_allocators", "1")
        if self.spec.kind == "tokens":
            # Batches differ in shape; a memory pattern for each of them would only grow.
            options.enable_mem_pattern = False
        return options

    def _check_signature(self, session: ort.InferenceSession) -> None:
        """Raise unless the file has the inputs and outputs that its manifest promises."""
        have = {i.name: i for i in session.get_inputs()}
        name = Path(self.spec.path).name
        for one in have.values():
            if one.type not in DATATYPES:
                raise rejected(f"{name}: input {one.name!r} has type {one.type}, not served")
        if self.spec.kind == "tokens":
            if "input_ids" not in have:
                raise rejected(f"{name} has no input 'input_ids'; it has {', '.join(have)}")
            odd = [n for n in have if n not in TOKEN_INPUTS]
            if odd:
                raise rejected(f"{name} wants inputs {odd} that a text model does not have")
        else:
            for spec in self.spec.inputs:
                self._check_tensor(name, spec, have)
            promised = {s.name for s in self.spec.inputs}
            extra = [n for n in have if n not in promised]
            if extra:
                raise rejected(f"{name} has inputs {extra} that its manifest does not name")
        self._dtypes = {n: NUMPY.get(DATATYPES[i.type]) for n, i in have.items()}
        outputs = {o.name: o for o in session.get_outputs()}
        for out_name, out in outputs.items():
            if out.type not in DATATYPES and (
                self.spec.kind == "tensors" or out_name == self.spec.output
            ):
                raise rejected(f"{name}: output {out_name!r} has type {out.type}, not served")
        wanted = (
            [self.spec.output]
            if self.spec.kind == "tokens"
            else [o.name for o in self.spec.outputs]
        )
        for one in wanted:
            if one not in outputs:
                raise rejected(f"{name} has no output {one!r}; it has {', '.join(outputs)}")

    @staticmethod
    def _check_tensor(file: str, spec: TensorSpec, have: Mapping[str, Any]) -> None:
        found = have.get(spec.name)
        if found is None:
            raise rejected(f"{file} has no input {spec.name!r}; it has {', '.join(have)}")
        if DATATYPES[found.type] != spec.datatype:
            raise rejected(
                f"{file}: input {spec.name!r} is {DATATYPES[found.type]}, "
                f"its manifest says {spec.datatype}"
            )
        if len(found.shape) != len(spec.shape):
            raise rejected(
                f"{file}: input {spec.name!r} has {len(found.shape)} dimensions, "
                f"its manifest says {len(spec.shape)}"
            )

    def warmup(self, shapes: Sequence[tuple[int, int]]) -> None:
        """Run each (rows, length) once. Tensor models need none: their first run costs little."""
        if self.spec.kind != "tokens":
            return
        from forebay_server.core.interfaces import Item

        for rows, length in shapes:
            ids = np.full(length, max(1, self.spec.pad_id), np.int64)
            batch = Batch([Item(TokenInput(ids), length)] * rows, length, rows)
            self.finish(self.execute(self.prepare(batch)), batch)

    def prepare(self, batch: Batch) -> Prepared:
        """Pad ids to [rows, length], or concatenate tensors along the first axis."""
        if self.spec.kind == "tokens":
            return self._pad(batch)
        first = cast(TensorInput, batch.items[0].inputs)
        if len(batch.items) == 1:
            feeds = {name: self._plain(name, array) for name, array in first.items()}
        else:
            feeds = {
                name: np.concatenate(
                    [self._plain(name, cast(TensorInput, i.inputs)[name]) for i in batch.items]
                )
                for name in first
            }
        return Prepared(feeds, None)

    def _plain(self, name: str, array: NDArray[Any]) -> NDArray[Any]:
        if array.dtype != object:
            return array
        return np.array(
            [
                v.decode("utf-8", "replace") if isinstance(v, bytes) else v
                for v in array.reshape(-1)
            ],
            object,
        ).reshape(array.shape)

    def _pad(self, batch: Batch) -> Prepared:
        rows, length = len(batch.items), batch.length
        ids = np.full((rows, length), self.spec.pad_id, np.int64)
        mask = np.zeros((rows, length), np.int64)
        types = np.zeros((rows, length), np.int64) if "token_type_ids" in self._dtypes else None
        for i, item in enumerate(batch.items):
            tokens = cast(TokenInput, item.inputs)
            n = len(tokens.ids)
            at = slice(length - n, length) if self.spec.pad_left else slice(0, n)
            ids[i, at] = tokens.ids
            mask[i, at] = 1
            if types is not None and tokens.type_ids is not None:
                types[i, at] = tokens.type_ids
        feeds: dict[str, NDArray[Any]] = {"input_ids": ids}
        if "attention_mask" in self._dtypes:
            feeds["attention_mask"] = mask
        if types is not None:
            feeds["token_type_ids"] = types
        if "position_ids" in self._dtypes:
            feeds["position_ids"] = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
        return Prepared({n: a.astype(self._dtypes[n], copy=False) for n, a in feeds.items()}, mask)

    def execute(self, inputs: Prepared) -> Executed:
        """Run the model; ONNX Runtime releases the GIL."""
        session = self._session
        if session is None:
            raise Unavailable(
                "the model is not loaded", reason="MODEL_NOT_READY", retry_after_s=1.0
            )
        if self._providers[0] == "cpu":
            values = session.run(self._outputs, inputs.feeds)
        else:
            values = self._run_bound(session, inputs.feeds)
        return Executed(
            cast(dict[str, NDArray[Any]], dict(zip(self._outputs, values, strict=True))),
            inputs.mask,
        )

    def _run_bound(
        self, session: ort.InferenceSession, feeds: Mapping[str, NDArray[Any]]
    ) -> list[NDArray[Any]]:
        """On a GPU: inputs and outputs are bound, so each crosses the bus once."""
        binding = session.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        for name in self._outputs:
            binding.bind_output(name, "cpu")
        session.run_with_iobinding(binding)
        return cast(list[NDArray[Any]], binding.copy_outputs_to_cpu())

    def finish(self, outputs: Executed, batch: Batch) -> Sequence[Result]:
        """One vector (or logits) per text; or each item's rows of every output."""
        if self.spec.kind == "tokens":
            values = outputs.outputs[self.spec.output]
            if values.ndim == 3:
                assert outputs.mask is not None
                values = pool(values, outputs.mask, self.spec.pooling, self.spec.pad_left)
            values = np.ascontiguousarray(values, np.float32)
            if self.spec.normalize:
                values /= np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)
            return list(values)
        if len(batch.items) == 1:
            return [outputs.outputs]
        out: list[Result] = []
        at = 0
        for item in batch.items:
            out.append({n: a[at : at + item.rows] for n, a in outputs.outputs.items()})
            at += item.rows
        return out

    def check_health(self) -> None:
        """Raise Unavailable when there is no session."""
        if self._session is None:
            raise Unavailable(
                "the model is not loaded", reason="MODEL_NOT_READY", retry_after_s=1.0
            )

    def close(self) -> None:
        """Drop the session; a thread's memory goes back as far as the allocator lets it."""
        self._session = None

    def info(self) -> Mapping[str, Any]:
        """Providers in force, those wanted in vain, and an estimate of resident bytes."""
        path = Path(self.spec.path)
        size = path.stat().st_size if path.exists() else 0
        return {
            "providers": list(self._providers),
            "providers_missing": list(self._lacking),
            # Packed weights plus arenas: 1.3 times the file, measured on the starter models.
            "memory_bytes": int(size * 1.3) if self._session is not None else 0,
            "pid": os.getpid(),
        }


@cache
def _share_arena() -> None:
    """One CPU arena for all sessions, growing by what is asked and not by doubling: 40 MB less."""
    memory = ort.OrtMemoryInfo(
        "Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT
    )
    ort.create_and_register_allocator(memory, ort.OrtArenaCfg({"arena_extend_strategy": 1}))


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0][:300] if text else type(error).__name__
