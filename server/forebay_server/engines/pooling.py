"""From one vector per token to one per text. Numpy alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from forebay_server.core.interfaces import Pooling


def pool(
    hidden: NDArray[Any], mask: NDArray[Any], pooling: Pooling, pad_left: bool
) -> NDArray[np.float32]:
    """Pool [rows, length, dim] by the attention mask [rows, length] to [rows, dim].

    `mean` leaves padding out; `cls` is the first real token, `last_token` the last one.
    """
    values = hidden.astype(np.float32, copy=False)
    if pooling == "mean":
        if len(values) == 1 and mask.all():  # a lone call: half the time of what follows
            return np.add.reduce(values, axis=1) / np.float32(values.shape[1])
        weights = mask.astype(np.float32)
        weights /= np.maximum(weights.sum(axis=1, keepdims=True), 1.0)
        return np.matmul(weights[:, None, :], values)[:, 0]
    rows = np.arange(len(values))
    if pooling == "cls":
        return values[rows, mask.argmax(axis=1)] if pad_left else values[:, 0]
    if pooling == "last_token":
        last = mask.shape[1] - 1 - mask[:, ::-1].argmax(axis=1)
        return values[rows, last]
    raise ValueError("the model's output has one vector per token, but its head names no pooling")
