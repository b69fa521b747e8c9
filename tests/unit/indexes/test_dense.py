"""Scores of single vectors."""

from __future__ import annotations

import numpy as np
import pytest
from forebay_server.indexes.dense import DenseConfig, DenseIndex, DenseQuery


@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e-17, 1.0, 1e17, 1e30])
def test_cosine_is_of_the_direction_whatever_the_length(size: float) -> None:
    index = DenseIndex(DenseConfig(2))
    index.append(np.array([[3 * size, 4 * size], [1, 0], [-1, 0]], np.float32))
    for query in ([size, 0], [1, 0]):
        prepared = index.prepared(np.array([query], np.float32))
        scores, slots = index.search(index.view(), prepared, np.ones(3, bool), True, DenseQuery(3))
        assert slots[0].tolist() == [1, 0, 2]
        assert scores[0] == pytest.approx([1, 0.6, -1], abs=1e-3)


def test_a_query_of_zeros_has_no_direction() -> None:
    index = DenseIndex(DenseConfig(2))
    assert index.prepared(np.zeros((1, 2), np.float32)).tolist() == [[0, 0]]
