"""An engine without a model: results are a pure function of the inputs, time is a cost model.

For integration tests of clients without any model, and for simulation. Options (EngineSpec.options):

    base_s, per_token_s, per_row_s   cost of a batch in seconds: base + padded tokens + rows
    answer                           `vector` (default) or `echo`: what `tokens` models give
    dimensions                       length of the vectors, default 8
    fail_on                          a token id (or tensor value) that makes the batch raise
    fail_in                          the stage that it fails in: prepare, execute (default), finish
    reject_on                        a value that the batch is refused for, as InvalidArgument
    die_on                           a value that kills the engine (Unavailable, ENGINE_DIED)
    hang_on                          a value that blocks the run until `close`
    load_failures                    loads after the first that fail, before one succeeds again
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from forebay.errors import InvalidArgument, Unavailable

from forebay_server.core.interfaces import Batch, EngineSpec, Result, TensorInput, TokenInput

_TRIGGERS = ("fail_on", "reject_on", "die_on", "hang_on")


@dataclass(slots=True)
class _Prepared:
    batch: Batch
    cost_s: float
    load: int


class DeterministicEngine:
    """See the module. `sleep` is injected, so that simulations own the time."""

    def __init__(self, spec: EngineSpec, sleep: Callable[[float], None] = time.sleep) -> None:
        self.spec = spec
        self._sleep = sleep
        self._alive = False
        self._options = dict(spec.options)
        self._has_triggers = any(t in self._options for t in _TRIGGERS)
        self._fail_in = str(self._options.get("fail_in", "execute"))
        self._failures_left = int(self._options.get("load_failures", 0))
        self._loads = 0
        self._closed = threading.Event()

    def load(self) -> None:
        """Ready at once. Raises Unavailable for `load_failures` reloads."""
        if self._loads and self._failures_left > 0:
            self._failures_left -= 1
            raise Unavailable("the engine does not come back yet", reason="ENGINE_DIED")
        self._loads += 1
        self._alive = True
        self._closed.clear()

    def warmup(self, shapes: Sequence[tuple[int, int]]) -> None:
        """Nothing to warm."""

    def prepare(self, batch: Batch) -> _Prepared:
        """The batch with its cost."""
        self._fail("prepare", batch)
        o = self._options
        cost = o.get("base_s", 0.0) + o.get("per_token_s", 0.0) * batch.length * batch.rows
        return _Prepared(batch, cost + o.get("per_row_s", 0.0) * batch.rows, self._loads)

    def execute(self, inputs: _Prepared) -> list[Result]:
        """Sleep the cost away, and answer."""
        if not self._alive:
            raise _dead("the engine is dead")
        if inputs.load != self._loads:
            raise RuntimeError("these inputs belong to an engine that died")
        if inputs.cost_s > 0:
            self._sleep(inputs.cost_s)
        self._misbehave(inputs.batch)
        self._fail("execute", inputs.batch)
        return [self._answer(item.inputs) for item in inputs.batch.items]

    def finish(self, outputs: list[Result], batch: Batch) -> Sequence[Result]:
        """As executed."""
        self._fail("finish", batch)
        return outputs

    def check_health(self) -> None:
        """Raise Unavailable when dead."""
        if not self._alive:
            raise _dead("the engine is dead")

    def close(self) -> None:
        """Dead from now on; ends a run that hangs."""
        self._alive = False
        self._closed.set()

    def info(self) -> Mapping[str, Any]:
        """Facts in force."""
        return {"providers": ["deterministic"], "memory_bytes": 0}

    def _misbehave(self, batch: Batch) -> None:
        if not self._has_triggers:
            return
        o = self._options
        for item in batch.items:
            values = _values(item.inputs)
            if o.get("hang_on") in values:
                self._closed.wait()
                raise _dead("the engine was closed")
            if o.get("die_on") in values:
                self._alive = False
                raise _dead("the engine died")
            if o.get("reject_on") in values:
                raise InvalidArgument.at("items", f"must not hold {o['reject_on']}")

    def _fail(self, stage: str, batch: Batch) -> None:
        if self._has_triggers and stage == self._fail_in and "fail_on" in self._options:
            for item in batch.items:
                if self._options["fail_on"] in _values(item.inputs):
                    raise RuntimeError("the model cannot take this input")

    def _answer(self, inputs: TokenInput | TensorInput) -> Result:
        if not isinstance(inputs, TokenInput):
            return dict(inputs)
        if self._options.get("answer") == "echo":
            return inputs.ids
        return vector(inputs.ids, int(self._options.get("dimensions", 8)))


def _dead(message: str) -> Unavailable:
    return Unavailable(message, reason="ENGINE_DIED", retry_after_s=0.1)


def vector(ids: np.ndarray[Any, np.dtype[np.int64]], dimensions: int) -> np.ndarray[Any, Any]:
    """The unit vector that stands for these ids."""
    seed = hashlib.blake2b(ids.tobytes(), digest_size=8).digest()
    values = np.random.default_rng(int.from_bytes(seed, "little")).standard_normal(dimensions)
    return (values / np.linalg.norm(values)).astype(np.float32)


def _values(inputs: TokenInput | TensorInput) -> set[Any]:
    if isinstance(inputs, TokenInput):
        return set(inputs.ids.tolist())
    return {v for a in cast(Mapping[str, Any], inputs).values() for v in a.reshape(-1).tolist()}
