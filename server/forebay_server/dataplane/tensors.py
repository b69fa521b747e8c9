"""Bare tensors: the Open Inference Protocol's datatypes as numpy, checked against a signature."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from forebay.datatypes import DTYPES
from forebay.errors import ForebayError, InvalidArgument
from numpy.typing import NDArray

from forebay_server.core.call import Call
from forebay_server.core.interfaces import TensorSpec
from forebay_server.dataplane.blocks import Blocks, answer_each
from forebay_server.dataplane.models import ModelAccess, ServedModel

_NAMES = {np.dtype(v).newbyteorder("="): k for k, v in DTYPES.items()}
#: Elements of one tensor at most; the message bound holds long before for dense data.
MAX_ELEMENTS = 1 << 28
#: Dimensions of one tensor at most: numpy has no more.
MAX_DIMENSIONS = 64


def datatype_of(array: NDArray[Any]) -> str:
    """The OIP datatype of an array."""
    if array.dtype.kind in "OSU":
        return "BYTES"
    return _NAMES[array.dtype.newbyteorder("=")]


def element_count(shape: Sequence[int], path: str) -> int:
    """Elements of a shape. Raises InvalidArgument for negative or absurd dimensions."""
    if len(shape) > MAX_DIMENSIONS:
        raise InvalidArgument.at(
            f"{path}.shape", f"has {len(shape)} dimensions; the limit is {MAX_DIMENSIONS}"
        )
    if any(d < 0 for d in shape):
        raise InvalidArgument.at(f"{path}.shape", f"is {list(shape)}; dimensions are at least 0")
    # A dimension of 0 leaves no element, but numpy multiplies the others all the same.
    most = math.prod(d for d in shape if d)
    if most > MAX_ELEMENTS:
        raise InvalidArgument.at(
            f"{path}.shape", f"has {most} elements; the limit is {MAX_ELEMENTS}"
        )
    return math.prod(shape)


def from_raw(datatype: str, shape: Sequence[int], data: bytes, path: str) -> NDArray[Any]:
    """An array over raw little-endian bytes (no copy), or of byte strings for BYTES."""
    n = element_count(shape, path)
    if datatype == "BYTES":
        return np.array(_split_bytes(data, n, path), object).reshape(shape)
    dtype = DTYPES.get(datatype)
    if dtype is None:
        raise InvalidArgument.at(
            f"{path}.datatype", f"is {datatype!r}; allowed are {', '.join([*DTYPES, 'BYTES'])}"
        )
    need = n * np.dtype(dtype).itemsize
    if len(data) != need:
        raise InvalidArgument.at(
            path, f"has {len(data)} bytes; {need} are needed for {datatype} {list(shape)}"
        )
    return np.frombuffer(data, dtype).reshape(shape)


def _split_bytes(data: bytes, n: int, path: str) -> list[bytes]:
    out: list[bytes] = []
    at = 0
    for _ in range(n):
        if at + 4 > len(data):
            raise InvalidArgument.at(path, f"ends after {len(out)} of {n} byte strings")
        (size,) = struct.unpack_from("<I", data, at)
        at += 4
        if at + size > len(data):
            raise InvalidArgument.at(
                path, f"byte string {len(out)} says {size} bytes; {len(data) - at} are left"
            )
        out.append(data[at : at + size])
        at += size
    if at != len(data):
        raise InvalidArgument.at(path, f"has {len(data) - at} bytes after its {n} byte strings")
    return out


def to_raw(array: NDArray[Any]) -> bytes:
    """Raw little-endian bytes of an array; byte strings each behind its length."""
    if array.dtype.kind in "OSU":
        parts = []
        for value in array.reshape(-1):
            data = value if isinstance(value, bytes) else str(value).encode()
            parts.append(struct.pack("<I", len(data)) + data)
        return b"".join(parts)
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return np.ascontiguousarray(little).tobytes()


def check_against(
    specs: Sequence[TensorSpec], tensors: Mapping[str, NDArray[Any]], path: Callable[[str], str]
) -> None:
    """Raise InvalidArgument unless the tensors are the signature's inputs."""
    by_name = {s.name: s for s in specs}
    for name in by_name:
        if name not in tensors:
            raise InvalidArgument.at(
                "inputs", f"lacks {name!r}; the model's inputs are {', '.join(by_name)}"
            )
    for name, array in tensors.items():
        spec = by_name.get(name)
        if spec is None:
            raise InvalidArgument.at(
                path(name), f"is no input of this model; its inputs are {', '.join(by_name)}"
            )
        got = datatype_of(array)
        if got != spec.datatype:
            raise InvalidArgument.at(path(name), f"is {got}; the model takes {spec.datatype}")
        if spec.shape is None:
            continue
        fits = len(array.shape) == len(spec.shape) and all(
            want in (-1, have) for want, have in zip(spec.shape, array.shape, strict=True)
        )
        if not fits:
            raise InvalidArgument.at(
                path(name), f"has shape {list(array.shape)}; the model takes {list(spec.shape)}"
            )


