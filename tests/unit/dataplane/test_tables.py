"""Columns of numbers are read together: with what is odd about them, as if read one by one."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from forebay.errors import ForebayError, InvalidArgument
from forebay.v1 import tabular_pb2
from forebay_server.dataplane.tabular import Table, to_tensors
from forebay_server.repository.manifest import TabularHead
from forebay_server.services.tabular import _from_columns
from hypothesis import given, settings
from hypothesis import strategies as st

FEATURES = [
    {"name": "age", "type": "number", "min": 0, "max": 120, "nullable": True},
    {"name": "pay", "type": "number", "min": -5, "nullable": False},
    {"name": "new", "type": "boolean", "nullable": True},
    {"name": "sea", "type": "string", "categories": ["NEAR", "FAR"], "nullable": False},
]
NUMBERS = ("age", "pay", "new")
VALUES = st.one_of(
    st.floats(-10, 130),
    st.sampled_from([0.0, 1.0, 120.0, 121.0, -6.0, 1e300, math.inf, -math.inf, math.nan]),
)


def head(layout: str) -> TabularHead:
    numbers = [f for f in FEATURES if f["type"] != "string"]
    return TabularHead.model_validate(
        {
            "features": numbers if layout == "matrix" else FEATURES,
            "target": {"name": "y"},
            "output": "variable",
            "input": "X" if layout == "matrix" else "",
            "layout": layout,
        }
    )


def message(columns: dict[str, list[float]], texts: list[str] | None) -> Table:
    request = tabular_pb2.PredictRequest(model="m")
    for name, values in columns.items():
        request.columns.add(name=name, numbers=values)
    if texts is not None:
        request.columns.add(name="sea", strings=texts)
    return _from_columns(request.columns)


def said(head: TabularHead, table: Table) -> tuple[dict[str, Any], Any] | list[tuple[str, str]]:
    try:
        return to_tensors(head, table)
    except InvalidArgument as e:
        return [(v.field, v.description) for v in e.violations]


@settings(max_examples=300, deadline=None)
@given(st.data(), st.integers(1, 6), st.sampled_from(["matrix", "columns"]))
def test_read_together_as_one_by_one(data: st.DataObject, rows: int, layout: str) -> None:
    names = data.draw(st.lists(st.sampled_from(NUMBERS), unique=True, min_size=1))
    columns = {n: data.draw(st.lists(VALUES, min_size=rows, max_size=rows), label=n) for n in names}
    choices = st.sampled_from(["NEAR", "FAR", "", "ELSEWHERE"])
    texts = (
        None if layout == "matrix" else data.draw(st.lists(choices, min_size=rows, max_size=rows))
    )
    together = message(columns, texts)
    # Lists are read value by value; NaN is missing there too.
    plain = {n: v.tolist() if isinstance(v, np.ndarray) else v for n, v in together.columns.items()}
    alone = Table(plain, rows, together.path)
    got, expected = said(head(layout), together), said(head(layout), alone)
    if isinstance(expected, list):
        assert got == expected
        return
    assert not isinstance(got, list)
    assert got[1] == expected[1]
    assert list(got[0]) == list(expected[0])
    for name, tensor in expected[0].items():
        assert got[0][name].dtype == tensor.dtype
        np.testing.assert_array_equal(got[0][name], tensor)


def test_each_odd_row_has_its_own_words() -> None:
    columns = {"age": [1.0, 121.0, 3.0], "pay": [0.0, 0.0, -6.0], "new": [0.0, 1.0, 0.0]}
    _, warnings = to_tensors(head("matrix"), message(columns, None))
    assert sorted(warnings) == [1, 2]
    assert warnings[1] == ["age is 121, outside the range seen in training, 0 to 120"]
    assert warnings[2] == ["pay is -6, outside the range seen in training, -5 and more"]


def test_a_short_column_is_named() -> None:
    with pytest.raises(ForebayError, match="another column has 2"):
        message({"age": [1.0, 2.0], "pay": [1.0]}, None)


def test_a_string_for_a_number_is_not_said_to_be_missing_too() -> None:
    one = Table({"age": ["44"], "pay": ["880"], "sea": ["FAR"]}, 1, lambda name, i: name)
    with pytest.raises(InvalidArgument) as refused:
        to_tensors(head("columns"), one)
    assert [(v.field, v.description) for v in refused.value.violations] == [
        ("age", "is the string '44'; a number is needed"),
        ("pay", "is the string '880'; a number is needed"),
    ]
