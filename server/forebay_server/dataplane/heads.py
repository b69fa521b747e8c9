"""Task heads: from a model's numbers to answers. Numpy alone, whole calls at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from forebay.errors import InvalidArgument
from numpy.typing import NDArray

Activation = Literal["softmax", "sigmoid", "none"]
Floats = NDArray[np.float32]


def softmax(logits: Floats) -> Floats:
    """Softmax over the last axis, safe for large logits."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def sigmoid(logits: Floats) -> Floats:
    """Logistic function, safe for large negative logits."""
    return (1.0 / (1.0 + np.exp(-np.clip(logits, -80, 80)))).astype(np.float32)


def activate(logits: Floats, activation: Activation) -> Floats:
    """Scores from logits."""
    if activation == "softmax":
        return softmax(logits)
    if activation == "sigmoid":
        return sigmoid(logits)
    return logits


def vectors(
    rows: Sequence[Floats],
    *,
    normalize: bool,
    normalized_by_model: bool,
    dimensions: int | None,
) -> Floats:
    """The embedding matrix [items, dimensions], float32 and contiguous.

    A vector that is cut to fewer dimensions (Matryoshka) is normalised anew where normalising is on.
    """
    # Most calls bring one text, and `stack` takes longer than all else here.
    matrix = (rows[0][None] if len(rows) == 1 else np.stack(rows)).astype("<f4", copy=False)
    cut = dimensions is not None and dimensions < matrix.shape[1]
    if cut:
        matrix = matrix[:, :dimensions]
    if normalize and (cut or not normalized_by_model):
        norms = np.linalg.norm(matrix, axis=1, keepdims=True)
        matrix = matrix / np.maximum(norms, np.float32(1e-12))
    return np.ascontiguousarray(matrix, dtype="<f4")


def check_dimensions(dimensions: int | None, own: int, matryoshka: Sequence[int]) -> None:
    """Raise InvalidArgument unless the model was made for vectors of that length."""
    if dimensions is None or dimensions == own or dimensions in matryoshka:
        return
    allowed = ", ".join(str(d) for d in sorted({own, *matryoshka}))
    raise InvalidArgument.at("dimensions", f"is {dimensions}; this model allows {allowed}")


def top_labels(
    scores: Floats, labels: Sequence[str], top_k: int | None, threshold: float | None
) -> list[tuple[str, float]]:
    """Labels with scores [labels], highest first; ties keep the model's order."""
    order: list[int] = np.argsort(-scores, kind="stable")[: top_k or len(labels)].tolist()
    return [
        (labels[i], float(scores[i])) for i in order if threshold is None or scores[i] >= threshold
    ]


def zero_shot_scores(
    logits: Floats, *, entailment: int, contradiction: int, multi_label: bool
) -> Floats:
    """Scores of the candidate labels of one text.

    Args:
        logits: [labels, classes] of an NLI model, one row per hypothesis.
        multi_label: each label against its own contradiction; else the labels compete.
    """
    if multi_label:
        return softmax(logits[:, [contradiction, entailment]])[:, 1]
    return softmax(logits[:, entailment])
