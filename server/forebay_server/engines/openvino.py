"""The OpenVINO engine: ONNX files on CPUs, in fp32, bf16 or int8.

Options (EngineSpec.options, `engine_options` of model.yaml):

    precision    fp32 (default); bf16: products in bfloat16; int8: weights as int8, activations
                 quantised at run time, group by group (see weights)
    group_size   activations of a row that share a scale, with int8: 32 (default), 64 or 128
    kernels      compiled kernels that are kept for shapes met before, default 1000, by all instances
                 together; each new shape costs milliseconds once, each kept one up to a megabyte

The artefact stays what it is, an fp32 ONNX file: the precision is chosen when it is loaded. So the
factory can give it to ONNX Runtime where OpenVINO is not installed or the processor lacks what the
precision needs (`lacking`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any, cast

import numpy as np
import openvino as ov
from forebay.errors import Unavailable
from openvino.frontend import FrontEndManager

from forebay_server.core.interfaces import Batch, EngineSpec, Result, TensorSpec
from forebay_server.engines import arrays
from forebay_server.engines.arrays import Executed, Prepared
from forebay_server.engines.occupancy import Occupancy
from forebay_server.engines.signature import check, first_line, must_be_there, rejected
from forebay_server.engines.weights import compress

log = logging.getLogger("forebay.engines")

PRECISIONS = ("fp32", "bf16", "int8")
GROUP_SIZES = (32, 64, 128)
#: OpenVINO's own default, 5000, let a server of mixed lengths grow by 600 MB and more.
KERNELS = 1000
#: OpenVINO's type names -> the Open Inference Protocol's. Strings and trees are ONNX Runtime's.
DATATYPES = {
    "boolean": "BOOL",
    "u8": "UINT8",
    "u16": "UINT16",
    "u32": "UINT32",
    "u64": "UINT64",
    "i8": "INT8",
    "i16": "INT16",
    "i32": "INT32",
    "i64": "INT64",
    "f16": "FP16",
    "f32": "FP32",
    "f64": "FP64",
}


@cache
def core() -> ov.Core:
    """One for the process: it holds the plugin."""
    return ov.Core()


def read(path: Path) -> ov.Model:
    """An ONNX file; `Core.read_model` would try every other format on a bad one."""
    frontend = FrontEndManager().load_by_framework("onnx")
    return frontend.convert(frontend.load(str(path)))


def precision(spec: EngineSpec) -> str:
    """The precision that is asked for. Raises FailedPrecondition (MODEL_REJECTED) for an odd one."""
    given = spec.options.get("precision", "fp32")
    if given not in PRECISIONS:
        raise rejected(f"engine_options.precision is {given!r}; known are {', '.join(PRECISIONS)}")
    return str(given)


def lacking(spec: EngineSpec) -> str:
    """What the processor lacks for a spec's precision; empty when nothing."""
    wanted = precision(spec)
    if wanted == "bf16" and "BF16" not in _capabilities():
        return "the processor has no bfloat16 (AVX512_BF16 or AMX)"
    if wanted == "int8" and not _has_vnni():
        return "the processor has no int8 products (VNNI or AMX)"
    return ""


