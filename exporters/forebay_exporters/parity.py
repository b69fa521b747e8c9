"""Is the artefact the model? Numbers of both, compared, with bounds that fail the export."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forebay_exporters.artefact import ExportError


@dataclass(frozen=True, slots=True)
class Bounds:
    """What is still the same model. None = not asked for.

    Attributes:
        max_abs_diff: largest difference of any number.
        mean_abs_diff: mean difference; for tree ensembles, where a float32 threshold may send a
            rare row to the next leaf.
        min_cosine: least cosine of any row with the original's.
        max_metric_loss: how much worse the task metric may be.
    """

    max_abs_diff: float | None = None
    mean_abs_diff: float | None = None
    min_cosine: float | None = None
    max_metric_loss: float | None = None


def report(
    original: NDArray[Any],
    exported: NDArray[Any],
    bounds: Bounds,
    metric: tuple[str, float, float] | None = None,
) -> dict[str, Any]:
    """The parity block of a manifest.

    Args:
        original, exported: [samples] or [samples, n], in the same order.
        metric: name, the original's value, the artefact's; higher is better.

    Raises:
        ExportError: out of bounds, or shapes that differ.
    """
    a, b = np.asarray(original, np.float64), np.asarray(exported, np.float64)
    if a.shape != b.shape:
        raise ExportError(f"the artefact gives shape {b.shape}, the original {a.shape}")
    difference = np.abs(a - b)
    out: dict[str, Any] = {
        "samples": len(a),
        "max_abs_diff": float(difference.max(initial=0.0)),
        "mean_abs_diff": float(difference.mean()) if a.size else 0.0,
        "bounds": {k: v for k, v in asdict(bounds).items() if v is not None},
    }
    if a.ndim == 2 and a.shape[1] > 1:
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        out["min_cosine"] = float(((a * b).sum(1) / np.maximum(norms, 1e-12)).min())
    if metric is not None:
        out["task_metric"] = {"name": metric[0], "original": metric[1], "exported": metric[2]}
    faults = []
    for name in ("max_abs_diff", "mean_abs_diff"):
        bound = getattr(bounds, name)
        if bound is not None and not out[name] <= bound:
            faults.append(f"{name} is {out[name]:.3g}, allowed is {bound:g}")
    if bounds.min_cosine is not None and not out.get("min_cosine", 1.0) >= bounds.min_cosine:
        faults.append(f"min_cosine is {out['min_cosine']:.5f}, allowed is {bounds.min_cosine:g}")
    if metric is not None and bounds.max_metric_loss is not None:
        loss = metric[1] - metric[2]
        if not loss <= bounds.max_metric_loss:
            faults.append(f"{metric[0]} falls by {loss:.4f}, allowed is {bounds.max_metric_loss:g}")
    if faults:
        error = ExportError("the artefact is not the model: " + "; ".join(faults))
        error.report = out | {"faults": faults}
        raise error
    return out
