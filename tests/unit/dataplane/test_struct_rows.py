"""The extension's reader of rows agrees with the plain way on every row that it takes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from forebay.errors import InvalidArgument
from forebay_server.dataplane.struct_rows import AVAILABLE, RowReader
from forebay_server.dataplane.tabular import to_tensors
from forebay_server.repository.manifest import TabularHead
from forebay_server.services.tabular import _from_rows
from google.protobuf.struct_pb2 import Struct
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="the fast lane's extension is not built")

HEAD: dict[str, Any] = {
    "features": [
        {"name": "age", "type": "number", "min": 0, "max": 120},
        {"name": "pay", "type": "number", "nullable": True},
        {"name": "new", "type": "boolean", "nullable": True},
        {"name": "sea", "type": "string", "categories": ["NEAR", "FAR"]},
        {"name": "tag", "type": "string", "nullable": True},
    ],
    "layout": "columns",
    "output": "y",
    "target": {"name": "y"},
}
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.floats(width=64),
    st.sampled_from([0.0, 1.0, 33.5, 121.0, math.inf, -math.inf, math.nan]),
    st.sampled_from(["", "NEAR", "FAR", "ü", "x" * 200]),
    st.just([1.0]),
)
ROWS = st.dictionaries(
    st.sampled_from(["age", "pay", "new", "sea", "tag", "odd"]), VALUES, max_size=6
)


def plain(head: TabularHead, row: Struct) -> dict[str, Any] | None:
    """The plain way's tensors; None where it refuses the row or has something to say."""
    try:
        tensors, warnings = to_tensors(head, _from_rows([row]))
    except InvalidArgument:
        return None
    return tensors if not warnings[0] else None


@settings(max_examples=300, deadline=None)
@given(st.lists(ROWS, min_size=1, max_size=5))
def test_agrees_with_the_plain_way(rows: list[dict[str, Any]]) -> None:
    head = TabularHead.model_validate(HEAD)
    structs = []
    for row in rows:
        struct = Struct()
        struct.update(row)
        structs.append(struct)
    tensors, good = RowReader(head).read([s.SerializeToString() for s in structs])
    for i, struct in enumerate(structs):
        expected = plain(head, struct)
        assert good[i] == (expected is not None), rows[i]
        if expected is not None:
            for name, column in expected.items():
                np.testing.assert_array_equal(tensors[name][i : i + 1], column)


def test_bytes_that_are_no_row_are_odd() -> None:
    reader = RowReader(TabularHead.model_validate(HEAD))
    _, good = reader.read([b"\xff" * 9, b"\x0a\x7f", b""])
    assert not good.any()  # the empty row lacks what is needed
