"""From a spec to an engine."""

from __future__ import annotations

from forebay.errors import FailedPrecondition

from forebay_server.core.interfaces import Engine, EngineSpec


def create(spec: EngineSpec) -> Engine:
    """The engine of a spec, in this process or in one of its own; not loaded yet."""
    if spec.isolation == "process":
        from forebay_server.engines.process import ProcessEngine

        return ProcessEngine(spec)
    return create_in_process(spec)


def create_in_process(spec: EngineSpec) -> Engine:
    """The engine itself. Imports its runtime only here."""
    if spec.engine == "onnxruntime":
        from forebay_server.engines.onnx import OnnxEngine

        return OnnxEngine(spec)
    if spec.engine == "deterministic":
        from forebay_server.engines.deterministic import DeterministicEngine

        return DeterministicEngine(spec)
    raise FailedPrecondition(
        f"engine {spec.engine!r} is not known; known are onnxruntime, deterministic",
        reason="MODEL_REJECTED",
    )
