"""What a batch costs: a model fitted from batches that ran.

seconds = base + per_row x rows + per_token x padded tokens + per_pair x rows x length squared

None of the terms is negative: a model that gives time back for larger batches would plan nonsense.
What is left between the model and the measurement is kept as ratios, and simulations draw from them:
the tail of latencies comes from there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

#: Quantiles of the ratios that are kept.
RATIOS = 101
#: Interpreter time of a call with little in it, among many.
CALL_S = 45e-6
#: Scale of rows x length squared, so that all terms have sizes alike.
_PAIRS = 1e-3


@dataclass(frozen=True, slots=True)
class Sample:
    """A batch that ran: rows, padded length (1 for tensors), seconds."""

    rows: int
    length: int
    seconds: float


@dataclass(frozen=True, slots=True)
class CostModel:
    """See the module.

    Attributes:
        ratios: measured / modelled, as quantiles from 0 to 1.
        overhead_s: what a call takes beside queue and engine, as quantiles from 0 to 1: transport,
            tokenizer, answer, as seen by a client on the same machine.
        call_s: interpreter time of a call at its replica beside queue and engine: one call's after the
            other's. A table's rows are read there.
        contention: how much longer a batch takes for each other that runs beside it at its replica, as a
            share. 0 where engines have cores of their own.
        between_s: from the end of a batch to the engine's next one while calls wait: its thread answers,
            and waits for the interpreter. The overhead of the batch's calls has it already.
        error: median of |measured / modelled - 1|.
    """

    base_s: float
    per_row_s: float
    per_token_s: float = 0.0
    per_pair_s: float = 0.0
    ratios: tuple[float, ...] = (1.0,)
    overhead_s: tuple[float, ...] = (0.0,)
    call_s: float = CALL_S
    contention: float = 0.0
    between_s: float = 0.0
    error: float = 0.0
    source: dict[str, object] = field(default_factory=dict)

    def seconds(self, rows: int, length: int) -> float:
        """What a batch of `rows` padded to `length` costs, in the middle."""
        tokens = rows * length
        return (
            self.base_s
            + self.per_row_s * rows
            + self.per_token_s * tokens
            + self.per_pair_s * tokens * length * _PAIRS
        )

    def to_json(self) -> str:
        """For a file; `read` is its inverse."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def read(cls, path: Path) -> CostModel:
        """From a file. Raises OSError, ValueError or TypeError."""
        data = json.loads(path.read_text())
        for key in ("ratios", "overhead_s"):
            data[key] = tuple(float(v) for v in data.get(key, ()))
        return cls(**data)


def fit(
    samples: Sequence[Sample],
    overhead_s: Sequence[float] = (),
    source: dict[str, object] | None = None,
) -> CostModel:
    """The model of these batches. Relative errors count, so small batches weigh as much as large.

    Raises:
        ValueError: fewer than two batches.
    """
    if len(samples) < 2:
        raise ValueError(f"{len(samples)} batches are too few to fit a cost model")
    rows = np.array([s.rows for s in samples], float)
    length = np.array([s.length for s in samples], float)
    seconds = np.array([s.seconds for s in samples], float)
    columns = [np.ones_like(rows), rows]
    if len(set(length)) > 1:  # with one length, tokens say the same as rows
        columns += [rows * length, rows * length**2 * _PAIRS]
    terms = np.stack(columns, axis=1) / seconds[:, None]
    # Three rounds of reweighting: a batch that the system held up must not bend the model.
    weights = np.ones_like(seconds)
    found = np.zeros(terms.shape[1])
    for _ in range(4):
        found = _nonnegative(terms * weights[:, None], weights)
        off = np.abs(terms @ found - 1.0)
        weights = 1.0 / np.sqrt(np.maximum(off, 0.02))
    modelled = (terms @ found) * seconds
    ratios = seconds / np.maximum(modelled, 1e-9)
    base, per_row, per_token, per_pair = (*found, 0.0, 0.0)[:4]
    return CostModel(
        float(base),
        float(per_row),
        float(per_token),
        float(per_pair),
        quantiles(ratios),
        quantiles(overhead_s) if len(overhead_s) else (0.0,),
        error=float(np.median(np.abs(ratios - 1.0))),
        source=source or {},
    )


def quantiles(values: Sequence[float] | NDArray[np.float64]) -> tuple[float, ...]:
    """RATIOS quantiles from 0 to 1; the last ones are the tail's own means, not one extreme."""
    ordered = np.sort(np.asarray(values, float))
    points = (np.arange(RATIOS) + 0.5) / RATIOS
    return tuple(float(v) for v in np.quantile(ordered, points, method="hazen"))


def _nonnegative(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Least squares without negative coefficients, by coordinate descent."""
    scale = np.maximum(np.linalg.norm(a, axis=0), 1e-12)
    a = a / scale
    gram, right = a.T @ a, a.T @ b
    x = np.zeros(a.shape[1])
    for _ in range(20_000):
        before = x.copy()
        for i in range(len(x)):
            x[i] = max(0.0, x[i] + (right[i] - gram[i] @ x) / gram[i, i])
        if np.abs(x - before).max() <= 1e-10 * max(1.0, np.abs(x).max()):
            break
    return x / scale
