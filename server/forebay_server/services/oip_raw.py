"""ModelInfer for calls that differ in their raw tensors alone: what they share is read once.

Only the plain way of open_inference.py knows how to say what is wrong with a request; whatever is not
certainly right is left to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
from forebay.constraints import Validator
from forebay.datatypes import DTYPES
from forebay.errors import ForebayError
from forebay.oip import open_inference_pb2 as pb
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from forebay_server.core.call import Call, reply_all
from forebay_server.core.interfaces import TensorSpec
from forebay_server.dataplane import tensors
from forebay_server.dataplane.blocks import Blocks, Tensors
from forebay_server.dataplane.models import ModelAccess, ServedModel
from forebay_server.dataplane.recipes import Recipe, most_rows, of_tensor
from forebay_server.dataplane.records import Records, take_apart

if TYPE_CHECKING:
    import forebay_native

_RAW = pb.ModelInferRequest.DESCRIPTOR.fields_by_name["raw_input_contents"].number
#: Heads that are remembered for a model; more are read again each time.
_HEADS = 256


@dataclass(slots=True)
class _Plan:
    """A request without its raw tensors, checked against its model.

    Attributes:
        inputs: name, dtype, shape and bytes of each raw tensor, in order.
        names: the outputs asked for.
        rows: the inputs' first dimension.
    """

    request: pb.ModelInferRequest
    inputs: list[tuple[str, np.dtype[Any], tuple[int, ...], int]]
    names: list[str]
    rows: int
    group: str
    heads: dict[tuple[Any, ...], bytes] = field(default_factory=dict)


class RawInfer:
    """See the module. One per server."""

    def __init__(
        self,
        access: ModelAccess,
        validator: Validator,
        tasks: Sequence[str],
        ref: Callable[[pb.ModelInferRequest], str],
        signature: Callable[[ServedModel], tuple[list[TensorSpec], list[TensorSpec]]],
    ) -> None:
        self._access = access
        self._validator = validator
        self._tasks = tasks
        self._ref = ref
        self._signature = signature
        self._plans: WeakKeyDictionary[ServedModel, dict[bytes, _Plan | None]] = WeakKeyDictionary()

    def start(self, calls: Sequence[Call]) -> list[Call]:
        """Start the calls that can be read together; gives those that are left."""
        taken, left = take_apart(calls, _RAW)
        for head, own, records in taken:
            if not self._start(head, own, records):
                left += own
        return left

    def _start(self, head: bytes, calls: Sequence[Call], records: Records) -> bool:
        try:
            request = _parsed(head)
            self._validator.check(request)
            model = self._access.common(calls, self._ref(request), self._tasks, "")
        except (DecodeError, ForebayError):
            return False
        if model is None or not request.model_name:
            return False
        if model.text_encoder is None and self._access.refused(model, self._ref(request), calls):
            return True
        plans = self._plans.setdefault(model, {})
        if head not in plans:
            if len(plans) >= _HEADS:
                plans.clear()
            plans[head] = self._plan(model, request)
        plan = plans[head]
        if plan is None:
            return False
        feeds: dict[str, NDArray[Any]] = {}
        for i, (name, dtype, shape, size) in enumerate(plan.inputs):
            data = records.concat(i, len(plan.inputs), size)
            if data is None:
                return False
            # Said in numbers: of tensors without elements, numpy cannot tell how many rows there are.
            feeds[name] = np.frombuffer(data, dtype).reshape(plan.rows * len(calls), *shape[1:])

        def done(calls: Sequence[Call], rows: Sequence[int], outputs: Tensors) -> None:
            if model.client.trees is not None:
                valid = partial(self._access.still, model, self._ref(request), self._tasks, "")
                calls[0].recipe = Recipe(head, model, lambda: _recipe(plan, model), valid)
            _answer(plan, model, calls, outputs)

        blocks = Blocks(self._access, model, "inputs", done, plan.group)
        blocks.submit(feeds, calls, [plan.rows] * len(calls))
        return True

    def _plan(self, model: ServedModel, request: pb.ModelInferRequest) -> _Plan | None:
        """None when the plain way is to look at such requests."""
        if model.text_encoder is not None or not model.client.spec.batches:
            return None
        inputs: list[tuple[str, np.dtype[Any], tuple[int, ...], int]] = []
        dummies: dict[str, NDArray[Any]] = {}
        for tensor in request.inputs:
            kind = DTYPES.get(tensor.datatype)
            shape = tuple(tensor.shape)
            if kind is None or not shape or tensor.HasField("contents") or tensor.name in dummies:
                return None
            dtype = np.dtype(kind)
            try:
                size = tensors.element_count(shape, "") * dtype.itemsize
            except ForebayError:
                return None
            inputs.append((tensor.name, dtype, shape, size))
            dummies[tensor.name] = np.broadcast_to(np.zeros((), dtype), shape)
        try:
            tensors.check_against(model.client.spec.inputs, dummies, str)
        except ForebayError:
            return None
        firsts = {shape[0] for _, _, shape, _ in inputs}
        known = [s.name for s in self._signature(model)[1]]
        wanted = [o.name for o in request.outputs]
        if len(firsts) != 1 or 0 in firsts or not set(wanted) <= set(known):
            return None
        group = tensors.shapes_of(dummies)
        return _Plan(request, inputs, wanted or known, firsts.pop(), group)


@lru_cache(_HEADS)
def _parsed(head: bytes) -> pb.ModelInferRequest:
    return pb.ModelInferRequest.FromString(head)


def _answer(plan: _Plan, model: ServedModel, calls: Sequence[Call], outputs: Tensors) -> None:
    """Answer calls of as many rows each: the same head, and each its own part of the raw tensors."""
    n = len(calls)
    given = [outputs[name] for name in plan.names]
    # A model need not answer row by row; then the call is alone.
    shapes = [a.shape if n == 1 else (plan.rows, *a.shape[1:]) for a in given]
    key = tuple((a.dtype, shape) for a, shape in zip(given, shapes, strict=True))
    head = plan.heads.get(key)
    if head is None:
        if len(plan.heads) >= _HEADS:
            plan.heads.clear()
        head = plan.heads[key] = _response_head(plan, model, given, shapes)
    pieces: list[list[bytes]] = []
    for array, shape in zip(given, shapes, strict=True):
        if array.dtype.kind in "OSU":
            own = [tensors.to_raw(part) for part in array.reshape(n, *shape)]
        else:
            raw = tensors.to_raw(array)
            size = len(raw) // n
            own = [raw[i * size : (i + 1) * size] for i in range(n)]
        pieces.append([_raw_prefix(len(data)) + data for data in own])
    reply_all(calls, [head + b"".join(parts) for parts in zip(*pieces, strict=True)])


def _recipe(plan: _Plan, model: ServedModel) -> forebay_native.Recipe | None:
    """The same answers, as the extension writes them."""
    if len(plan.inputs) != 1 or len(plan.names) != 1 or plan.rows > most_rows(model):
        return None
    ((_, dtype, shape, _),) = plan.inputs
    if dtype != np.float32 or len(shape) != 2:
        return None
    given = np.zeros((plan.rows, 1), np.float32)
    before = _response_head(plan, model, [given], [given.shape]) + _raw_prefix(given.nbytes)
    return of_tensor(model, _RAW, (plan.rows, shape[1]), before)


def _response_head(
    plan: _Plan,
    model: ServedModel,
    given: Sequence[NDArray[Any]],
    shapes: Sequence[tuple[int, ...]],
) -> bytes:
    response = pb.ModelInferResponse(
        model_name=model.name, model_version=str(model.version), id=plan.request.id
    )
    for name, array, shape in zip(plan.names, given, shapes, strict=True):
        response.outputs.add(name=name, datatype=tensors.datatype_of(array), shape=shape)
    return response.SerializeToString()


@lru_cache(256)
def _raw_prefix(size: int) -> bytes:
    """What stands before a raw tensor of so many bytes."""
    whole = pb.ModelInferResponse(raw_output_contents=[bytes(size)]).SerializeToString()
    return whole[: len(whole) - size]
