"""From a spec to an engine."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable

from forebay.errors import FailedPrecondition

from forebay_server.core.interfaces import Engine, EngineSpec

log = logging.getLogger("forebay.engines")


def create(spec: EngineSpec) -> Engine:
    """The engine of a spec, in this process or in one of its own; not loaded yet."""
    if spec.isolation == "process":
        from forebay_server.engines.process import ProcessEngine

        return ProcessEngine(spec)
    return create_in_process(spec)


def open_all(spec: EngineSpec, load: Callable[[Engine], None] | None = None) -> list[Engine]:
    """`spec.instances` engines, loaded; where the runtime can, they share one set of weights.

    Args:
        load: loads an engine, and may do more; `Engine.load` by default. Not called for engines that
            share what another one loaded.

    Raises:
        What `load` raises; nothing is left open then.
    """
    engines: list[Engine] = []
    try:
        for _ in range(spec.instances):
            share = getattr(engines[0], "share", None) if engines else None
            if share is not None:
                engines.append(share())
                continue
            engines.append(create(spec))
            if load is None:
                engines[-1].load()
            else:
                load(engines[-1])
    except BaseException:
        for engine in engines:
            engine.close()
        raise
    return engines


def create_in_process(spec: EngineSpec) -> Engine:
    """The engine itself. Imports its runtime only here."""
    if spec.engine == "onnxruntime":
        from forebay_server.engines.onnx import OnnxEngine

        return OnnxEngine(spec)
    if spec.engine == "openvino":
        return _openvino(spec)
    if spec.engine == "deterministic":
        from forebay_server.engines.deterministic import DeterministicEngine

        return DeterministicEngine(spec)
    raise FailedPrecondition(
        f"engine {spec.engine!r} is not known; known are onnxruntime, openvino, deterministic",
        reason="MODEL_REJECTED",
    )


def _openvino(spec: EngineSpec) -> Engine:
    """OpenVINO; ONNX Runtime on the same file where a GPU serves or OpenVINO cannot do it."""
    from forebay_server.engines import providers

    if any(p != "cpu" and p in providers.available() for p in spec.providers):
        from forebay_server.engines.onnx import OnnxEngine

        return OnnxEngine(spec)
    if importlib.util.find_spec("openvino") is None:
        lacks = "openvino is not installed (the extra `cpu`)"
    else:
        from forebay_server.engines import openvino

        lacks = openvino.lacking(spec)
        if not lacks:
            return openvino.OpenVinoEngine(spec)
    from forebay_server.engines.onnx import OnnxEngine

    log.warning("%s: %s; ONNX Runtime serves it, in the file's precision", spec.model, lacks)
    return OnnxEngine(spec, instead_of="openvino")
