"""The extension's reader of tables agrees with the plain way on every table that it takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from forebay.errors import InvalidArgument
from forebay.v1 import tabular_pb2
from forebay_server.dataplane.feature_reader import FeatureReader
from forebay_server.dataplane.records import Records
from forebay_server.dataplane.tabular import Table, to_tensors
from forebay_server.repository.manifest import TabularHead
from forebay_server.services.tabular import _COLUMN, _from_columns, _from_rows
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


def plain(head: TabularHead, make: Callable[[], Table]) -> dict[str, Any] | None:
    """The plain way's tensors; None where it refuses the table or has something to say."""
    try:
        tensors, warnings = to_tensors(head, make())
    except InvalidArgument:
        return None
    return None if warnings else tensors


def records(messages: list[bytes], field: int = 2) -> Records:
    split, _, _ = forebay_native.split(messages, field)
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
    tensors, good, odd = FeatureReader(head).rows(rows)
    expected = [[plain(head, partial(_from_rows, [row])) for row in m.rows] for m in messages]
    whole = [i for i, rows in enumerate(expected) if None not in rows]
    assert good == [(i, len(expected[i])) for i in whole]
    assert sorted([*whole, *odd]) == list(range(len(messages)))
    wanted = [row for i in whole for row in expected[i] if row is not None]
    for name, column in tensors.items():
        assert len(column) == len(wanted)
        for i, row in enumerate(wanted):
            np.testing.assert_array_equal(column[i : i + 1], row[name])


ODD_NUMBERS = [0.0, 121.0, 1e300, math.inf, -math.inf, math.nan]
ODD_TEXTS = ["", "ü", "x" * 200]


@st.composite
def tables(draw: st.DrawFn) -> tabular_pb2.PredictRequest:
    """Tables by column. Most are as they should be, so that some are taken."""
    rows = draw(st.integers(1, 4))
    message = tabular_pb2.PredictRequest(model="m")
    for feature in draw(st.permutations(HEAD["features"])):
        if draw(st.integers(0, 9)) == 0:
            continue
        name = draw(st.sampled_from([feature["name"]] * 29 + ["odd", "age"]))
        n = draw(st.sampled_from([rows] * 29 + [rows + 1, 0]))
        texts = (feature["type"] == "string") != (draw(st.integers(0, 29)) == 0)
        known = feature.get("categories") or ["a", ""]
        strings = draw(st.lists(st.sampled_from(known * 10 + ODD_TEXTS), min_size=n, max_size=n))
        plain = [float(i) for i in range(60)]
        numbers = draw(st.lists(st.sampled_from(plain + ODD_NUMBERS), min_size=n, max_size=n))
        if texts:
            message.columns.add(name=name, strings=strings)
        else:
            message.columns.add(name=name, numbers=numbers)
        if draw(st.integers(0, 49)) == 0:
            message.columns[-1].strings.append("x")
    return message


@settings(max_examples=400, deadline=None)
@given(st.lists(tables(), min_size=1, max_size=5), st.sampled_from(["columns", "matrix"]))
def test_columns_agree_with_the_plain_way(
    messages: list[tabular_pb2.PredictRequest], layout: str
) -> None:
    description = HEAD
    if layout == "matrix":
        numbers = [f for f in HEAD["features"] if f["type"] != "string"]
        description = HEAD | {"features": numbers, "layout": "matrix", "input": "X"}
        for message in messages:
            kept = [c for c in message.columns if c.name not in ("sea", "tag")]
            del message.columns[:]
            message.columns.extend(kept)
    head = TabularHead.model_validate(description)
    given_records = records([m.SerializeToString() for m in messages], 3)
    tensors, good, odd = FeatureReader(head).columns(given_records, _COLUMN)
    expected = [
        plain(head, partial(_from_columns, m.columns)) if m.columns else None for m in messages
    ]
    whole = [i for i, table in enumerate(expected) if table is not None]
    assert [i for i, _ in good] == whole
    assert sorted([*whole, *odd]) == list(range(len(messages)))
    sizes = given_records.column_sizes(_COLUMN)
    at = 0
    for i, rows in good:
        table = expected[i]
        assert table is not None and sizes[i] == rows
        for name, wanted in table.items():
            np.testing.assert_array_equal(tensors[name][at : at + rows], wanted)
        at += rows
    assert all(len(column) == at for column in tensors.values())


def test_columns_that_are_not_given_are_missing() -> None:
    head = TabularHead.model_validate(HEAD)
    message = tabular_pb2.PredictRequest(model="m")
    message.columns.add(name="age", numbers=[1, 2])
    message.columns.add(name="pay", numbers=[math.nan, 2])
    message.columns.add(name="sea", strings=["NEAR", "FAR"])
    tensors, good, odd = FeatureReader(head).columns(
        records([message.SerializeToString()], 3), _COLUMN
    )
    assert (good, odd) == ([(0, 2)], [])
    assert tensors["tag"].tolist() == [[""], [""]]
    assert np.isnan(tensors["new"]).all()


def test_bytes_that_are_no_row_are_odd() -> None:
    reader = FeatureReader(TabularHead.model_validate(HEAD))
    # the empty row lacks what is needed
    messages = [b"\x12\x09" + b"\xff" * 9, b"\x12\x02\x0a\x7f", b"\x12\x00"]
    _, good, odd = reader.rows(records(messages))
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
