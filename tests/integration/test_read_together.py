"""Calls that are read together are answered as each would be alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
from forebay.oip import open_inference_pb2 as oip
from forebay.oip import open_inference_pb2_grpc as oip_grpc
from forebay.v1 import tabular_pb2, tabular_pb2_grpc

from tests.conftest import Live
from tests.integration.test_inference import ROW, predict_request

MANY = 200
INCOMES = np.random.default_rng(0).uniform(1, 12, MANY).round(4).tolist()


def by_columns(row: dict[str, Any]) -> tabular_pb2.PredictRequest:
    request = tabular_pb2.PredictRequest()
    for name, value in row.items():
        if isinstance(value, str):
            request.columns.add(name=name, strings=[value])
        else:
            request.columns.add(name=name, numbers=[value])
    return request


def test_each_of_many_callers_gets_the_answer_to_its_own_rows(live: Live) -> None:
    stub = tabular_pb2_grpc.TabularServiceStub(live.channel)
    rows = [ROW | {"median_income": income} for income in INCOMES]
    expected = [stub.Predict(by_columns(row)).predictions[0] for row in rows]
    # Calls of one, two and three rows, and with the rows of others around them.
    requests = [predict_request(*rows[i : i + 1 + i % 3]) for i in range(MANY)]
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda r: stub.Predict(r, timeout=30), requests))
    for i, answer in enumerate(answers):
        wanted = expected[i : i + 1 + i % 3]
        assert [p.value for p in answer.predictions] == [p.value for p in wanted]
        assert answer.usage.items == len(wanted)
        assert (answer.served_by.model, answer.served_by.version) == ("housing", 1)
        assert answer.timing.batch_rows >= len(wanted)


def test_a_bad_row_among_many_ends_its_own_call_alone(live: Live) -> None:
    stub = tabular_pb2_grpc.TabularServiceStub(live.channel)
    good, bad, odd = ROW, ROW | {"population": "many"}, ROW | {"median_income": 1e6}
    kinds = [(good, bad, odd)[i % 3] for i in range(60)]

    def call(row: dict[str, Any]) -> Any:
        try:
            return stub.Predict(predict_request(row), timeout=30)
        except grpc.RpcError as e:
            return e.code()

    with ThreadPoolExecutor(30) as pool:
        answers = list(pool.map(call, kinds))
    price = stub.Predict(by_columns(good)).predictions[0].value
    for row, answer in zip(kinds, answers, strict=True):
        if row is bad:
            assert answer == grpc.StatusCode.INVALID_ARGUMENT
        elif row is odd:
            assert "outside the range" in answer.predictions[0].warnings[0]
        else:
            assert answer.predictions[0].value == price


def test_tables_by_column_are_answered_as_their_rows_would_be(live: Live) -> None:
    stub = tabular_pb2_grpc.TabularServiceStub(live.channel)
    rows = [ROW | {"median_income": income} for income in INCOMES]
    prices = [p.value for p in stub.Predict(predict_request(*rows)).predictions]

    def table(first: int, n: int, *, odd: str = "") -> tabular_pb2.PredictRequest:
        request = tabular_pb2.PredictRequest()
        for name, value in ROW.items():
            column = [row[name] for row in rows[first : first + n]]
            if name == odd:
                column[-1] = -1e9
            kind = "strings" if isinstance(value, str) else "numbers"
            request.columns.add(name=name, **{kind: column})
        return request

    # Of several sizes, so that some share a batch and some take several; one of seven has a number that
    # training never saw, one of seven a column that is too short.
    parts = [(i, 1 + i % 90) for i in range(110)]

    def call(i: int, n: int) -> tabular_pb2.PredictResponse | grpc.StatusCode:
        request = table(i, n, odd="population" if i % 7 == 1 else "")
        if i % 7 == 2:
            request.columns[0].numbers.append(1.0)
        try:
            return stub.Predict(request, timeout=30)
        except grpc.RpcError as e:
            assert "values; another column has" in str(e.details())  # type: ignore[attr-defined]
            return e.code()  # type: ignore[attr-defined]

    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda p: call(*p), parts))
    for (i, n), answer in zip(parts, answers, strict=True):
        if i % 7 == 2:
            assert answer == grpc.StatusCode.INVALID_ARGUMENT
            continue
        assert isinstance(answer, tabular_pb2.PredictResponse)
        got, wanted = [p.value for p in answer.predictions], prices[i : i + n]
        if i % 7 == 1:
            assert "outside the range" in answer.predictions[-1].warnings[0]
            got, wanted = got[:-1], wanted[:-1]
        assert got == wanted
        assert answer.usage.items == n


@pytest.mark.parametrize("model", ["iris", "digits"])
def test_raw_tensors_are_answered_as_typed_ones(live: Live, model: str) -> None:
    stub = oip_grpc.GRPCInferenceServiceStub(live.channel)
    specs = stub.ModelMetadata(oip.ModelMetadataRequest(name=model)).inputs
    rng = np.random.default_rng(1)

    def request(values: list[np.ndarray], raw: bool, **fields: Any) -> oip.ModelInferRequest:
        made = oip.ModelInferRequest(model_name=model, **fields)
        for spec, array in zip(specs, values, strict=True):
            tensor = made.inputs.add(name=spec.name, datatype="FP32", shape=array.shape)
            if raw:
                made.raw_input_contents.append(array.tobytes())
            else:
                tensor.contents.fp32_contents.extend(array.reshape(-1).tolist())
        return made

    inputs = [
        [rng.uniform(0, 8, (1 + i % 3, spec.shape[1])).astype(np.float32) for spec in specs]
        for i in range(90)
    ]
    with ThreadPoolExecutor(30) as pool:
        raw = list(pool.map(lambda v: stub.ModelInfer(request(v, True, id="a")), inputs))
    for values, answer in zip(inputs, raw, strict=True):
        typed = stub.ModelInfer(request(values, False, id="a"))
        assert answer.outputs == typed.outputs
        assert answer.id == typed.id == "a"
        assert answer.raw_output_contents[0] == typed.raw_output_contents[0]  # labels
        for mine, other in zip(answer.raw_output_contents, typed.raw_output_contents, strict=True):
            assert len(mine) == len(other)
        if len(answer.outputs) > 1:
            scores = [np.frombuffer(a.raw_output_contents[1], "<f4") for a in (answer, typed)]
            np.testing.assert_allclose(*scores, rtol=1e-4, atol=1e-6)
    short = request(inputs[0], True)
    short.raw_input_contents[0] = short.raw_input_contents[0][:-1]
    with pytest.raises(grpc.RpcError) as e:
        stub.ModelInfer(short)
    assert "are needed for FP32" in e.value.details()  # type: ignore[attr-defined]
