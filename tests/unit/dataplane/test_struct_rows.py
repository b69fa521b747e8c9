"""The extension's reader of rows agrees with the plain way on every row that it takes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from forebay.errors import InvalidArgument
from forebay.v1 import tabular_pb2
from forebay_server.dataplane.records import Records
from forebay_server.dataplane.struct_rows import RowReader
from forebay_server.dataplane.tabular import to_tensors
from forebay_server.repository.manifest import TabularHead
from forebay_server.services.tabular import _from_rows
from google.protobuf.struct_pb2 import Struct
from hypothesis import given, settings
from hypothesis import strategies as st

forebay_native = pytest.importorskip(
    "forebay_native", reason="the extension forebay_native is not built (cargo is needed)"
)

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
    return None if warnings else tensors


def records(messages: list[bytes]) -> Records:
    split, _, _ = forebay_native.split(messages, 2)
    return Records(split, list(range(len(messages))))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(ROWS, min_size=1, max_size=3), min_size=1, max_size=5))
def test_agrees_with_the_plain_way(requests: list[list[dict[str, Any]]]) -> None:
    head = TabularHead.model_validate(HEAD)
    messages = []
    for rows in requests:
        message = tabular_pb2.PredictRequest(model="m")
        for row in rows:
            message.rows.add().update(row)
        messages.append(message)
    rows = records([m.SerializeToString() for m in messages])
    tensors, good, odd = RowReader(head).read(rows)
    expected = [[plain(head, row) for row in m.rows] for m in messages]
    whole = [i for i, rows in enumerate(expected) if None not in rows]
    assert good == [(i, len(expected[i])) for i in whole]
    assert sorted([*whole, *odd]) == list(range(len(messages)))
    wanted = [row for i in whole for row in expected[i] if row is not None]
    for name, column in tensors.items():
        assert len(column) == len(wanted)
        for i, row in enumerate(wanted):
            np.testing.assert_array_equal(column[i : i + 1], row[name])


def test_bytes_that_are_no_row_are_odd() -> None:
    reader = RowReader(TabularHead.model_validate(HEAD))
    # the empty row lacks what is needed
    messages = [b"\x12\x09" + b"\xff" * 9, b"\x12\x02\x0a\x7f", b"\x12\x00"]
    _, good, odd = reader.read(records(messages))
    assert not good
    assert odd == [0, 1, 2]


def test_requests_are_grouped_by_what_they_share() -> None:
    def request(model: str, rows: int, sticky: str = "") -> bytes:
        message = tabular_pb2.PredictRequest(model=model, sticky_key=sticky)
        for i in range(rows):
            message.rows.add().update({"a": float(i)})
        return message.SerializeToString()

    messages = [request("m", 1), request("n", 2), request("m", 3), request("m", 1, "s")]
    messages += [request("m", 0), b"\xff"]
    _, groups, odd = forebay_native.split(messages, 2)
    heads = [tabular_pb2.PredictRequest.FromString(head) for head, _ in groups]
    assert [(h.model, h.sticky_key, len(h.rows)) for h in heads] == [
        ("m", "", 0),
        ("n", "", 0),
        ("m", "s", 0),
    ]
    assert [members for _, members in groups] == [[0, 2], [1], [3]]
    assert odd == [4, 5]
