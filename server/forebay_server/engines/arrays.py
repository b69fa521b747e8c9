"""Items to the arrays of one run, and a run's outputs to results: the same for every runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from forebay_server.core.interfaces import Batch, EngineSpec, Item, Result, TensorInput, TokenInput
from forebay_server.engines.pooling import pool

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
    "BYTES": np.object_,
}
#: Inputs that an engine fills by itself from token ids.
TOKEN_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
Arrays = dict[str, NDArray[Any]]


@dataclass(slots=True)
class Prepared:
    """The arrays of one run, and the mask that pooling needs.

    `rows`: what each output must have, to be divided among several items; 0 = there is one item.
    """

    feeds: Arrays
    mask: NDArray[Any] | None
    rows: int = 0


@dataclass(slots=True)
class Executed:
    """Outputs by name, with the mask of their inputs."""

    outputs: Arrays
    mask: NDArray[Any] | None


def prepare(spec: EngineSpec, batch: Batch, dtypes: Mapping[str, Any]) -> Prepared:
    """Pad ids to [rows, length], or concatenate tensors along the first axis.

    Args:
        dtypes: numpy's type of each input that the model has.
    """
    if spec.kind == "tokens":
        return _pad(spec, batch, dtypes)
    first = cast(TensorInput, batch.items[0].inputs)
    if len(batch.items) == 1:
        return Prepared({name: _plain(array) for name, array in first.items()}, None)
    feeds = {
        name: np.concatenate([_plain(cast(TensorInput, i.inputs)[name]) for i in batch.items])
        for name in first
    }
    return Prepared(feeds, None, batch.rows)


def _plain(array: NDArray[Any]) -> NDArray[Any]:
    if array.dtype != object:
        return array
    flat = array.reshape(-1).tolist()
    if bytes not in set(map(type, flat)):
        return array
    plain = [v.decode() if isinstance(v, bytes) else v for v in flat]
    return np.array(plain, object).reshape(array.shape)


def _pad(spec: EngineSpec, batch: Batch, dtypes: Mapping[str, Any]) -> Prepared:
    rows, length = len(batch.items), batch.length
    ids = np.full((rows, length), spec.pad_id, np.int64)
    mask = np.zeros((rows, length), np.int64)
    types = np.zeros((rows, length), np.int64) if "token_type_ids" in dtypes else None
    for i, item in enumerate(batch.items):
        tokens = cast(TokenInput, item.inputs)
        n = len(tokens.ids)
        at = slice(length - n, length) if spec.pad_left else slice(0, n)
        ids[i, at] = tokens.ids
        mask[i, at] = 1
        if types is not None and tokens.type_ids is not None:
            types[i, at] = tokens.type_ids
    feeds: Arrays = {"input_ids": ids}
    if "attention_mask" in dtypes:
        feeds["attention_mask"] = mask
    if types is not None:
        feeds["token_type_ids"] = types
    if "position_ids" in dtypes:
        feeds["position_ids"] = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    return Prepared({n: a.astype(dtypes[n], copy=False) for n, a in feeds.items()}, mask)


def executed(names: Sequence[str], values: Sequence[Any], inputs: Prepared) -> Executed:
    """What a run gave.

    Raises:
        ValueError: it cannot be told which rows are whose; the items must run alone.
    """
    outputs: Arrays = dict(zip(names, values, strict=True))
    if inputs.rows:
        for name, array in outputs.items():
            if rows_of(array) != inputs.rows:
                raise ValueError(
                    f"output {name!r} has shape {list(array.shape)} for {inputs.rows} rows"
                )
    return Executed(outputs, inputs.mask)


def rows_of(array: NDArray[Any]) -> int:
    """An array's first dimension; -1 where it has none."""
    return array.shape[0] if array.ndim else -1


def finish(spec: EngineSpec, outputs: Executed, batch: Batch) -> list[Result]:
    """One vector (or logits) per text; or each item's rows of every output."""
    if spec.kind == "tokens":
        values = outputs.outputs[spec.output]
        if values.ndim == 3:
            assert outputs.mask is not None
            values = pool(values, outputs.mask, spec.pooling, spec.pad_left)
        values = np.ascontiguousarray(values, np.float32)
        if spec.normalize:
            squares = np.einsum("ij,ij->i", values, values)  # half the time of linalg.norm
            values /= np.maximum(np.sqrt(squares), 1e-12)[:, None]
        return list(values)
    if len(batch.items) == 1:
        return [outputs.outputs]
    out: list[Result] = []
    at = 0
    for item in batch.items:
        out.append({n: a[at : at + item.rows] for n, a in outputs.outputs.items()})
        at += item.rows
    return out


def example(spec: EngineSpec, rows: int, length: int) -> Batch:
    """A batch of texts to warm up with."""
    ids = np.full(length, max(1, spec.pad_id), np.int64)
    return Batch([Item(TokenInput(ids), length)] * rows, length, rows)