@cache
def _capabilities() -> frozenset[str]:
    return frozenset(core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


@cache
def _has_vnni() -> bool:
    """OpenVINO says INT8 on every processor; whether it pays is in the flags."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return any(f in flags for f in ("avx512_vnni", "avx_vnni", "amx_int8"))


@dataclass(frozen=True, slots=True)
class _Loaded:
    """What the instances of a model share. `narrow` has a stream for each of them; `wide`, if any,
    one with all threads, for a run that has the machine to itself."""

    narrow: ov.CompiledModel
    wide: ov.CompiledModel | None
    occupancy: Occupancy

    @property
    def all(self) -> list[ov.CompiledModel]:
        return [self.narrow] if self.wide is None else [self.narrow, self.wide]


class OpenVinoEngine:
    """See interfaces.Engine."""

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        self._loaded: _Loaded | None = None
        self._shares = False
        self._narrow: ov.InferRequest | None = None
        self._wide: ov.InferRequest | None = None
        self._outputs: dict[str, int] = {}
        self._dtypes: dict[str, Any] = {}
        self._weights_bytes = 0

    def load(self) -> None:
        """Read, convert, compile. Raises FailedPrecondition (MODEL_REJECTED) that names the fault."""
        wanted = precision(self.spec)
        # Odd options are refused by their own names, not as a model that cannot be compiled.
        self._group_size()
        self._kernels()
        path = must_be_there(self.spec)
        try:
            model = read(path)
        except Exception as e:
            raise rejected(f"{path.name} cannot be loaded: {_said(e, path)}") from e
        self._check_signature(model)
        if wanted != "fp32" and not compress(model, wanted):
            log.warning("%s: no float32 weights to make %s", self.spec.model, wanted)
        try:
            narrow = self._compile(model, wanted, self._streams(), self._threads())
            lone = self.spec.lone_threads
            wide = self._compile(model, wanted, 1, lone) if self._has_wide() else None
        except Exception as e:
            raise rejected(f"{path.name} cannot be compiled: {_said(e, path)}") from e
        names = [o.get_any_name() for o in narrow.outputs]
        kept = [self.spec.output] if self.spec.kind == "tokens" else names
        self._outputs = {n: names.index(n) for n in kept}
        size = path.stat().st_size
        self._weights_bytes = size // {"int8": 4, "bf16": 2}.get(wanted, 1)
        self._loaded = _Loaded(narrow, wide, Occupancy())
        self._open_requests()

    def share(self) -> OpenVinoEngine:
        """Another instance of the loaded model: a stream of its own, no weights."""
        other = OpenVinoEngine(self.spec)
        other.__dict__.update(self.__dict__)
        other._shares = True
        other._open_requests()
        return other

    def _open_requests(self) -> None:
        assert self._loaded is not None
        self._narrow = self._loaded.narrow.create_infer_request()
        wide = self._loaded.wide
        self._wide = wide.create_infer_request() if wide is not None else None

    def _streams(self) -> int:
        """One for each instance that shares what is loaded: none does in processes of their own."""
        return self.spec.instances if self.spec.isolation == "thread" else 1

    def _has_wide(self) -> bool:
        return self.spec.lone_threads not in (0, self._threads())

    def _threads(self) -> int:
        """Of one instance."""
        return self.spec.intra_op_threads or os.cpu_count() or 1

    def _compile(
        self, model: ov.Model, wanted: str, streams: int, threads: int
    ) -> ov.CompiledModel:
        # Each stream keeps kernels of its own.
        graphs = self._streams() + self._has_wide()
        settings: dict[str, Any] = {
            "NUM_STREAMS": streams,
            "INFERENCE_NUM_THREADS": streams * threads,
            "INFERENCE_PRECISION_HINT": "bf16" if wanted == "bf16" else "f32",
            # The transport's threads run on the same cores: the system knows best where.
            "ENABLE_CPU_PINNING": False,
            "CPU_RUNTIME_CACHE_CAPACITY": str(ceil(self._kernels() / graphs)),
        }
        if wanted == "int8":
            settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = str(self._group_size())
        return core().compile_model(model, "CPU", settings)

    def _group_size(self) -> int:
        group = self.spec.options.get("group_size", GROUP_SIZES[0])
        if group not in GROUP_SIZES:
            raise rejected(f"engine_options.group_size is {group!r}; known are 32, 64, 128")
        return int(group)

    def _kernels(self) -> int:
        given = self.spec.options.get("kernels", KERNELS)
        if not isinstance(given, int) or isinstance(given, bool) or not 0 <= given <= 100_000:
            raise rejected(f"engine_options.kernels is {given!r}; allowed are 0 to 100000")
        return given

    def _check_signature(self, model: ov.Model) -> None:
        def specs(values: Any) -> dict[str, TensorSpec]:
            out = {}
            for v in values:
                shape = v.get_partial_shape()
                sizes = None
                if shape.rank.is_static:
                    sizes = tuple(d.get_length() if d.is_static else -1 for d in shape)
                kind = v.get_element_type().get_type_name()
                out[v.get_any_name()] = TensorSpec(v.get_any_name(), kind, sizes)
            return out

        have = specs(model.inputs)
        check(self.spec, have, specs(model.outputs), DATATYPES)
        self._dtypes = {n: arrays.NUMPY[DATATYPES[t.datatype]] for n, t in have.items()}

    def warmup(self, shapes: Sequence[tuple[int, int]]) -> None:
        """Run each (rows, length) once. Tensor models need none: their first run costs little."""
        if self.spec.kind != "tokens":
            return
        for rows, length in shapes:
            batch = arrays.example(self.spec, rows, length)
            inputs = self.prepare(batch)
            for request in (self._narrow, self._wide):
                if request is not None:
                    self.finish(self._run(request, inputs), batch)
        if self._loaded is not None:  # an idle server holds no activations
            for compiled in self._loaded.all:
                compiled.release_memory()

    def prepare(self, batch: Batch) -> Prepared:
        """Pad ids to [rows, length], or concatenate tensors along the first axis."""
        return arrays.prepare(self.spec, batch, self._dtypes)

    def execute(self, inputs: Prepared) -> Executed:
        """Run the model; OpenVINO releases the GIL."""
        loaded, narrow = self._loaded, self._narrow
        if loaded is None or narrow is None:
            raise Unavailable(
                "the model is not loaded", reason="MODEL_NOT_READY", retry_after_s=1.0
            )
        if self._wide is None:
            return self._run(narrow, inputs)
        request = self._wide if loaded.occupancy.begin() else narrow
        try:
            return self._run(request, inputs)
        finally:
            loaded.occupancy.end()

    def _run(self, request: ov.InferRequest, inputs: Prepared) -> Executed:
        request.infer(cast(Any, inputs.feeds), share_inputs=True)
        # Copied: the next run, which may overlap `finish`, writes into the same memory.
        values = {n: np.array(request.get_output_tensor(i).data) for n, i in self._outputs.items()}
        return Executed(values, inputs.mask)

    def finish(self, outputs: Executed, batch: Batch) -> Sequence[Result]:
        """One vector (or logits) per text; or each item's rows of every output."""
        return arrays.finish(self.spec, outputs, batch)

    def check_health(self) -> None:
        """Raise Unavailable when there is no model."""
        if self._loaded is None:
            raise Unavailable(
                "the model is not loaded", reason="MODEL_NOT_READY", retry_after_s=1.0
            )

    def close(self) -> None:
        """Drop the model; a thread's memory goes back as far as the allocator lets it."""
        self._loaded = self._narrow = self._wide = None

    def info(self) -> Mapping[str, Any]:
        """The runtime and its precision as provider, and an estimate of resident bytes."""
        graphs = 0 if self._loaded is None or self._shares else len(self._loaded.all)
        return {
            "providers": [f"openvino-{precision(self.spec)}"],
            "providers_missing": [],
            # Packed weights plus activations: 1.3 times the weights, as for ONNX Runtime.
            "memory_bytes": int(self._weights_bytes * 1.3) * graphs,
            "pid": os.getpid(),
        }


def _said(error: Exception, path: Path) -> str:
    """The line that says what is wrong: the first ones name OpenVINO's own source files."""
    lines = [x for x in str(error).replace(str(path), path.name).splitlines() if x.strip()]
    listed = [x.removeprefix("-- ") for x in lines if x.startswith("-- ")]
    plain = [x for x in lines if not x.startswith(("Exception from", "Check '"))]
    return (listed or plain or [first_line(error)])[0][:300]
