"""Weights of an OpenVINO model in less memory, before it is compiled.

int8: one scale per output channel. The CPU plugin multiplies such weights by activations that it
quantises itself at run time, group by group along each row (DYNAMIC_QUANTIZATION_GROUP_SIZE): an
outlier spoils its own group only, and no calibration data is needed. bf16: what the plugin would
round the weights to anyway; it need not hold them in fp32 first.

Products get their weights as [outputs, inputs], the way the plugin packs them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as ops

#: Smaller constants are left alone: nothing is won on a head of three labels.
LEAST_VALUES = 16_384


def compress(model: ov.Model, precision: str) -> int:
    """Replace the float weights of products and lookups, in place, by `int8` or `bf16` ones.

    Gives how many were replaced.
    """
    replaced = 0
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        if kind == "MatMul":
            replaced += _product(node, precision)
        elif kind == "Gather":
            replaced += _lookup(node, precision)
    if replaced:
        model.validate_nodes_and_infer_types()
    return replaced


def _product(node: Any, precision: str) -> bool:
    weights = _weights(node.input_value(1))
    if weights is None:
        return False
    attributes = node.get_attributes()
    rows = weights if attributes["transpose_b"] else np.ascontiguousarray(weights.T)
    smaller = _smaller(rows, precision)
    product = ops.matmul(node.input_value(0), smaller, attributes["transpose_a"], True)
    _take_over(node, product)
    return True


def _lookup(node: Any, precision: str) -> bool:
    table = _weights(node.input_value(0))
    axis = node.input_value(2).get_node()
    if table is None or axis.get_type_name() != "Constant" or int(axis.get_data().flat[0]) != 0:
        return False
    found = ops.gather(_smaller(table, precision), node.input_value(1), node.input_value(2))
    _take_over(node, found)
    return True


def _weights(source: Any) -> NDArray[np.float32] | None:
    """The matrix that a node's input is a constant of; None when it is something else."""
    node = source.get_node()
    if node.get_type_name() != "Constant" or node.get_element_type() != ov.Type.f32:
        return None
    values = node.get_data()
    return values if values.ndim == 2 and values.size >= LEAST_VALUES else None


def _smaller(rows: NDArray[np.float32], precision: str) -> Any:
    """[n, k] as bf16, or as int8 with a scale for each of the n rows."""
    if precision == "bf16":
        return ops.convert(ops.constant(rows, dtype=ov.Type.bf16), ov.Type.f32)
    scale = np.maximum(np.abs(rows).max(axis=1, keepdims=True) / 127, 1e-12).astype(np.float32)
    values = np.clip(np.rint(rows / scale), -127, 127).astype(np.int8)
    return ops.multiply(ops.convert(ops.constant(values), ov.Type.f32), ops.constant(scale))


def _take_over(old: Any, new: Any) -> None:
    new.set_friendly_name(old.get_friendly_name())
    for target in list(old.output(0).get_target_inputs()):
        target.replace_source_output(new.output(0))
