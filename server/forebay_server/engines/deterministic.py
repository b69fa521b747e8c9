"""An engine without a model: results are a pure function of the inputs, time is a cost model.

For integration tests of clients without any model, and for simulation. Options (EngineSpec.options):

    base_s, per_token_s, per_row_s   cost of a batch in seconds: base + tokens + rows
    dimensions                       length of the vectors of `tokens` models, default 8
    fail_on                          a token id (or tensor value) that makes the batch raise
    die_on                           a token id that kills the engine (Unavailable, ENGINE_DIED)
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from forebay.errors import Unavailable

from forebay_server.core.interfaces import Batch, EngineSpec, Result, TensorInput, TokenInput


@dataclass(slots=True)
class _Prepared:
    batch: Batch
    cost_s: float


class DeterministicEngine:
    """See the module. `sleep` is injected, so that simulations own the time."""

    def __init__(self, spec: EngineSpec, sleep: Callable[[float], None] = time.sleep) -> None:
        self.spec = spec
        self._sleep = sleep
        self._alive = False
        self._options = dict(spec.options)

    def load(self) -> None:
        """Ready at once."""
        self._alive = True

    def warmup(self, shapes: Sequence[tuple[int, int]]) -> None:
        """Nothing to warm."""

    def prepare(self, batch: Batch) -> _Prepared:
        """The batch with its cost."""
        o = self._options
        cost = o.get("base_s", 0.0) + o.get("per_token_s", 0.0) * batch.length * batch.rows
        return _Prepared(batch, cost + o.get("per_row_s", 0.0) * batch.rows)

    def execute(self, inputs: _Prepared) -> list[Result]:
        """Sleep the cost away, and answer."""
        if not self._alive:
            raise Unavailable("the engine is dead", reason="ENGINE_DIED", retry_after_s=0.1)
        if inputs.cost_s > 0:
            self._sleep(inputs.cost_s)
        for item in inputs.batch.items:
            values = _values(item.inputs)
            if self._options.get("die_on") in values:
                self._alive = False
                raise Unavailable("the engine died", reason="ENGINE_DIED", retry_after_s=0.1)
            if self._options.get("fail_on") in values:
                raise RuntimeError("the model cannot take this input")
        return [self._answer(item.inputs) for item in inputs.batch.items]

    def finish(self, outputs: list[Result], batch: Batch) -> Sequence[Result]:
        """As executed."""
        return outputs

    def check_health(self) -> None:
        """Raise Unavailable when dead."""
        if not self._alive:
            raise Unavailable("the engine is dead", reason="ENGINE_DIED")

    def close(self) -> None:
        """Dead from now on."""
        self._alive = False

    def info(self) -> Mapping[str, Any]:
        """Facts in force."""
        return {"providers": ["deterministic"], "memory_bytes": 0}

    def _answer(self, inputs: TokenInput | TensorInput) -> Result:
        if not isinstance(inputs, TokenInput):
            return dict(inputs)
        return vector(inputs.ids, int(self._options.get("dimensions", 8)))


def vector(ids: np.ndarray[Any, np.dtype[np.int64]], dimensions: int) -> np.ndarray[Any, Any]:
    """The unit vector that stands for these ids."""
    seed = hashlib.blake2b(ids.tobytes(), digest_size=8).digest()
    values = np.random.default_rng(int.from_bytes(seed, "little")).standard_normal(dimensions)
    return (values / np.linalg.norm(values)).astype(np.float32)


def _values(inputs: TokenInput | TensorInput) -> set[Any]:
    if isinstance(inputs, TokenInput):
        return set(inputs.ids.tolist())
    return {v for a in cast(Mapping[str, Any], inputs).values() for v in a.reshape(-1).tolist()}