def decoded(
    tensors: Mapping[str, NDArray[Any]], path: Callable[[str], str]
) -> Mapping[str, NDArray[Any]]:
    """The tensors with texts in place of byte strings, as models take them. Raises InvalidArgument
    for the first element that is not UTF-8."""
    if all(a.dtype != object for a in tensors.values()):
        return tensors
    return {k: _texts(a, path(k)) if a.dtype == object else a for k, a in tensors.items()}


def _texts(array: NDArray[Any], path: str) -> NDArray[Any]:
    texts: list[Any] = array.reshape(-1).tolist()
    for i, value in enumerate(texts):
        if isinstance(value, bytes):
            try:
                texts[i] = value.decode()
            except UnicodeDecodeError:
                raise InvalidArgument.at(f"{path} element {i}", "is not UTF-8") from None
    return np.array(texts, object).reshape(array.shape)


@dataclass(slots=True)
class TensorJob:
    """One call's tensors. `done` gets the model's outputs by name."""

    call: Call
    model: ServedModel
    tensors: Mapping[str, NDArray[Any]]
    path: Callable[[str], str]
    done: Callable[[Mapping[str, NDArray[Any]]], None]


class TensorPipeline:
    """Check, submit, answer. One per server."""

    def __init__(self, access: ModelAccess) -> None:
        self._access = access

    def run(self, jobs: Sequence[TensorJob]) -> None:
        """Start jobs whose models are there. Those that fit together go as one."""
        groups: dict[tuple[int, str], list[tuple[TensorJob, int]]] = {}
        for job in jobs:
            spec = job.model.client.spec
            try:
                check_against(spec.inputs, job.tensors, job.path)
                job.tensors = decoded(job.tensors, job.path)
                rows = _rows(job.tensors) if spec.batches else None
            except ForebayError as e:
                job.call.fail(e)
                continue
            if rows is None:
                self._whole(job)
            else:
                shapes = shapes_of(job.tensors)
                groups.setdefault((id(job.model), shapes), []).append((job, rows))
        for (_, shapes), group in groups.items():
            first = group[0][0]
            tensors = first.tensors
            if len(group) > 1:
                tensors = {k: np.concatenate([job.tensors[k] for job, _ in group]) for k in tensors}
            done = {id(job.call): job.done for job, _ in group}
            blocks = Blocks(
                self._access,
                first.model,
                "inputs",
                answer_each(lambda c, n, o, d=done: d[id(c)](o)),
                shapes,
            )
            blocks.submit(tensors, [job.call for job, _ in group], [n for _, n in group])

    def _whole(self, job: TensorJob) -> None:
        """A model that does not batch, or takes scalars: the call is one item."""
        done = answer_each(lambda c, n, o: job.done(o))
        Blocks(self._access, job.model, "inputs", done).submit_whole(job.tensors, job.call)


def shapes_of(tensors: Mapping[str, NDArray[Any]]) -> str:
    """A name for what tensors must share to be batched: their shapes but for the rows."""
    return ";".join(f"{k}:{a.shape[1:]}" for k, a in sorted(tensors.items()))


def _rows(tensors: Mapping[str, NDArray[Any]]) -> int | None:
    """Rows of a batching model's tensors; None where one has no first dimension."""
    firsts = {a.shape[0] if a.ndim else -1 for a in tensors.values()}
    if -1 in firsts and len(firsts) == 1:
        return None
    if len(firsts) != 1:
        raise InvalidArgument.at("inputs", f"differ in their first dimension: {sorted(firsts)}")
    rows = firsts.pop()
    if rows == 0:
        raise InvalidArgument.at("inputs", "have no rows")
    return rows
