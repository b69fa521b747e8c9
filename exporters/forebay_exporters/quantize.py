"""Smaller and quicker: int8 (dynamic, and static with calibration data) and fp16."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

#: Operators whose weights become int8. Word vectors too: a third of the size, cosine unchanged.
OPERATORS = ["MatMul", "Attention", "Gemm", "EmbedLayerNormalization"]


def int8_dynamic(source: Path, target: Path, leave_out: Sequence[str] = ()) -> None:
    """Weights int8 per channel, activations quantised at run time.

    Args:
        leave_out: names of nodes that stay as they are, because quality asks for it.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # It warns of pre-processing and of types that it cannot infer: the graph is fused already.
    logging.getLogger().addFilter(_quiet)
    quantize_dynamic(
        source,
        target,
        op_types_to_quantize=OPERATORS,
        per_channel=True,
        # Reduced range is for processors without VNNI, where int8 products saturate at 16 bits.
        reduce_range=not has_vnni(),
        weight_type=QuantType.QInt8,
        nodes_to_exclude=list(leave_out),
        # Shape inference does not know the fused operators; every tensor here is a float.
        extra_options={"MatMulConstBOnly": True, "DefaultTensorType": 1},
    )


def _quiet(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    return not text.startswith(
        ("Please consider to run pre-processing", "Failed to infer data type")
    )


def int8_static(
    source: Path, target: Path, calibration: Iterable[dict[str, Any]], leave_out: Sequence[str] = ()
) -> None:
    """Weights and activations int8, ranges taken from real inputs (feeds of the model)."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._feeds = iter(calibration)

        def get_next(self) -> dict[str, Any] | None:  # type: ignore[override]
            return next(self._feeds, None)

    quantize_static(
        source,
        target,
        Reader(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["MatMul", "Gemm"],
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        nodes_to_exclude=list(leave_out),
    )


def fp16(source: Path, target: Path) -> None:
    """Weights and arithmetic in half precision; inputs and outputs keep their types. For GPUs."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = onnx.load(str(source))
    onnx.save(convert_float_to_float16(model, keep_io_types=True), str(target))


def optimized(source: Path, target: Path, heads: int, hidden: int) -> None:
    """Fuse a BERT-like graph by ONNX Runtime's transformer optimizer."""
    from onnxruntime.transformers import optimizer

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "model.onnx"
        model = optimizer.optimize_model(
            str(source), model_type="bert", num_heads=heads, hidden_size=hidden, opt_level=0
        )
        model.save_model_to_file(str(out))
        shutil.move(out, target)


def has_vnni() -> bool:
    """Whether this processor multiplies int8 without saturating."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_vnni" in flags or "avx_vnni" in flags
