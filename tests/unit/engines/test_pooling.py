"""Pooling against its definition, token by token."""

from __future__ import annotations

import numpy as np
import pytest
from forebay_server.core.interfaces import Batch, EngineSpec, Item, TokenInput
from forebay_server.engines import arrays
from forebay_server.engines.arrays import Executed
from forebay_server.engines.pooling import pool


@pytest.mark.parametrize("pad_left", [False, True])
@pytest.mark.parametrize("lengths", [[7], [5], [1], [7, 3, 5]])
def test_each_pooling_is_its_definition(lengths: list[int], pad_left: bool) -> None:
    rng = np.random.default_rng(len(lengths))
    hidden = rng.normal(size=(len(lengths), 7, 16)).astype(np.float32)
    mask = np.zeros((len(lengths), 7), np.int64)
    for row, n in zip(mask, lengths, strict=True):
        row[7 - n if pad_left else 0 : None if pad_left else n] = 1
    real = [h[m == 1] for h, m in zip(hidden, mask, strict=True)]
    wanted = {
        "mean": [h.mean(axis=0) for h in real],
        "cls": [h[0] for h in real],
        "last_token": [h[-1] for h in real],
    }
    for how, rows in wanted.items():
        found = pool(hidden, mask, how, pad_left)  # type: ignore[arg-type]
        np.testing.assert_allclose(found, np.stack(rows), atol=1e-6, err_msg=how)


@pytest.mark.parametrize("rows", [1, 3])
def test_normalised_vectors_have_length_one(rows: int) -> None:
    spec = EngineSpec("m", 1, "", "", "tokens", output="o", pooling="mean", normalize=True)
    hidden = np.random.default_rng(0).normal(size=(rows, 4, 16)).astype(np.float32)
    hidden[0] = 0
    item = Item(TokenInput(np.arange(4)), 4)
    made = Executed({"o": hidden}, np.ones((rows, 4), np.int64))
    found = arrays.finish(spec, made, Batch([item] * rows, 4, rows))
    assert not np.any(found[0]), "nothing is divided by zero"
    for vector, h in list(zip(found, hidden, strict=True))[1:]:
        mean = h.mean(axis=0)
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=1e-6)
