"""Execution providers of ONNX Runtime by our names, with their fallbacks said."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort
from forebay.errors import FailedPrecondition

log = logging.getLogger("forebay.engines")

NAMES = {
    "tensorrt": "TensorrtExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "cpu": "CPUExecutionProvider",
}
OURS = {v: k for k, v in NAMES.items()}


def available() -> list[str]:
    """Providers that this installation of ONNX Runtime has, best first."""
    have = set(ort.get_available_providers())
    return [ours for ours, theirs in NAMES.items() if theirs in have]


def chain(wanted: Sequence[str]) -> tuple[list[str], list[str]]:
    """The providers to try in order, and what was wanted in vain.

    TensorRT falls back to CUDA, and everything to the CPU.
    """
    for name in wanted:
        if name not in NAMES:
            raise FailedPrecondition(
                f"execution provider {name!r} is not known; known are {', '.join(NAMES)}",
                reason="MODEL_REJECTED",
            )
    order = list(wanted)
    if "tensorrt" in order and "cuda" not in order:
        order.insert(order.index("tensorrt") + 1, "cuda")
    if "cpu" not in order:
        order.append("cpu")
    have = available()
    lacking = [p for p in wanted if p not in have]
    if lacking:
        log.warning("execution providers %s are not here; falling back to %s", lacking, have)
    return [p for p in order if p in have], lacking


def options(name: str, model: Path, cache_root: str, device: int) -> dict[str, Any]:
    """Options of one provider for one model file."""
    if name == "tensorrt":
        folder = Path(cache_root) / tensorrt_cache_key(model, device)
        folder.mkdir(parents=True, exist_ok=True)
        return {
            "device_id": device,
            "trt_engine_cache_enable": True,
            "trt_engine_cache_path": str(folder),
            "trt_timing_cache_enable": True,
            "trt_timing_cache_path": str(folder),
            "trt_fp16_enable": False,
        }
    if name == "cuda":
        # kSameAsRequested: the arena does not double at each growth, so unloads give back more.
        return {"device_id": device, "arena_extend_strategy": "kSameAsRequested"}
    return {}


def tensorrt_cache_key(model: Path, device: int) -> str:
    """Folder name for compiled engines: they are good for one GPU kind, one version, one model."""
    digest = hashlib.sha256()
    with model.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    parts = [gpu_name(device), f"ort{ort.__version__}", f"trt{_tensorrt_version()}"]
    safe = "-".join("".join(c if c.isalnum() else "_" for c in p) for p in parts)
    return f"{safe}-{digest.hexdigest()[:16]}"


def gpu_name(device: int) -> str:
    """Name and compute capability of a GPU; `none` where there is none."""
    try:
        import pynvml  # type: ignore[import-not-found]

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(device)
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
        return f"{pynvml.nvmlDeviceGetName(handle)}-sm{major}{minor}"
    except Exception:  # any failure means that there is no usable GPU
        return "none"


def _tensorrt_version() -> str:
    try:
        import tensorrt  # type: ignore[import-not-found]

        return str(tensorrt.__version__)
    except ImportError:
        return "unknown"
