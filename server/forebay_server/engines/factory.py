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
    engine, lacks = runtime(spec)
    if engine == "onnxruntime":
        from forebay_server.engines.onnx import OnnxEngine

        if lacks:
            log.warning(
                "%s: %s; ONNX Runtime serves it, in the file's precision", spec.model, lacks
            )
        return OnnxEngine(spec, instead_of=spec.engine if lacks else "")
    if engine == "openvino":
        from forebay_server.engines.openvino import OpenVinoEngine

        return OpenVinoEngine(spec)
    if engine == "deterministic":
        from forebay_server.engines.deterministic import DeterministicEngine

        return DeterministicEngine(spec)
    raise FailedPrecondition(
        f"engine {spec.engine!r} is not known; known are onnxruntime, openvino, deterministic",
        reason="MODEL_REJECTED",
    )


def runtime(spec: EngineSpec) -> tuple[str, str]:
    """The runtime that serves a spec on this machine, and what the one that was asked for lacks:
    ONNX Runtime on the same file where a GPU serves or OpenVINO cannot do it."""
    from forebay_server.engines import providers

    if spec.engine != "openvino":
        return spec.engine, ""
    if any(p != "cpu" and p in providers.available() for p in spec.providers):
        return "onnxruntime", ""
    if importlib.util.find_spec("openvino") is None:
        return "onnxruntime", "openvino is not installed (the extra `cpu`)"
    from forebay_server.engines import openvino

    lacks = openvino.lacking(spec)
    return ("onnxruntime" if lacks else "openvino"), lacks
