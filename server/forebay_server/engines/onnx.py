"""The ONNX Runtime engine: token models (padded ids) and tensor models (concatenated rows)."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import onnxruntime as ort
from forebay.errors import Unavailable
from numpy.typing import NDArray

from forebay_server.core.interfaces import Batch, EngineSpec, Result, TensorSpec
from forebay_server.engines import arrays, providers, tree_depth, trees
from forebay_server.engines.arrays import Executed, Prepared
from forebay_server.engines.occupancy import Occupancy
from forebay_server.engines.onnx_format import of_any_rank
from forebay_server.engines.signature import check, first_line, must_be_there, rejected

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


class _Sessions:
    """One model's sessions, which its instances share: `Run` may be called from several threads.

    With `wide`, a run that has the machine to itself uses all of its threads; runs beside each other
    use the threads of `narrow` each.
    """

    def __init__(self, narrow: ort.InferenceSession, wide: ort.InferenceSession | None) -> None:
        self.narrow = narrow
        self.wide = wide
        self._occupancy = Occupancy()

    @property
    def all(self) -> list[ort.InferenceSession]:
        return [self.narrow] if self.wide is None else [self.narrow, self.wide]

    def run(self, outputs: Sequence[str], feeds: Mapping[str, NDArray[Any]]) -> list[Any]:
        """Run on a CPU; ONNX Runtime releases the GIL."""
        if self.wide is None:
            return list(self.narrow.run(outputs, feeds))
        session = self.wide if self._occupancy.begin() else self.narrow
        try:
            return list(session.run(outputs, feeds))
        finally:
            self._occupancy.end()


class OnnxEngine:
    """See interfaces.Engine. `instead_of`: the engine that was asked for and cannot be had here."""

    def __init__(self, spec: EngineSpec, instead_of: str = "") -> None:
        self.spec = spec
        self._instead_of = [instead_of] if instead_of else []
        self._sessions: _Sessions | None = None
        #: Where the model is nothing but a regressor's trees: by which number the extension has them.
        self.trees: int | None = None
        self._shares = False
        self._providers: list[str] = []
        self._lacking: list[str] = []
        self._outputs: list[str] = []
        self._dtypes: dict[str, Any] = {}

    def load(self) -> None:
        """Open the model. Raises FailedPrecondition (MODEL_REJECTED) that names the fault."""
        path = must_be_there(self.spec)
        order, self._lacking = providers.chain(self.spec.providers)
        cache = str(self.spec.options.get("tensorrt_cache", "tensorrt-cache"))
        device = int(self.spec.options.get("device", 0))
        chosen = [
            (providers.NAMES[name], providers.options(name, path, cache, device)) for name in order
        ]
        threads = self.spec.intra_op_threads
        model = tree_depth.read(path)
        own = None
        if model is not None and order == ["cpu"] and trees.library():
            own = trees.replaced(model)
        number = trees.whole(model) if own is not None else None
        del model

        def opened(threads: int, alone: bool = False) -> ort.InferenceSession:
            options = self._session_options(threads)
            # Spinning threads burn the cores that the transport needs: on 2 cores, 64 callers and
            # 20-token texts, throughput rose by a tenth without it. Where nobody else has work,
            # waking threads at each operator would cost a lone text more than a sixth (9.2 ms in
            # place of 7.6); once its run has ended, nothing spins.
            options.add_session_config_entry(
                "session.intra_op.allow_spinning", "1" if alone else "0"
            )
            if alone:
                options.add_session_config_entry("session.force_spinning_stop", "1")
            if own is not None:
                options.register_custom_ops_library(trees.library())
                # A model in memory would have the weights that it names beside itself read from the
                # server's working directory.
                options.add_session_config_entry(
                    "session.model_external_initializers_file_folder_path", str(path.parent)
                )
            return ort.InferenceSession(own or str(path), options, providers=chosen)

        try:
            try:
                session = opened(threads)
            except Exception as e:
                if own is None:
                    raise
                log.warning("%s: its trees run in ONNX Runtime: %s", path, first_line(e))
                own = None
                session = opened(threads)
            self._providers = [providers.OURS.get(p, p) for p in session.get_providers()]
            # The extension's trees use one thread, however many there are.
            lone = self.spec.lone_threads if self._providers[0] == "cpu" and own is None else 0
            wide = opened(lone, alone=True) if lone not in (0, threads) else None
        except Exception as e:
            raise rejected(f"{path.name} cannot be loaded: {first_line(e)}") from e
        self._check_signature(session)
        self._sessions = _Sessions(session, wide)
        self.trees = number if own is not None else None
        self._outputs = (
            [self.spec.output]
            if self.spec.kind == "tokens"
            else [o.name for o in session.get_outputs()]
        )

    def share(self) -> OnnxEngine:
        """Another instance of the loaded model, on the same sessions: no weights of its own."""
        other = OnnxEngine(self.spec)
        other.__dict__.update(self.__dict__)
        other._shares = True
        return other

    def _session_options(self, threads: int) -> ort.SessionOptions:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        # Weights live once in memory: the file's own copy is not kept beside the packed one.
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        _share_arena()
        options.add_session_config_entry("session.use_env_allocators", "1")
        if self.spec.kind == "tokens":
            # Batches differ in shape; a memory pattern for each of them would only grow.
            options.enable_mem_pattern = False
        return options

    def _check_signature(self, session: ort.InferenceSession) -> None:
        def specs(values: Any) -> dict[str, TensorSpec]:
            return {v.name: TensorSpec(v.name, v.type, tuple(v.shape)) for v in values}

        have = specs(session.get_inputs())
        ranked = [name for name, one in have.items() if one.shape]
        for name in of_any_rank(Path(self.spec.path), have.keys() - ranked):
            have[name] = replace(have[name], shape=None)
        check(self.spec, have, specs(session.get_outputs()), DATATYPES)
        self._dtypes = {n: arrays.NUMPY[DATATYPES[t.datatype]] for n, t in have.items()}

    def warmup(self, shapes: Sequence[tuple[int, int]]) -> None:
        """Run each (rows, length) once. Tensor models need none: their first run costs little."""
        if self.spec.kind != "tokens" or not shapes:
            return
        for rows, length in shapes:
            batch = arrays.example(self.spec, rows, length)
            self.finish(self.execute(self.prepare(batch)), batch)
            if self._sessions is not None and self._sessions.wide is not None:
                self._sessions.narrow.run(self._outputs, self.prepare(batch).feeds)
        if self._sessions is not None and self._providers[0] == "cpu":
            # An idle server holds no activations: after this run the arena gives back what is free.
            options = ort.RunOptions()
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
            least = self.prepare(arrays.example(self.spec, 1, min(length for _, length in shapes)))
            for session in self._sessions.all:
                session.run(self._outputs, least.feeds, options)

    def prepare(self, batch: Batch) -> Prepared:
        """Pad ids to [rows, length], or concatenate tensors along the first axis."""
        return arrays.prepare(self.spec, batch, self._dtypes)

    def execute(self, inputs: Prepared) -> Executed:
        """Run the model; ONNX Runtime releases the GIL."""
        sessions = self._sessions
        if sessions is None:
            raise Unavailable(
                "the model is not loaded", reason="MODEL_NOT_READY", retry_after_s=1.0
            )
        if self._providers[0] == "cpu":
            values = sessions.run(self._outputs, inputs.feeds)
        else:
            values = self._run_bound(sessions.narrow, inputs.feeds)
        return arrays.executed(self._outputs, values, inputs)

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
        return cast("list[NDArray[Any]]", binding.copy_outputs_to_cpu())

    def finish(self, outputs: Executed, batch: Batch) -> Sequence[Result]:
        """One vector (or logits) per text; or each item's rows of every output."""
        return arrays.finish(self.spec, outputs, batch)

    def check_health(self) -> None:
        """Raise Unavailable when there is no session."""
        if self._sessions is None:
            raise Unavailable(
                "the model is not loaded", reason="MODEL_NOT_READY", retry_after_s=1.0
            )

    def close(self) -> None:
        """Drop the session; a thread's memory goes back as far as the allocator lets it."""
        self._sessions = None
        self.trees = None

    def info(self) -> Mapping[str, Any]:
        """Providers in force, those wanted in vain, and an estimate of resident bytes."""
        path = Path(self.spec.path)
        size = path.stat().st_size if path.exists() else 0
        sessions = 0 if self._sessions is None or self._shares else len(self._sessions.all)
        return {
            "providers": list(self._providers),
            "providers_missing": [*self._instead_of, *self._lacking],
            # Packed weights plus arenas: 1.3 times the file, measured on the starter models.
            "memory_bytes": int(size * 1.3) * sessions,
            "pid": os.getpid(),
        }


@cache
def _share_arena() -> None:
    """One CPU arena for all sessions, growing by what is asked and not by doubling: 40 MB less."""
    memory = ort.OrtMemoryInfo(
        "Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT
    )
    ort.create_and_register_allocator(memory, ort.OrtArenaCfg({"arena_extend_strategy": 1}))
