"""ModelInfer on models of bare tensors, of the sorts that people bring."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnx
import pytest
from forebay.oip import open_inference_pb2 as oip
from forebay.oip import open_inference_pb2_grpc as oip_grpc
from numpy.typing import NDArray
from onnx import TensorProto, helper

from tests.conftest import Live, Start
from tests.integration.test_inference import violations

Floats = NDArray[np.float32]


def write_model(
    root: Path,
    name: str,
    nodes: Sequence[Any],
    shape: Any,
    out: Any,
    kind: int = TensorProto.FLOAT,
) -> None:
    """A model from `x` of that shape to `y`, of floats or of another kind."""
    folder = root / name / "1"
    folder.mkdir(parents=True)
    graph = helper.make_graph(
        nodes,
        name,
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", kind, out)],
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), folder / "model.onnx")


@pytest.fixture(scope="module")
def tensors(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Live:
    root = tmp_path_factory.mktemp("tensors")
    same = [helper.make_node("Identity", ["x"], ["y"])]
    write_model(root, "same", same, ["rows", "columns"], ["rows", "columns"])
    write_model(root, "words", same, ["rows", 2], ["rows", 2], TensorProto.STRING)
    # One number for all rows; one for each positive element, however many that are.
    mean = [helper.make_node("ReduceMean", ["x"], ["y"], keepdims=0)]
    write_model(root, "mean", mean, ["rows", 2], [])
    positive = [
        helper.make_node("Constant", [], ["zero"], value_float=0.0),
        helper.make_node("Greater", ["x", "zero"], ["is"]),
        helper.make_node("Compress", ["x", "is"], ["y"]),
    ]
    write_model(root, "positive", positive, ["rows", 1], ["positive"])
    # As many columns as the greatest number says.
    cut = [
        helper.make_node("ReduceMax", ["x"], ["most"], keepdims=0),
        helper.make_node("Cast", ["most"], ["whole"], to=TensorProto.INT64),
        helper.make_node("Constant", [], ["one"], value_ints=[1]),
        helper.make_node("Reshape", ["whole", "one"], ["end"]),
        helper.make_node("Constant", [], ["start"], value_ints=[0]),
        helper.make_node("Slice", ["x", "start", "end", "one"], ["y"]),
    ]
    write_model(root, "cut", cut, ["rows", "columns"], ["rows", "kept"])
    write_model(root, "any", same, None, None)
    write_model(root, "any-mean", mean, None, None)
    write_model(root, "scalar", same, [], [])
    # The file does not say how many dimensions there are; its manifest does.
    write_model(root, "said", same, None, None)
    one = {"dtype": "FP32", "shape": [-1, 2]}
    said = {"task": "tensor", "inputs": [{"name": "x", **one}], "outputs": [{"name": "y", **one}]}
    (root / "said/1/manifest.json").write_text(json.dumps({"model_file": "model.onnx", **said}))
    shutil.copytree(root / "any", root / "apart")
    (root / "apart/model.yaml").write_text("execution: {isolation: process}")
    return start(root)


def request(
    model: str, data: Floats, shape: Sequence[int] | None = None, raw: bool = True
) -> oip.ModelInferRequest:
    made = oip.ModelInferRequest(model_name=model)
    tensor = made.inputs.add(
        name="x", datatype="FP32", shape=data.shape if shape is None else shape
    )
    if raw:
        made.raw_input_contents.append(data.tobytes())
    else:
        tensor.contents.fp32_contents.extend(data.reshape(-1).tolist())
    return made


def infer(live: Live, made: oip.ModelInferRequest) -> Floats:
    """The output, which must have the bytes that its shape says."""
    answer = oip_grpc.GRPCInferenceServiceStub(live.channel).ModelInfer(made, timeout=10)
    return np.frombuffer(answer.raw_output_contents[0], "<f4").reshape(answer.outputs[0].shape)


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("shape", [[1] * 65, [0, 1 << 62], [1 << 62, 0], [1 << 40, 1 << 40]])
def test_a_shape_that_no_array_has_is_refused_by_its_path(
    tensors: Live, shape: list[int], raw: bool
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        infer(tensors, request("same", np.zeros(0, np.float32), shape, raw))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "the limit is" in violations(caught.value)["inputs[0].shape"]


@pytest.mark.parametrize("raw", [True, False])
def test_rows_without_columns_are_answered(tensors: Live, raw: bool) -> None:
    assert infer(tensors, request("same", np.zeros((2, 0), np.float32), raw=raw)).shape == (2, 0)


@pytest.mark.parametrize("raw", [True, False])
def test_a_string_that_is_not_utf8_is_refused_by_its_place(tensors: Live, raw: bool) -> None:
    def ask(*values: bytes) -> oip.ModelInferResponse:
        made = oip.ModelInferRequest(model_name="words")
        tensor = made.inputs.add(name="x", datatype="BYTES", shape=[len(values) // 2, 2])
        if raw:
            parts = [len(v).to_bytes(4, "little") + v for v in values]
            made.raw_input_contents.append(b"".join(parts))
        else:
            tensor.contents.bytes_contents.extend(values)
        return oip_grpc.GRPCInferenceServiceStub(tensors.channel).ModelInfer(made, timeout=10)

    word = "Größe".encode()
    assert ask(b"a", word).raw_output_contents[0].endswith(word)
    with pytest.raises(grpc.RpcError) as caught:
        ask(b"a", word, b"c", b"\xff\xfe")
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert violations(caught.value) == {"inputs[0] element 3": "is not UTF-8"}


def test_a_bad_shape_ends_its_own_call_alone(tensors: Live) -> None:
    good = request("same", np.ones((1, 2), np.float32))
    bad = request("same", np.ones(1, np.float32), [1] * 65)

    def code(made: oip.ModelInferRequest) -> grpc.StatusCode:
        try:
            infer(tensors, made)
        except grpc.RpcError as e:
            return e.code()
        return grpc.StatusCode.OK

    with ThreadPoolExecutor(32) as pool:
        codes = list(pool.map(code, [good, bad] * 100))
    assert set(codes[::2]) == {grpc.StatusCode.OK}
    assert set(codes[1::2]) == {grpc.StatusCode.INVALID_ARGUMENT}


@pytest.mark.parametrize("raw", [True, False])
def test_an_output_without_a_row_for_each_input_is_each_callers_own(
    tensors: Live, raw: bool
) -> None:
    tables = [np.full((1 + i % 3, 2), i, np.float32) for i in range(60)]
    columns = [np.arange(i % 7 - 3, i % 5 + 4, dtype=np.float32).reshape(-1, 1) for i in range(60)]
    with ThreadPoolExecutor(32) as pool:
        means = pool.map(lambda t: infer(tensors, request("mean", t, raw=raw)), tables)
        found = pool.map(lambda c: infer(tensors, request("positive", c, raw=raw)), columns)
    for i, mean in enumerate(means):
        assert mean.shape == ()
        assert mean == i
    for column, positive in zip(columns, found, strict=True):
        np.testing.assert_array_equal(positive, column[column > 0])


@pytest.mark.parametrize("raw", [True, False])
def test_more_rows_than_a_batch_holds_are_answered_or_refused(tensors: Live, raw: bool) -> None:
    many = np.arange(1200, dtype=np.float32).reshape(-1, 2)
    assert infer(tensors, request("mean", many, raw=raw)) == many.mean()
    np.testing.assert_array_equal(infer(tensors, request("same", many, raw=raw)), many)
    wide = np.ones((1200, 4), np.float32)
    assert infer(tensors, request("cut", wide, raw=raw)).shape == (1200, 1)
    wide[600:] = 3
    for made in request("positive", many.reshape(-1, 1), raw=raw), request("cut", wide, raw=raw):
        with pytest.raises(grpc.RpcError) as caught:
            infer(tensors, made)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert violations(caught.value) == {
            "inputs": "have 1200 rows; the model does not answer row by row, and takes 512"
        }


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("model", ["any", "apart"])
def test_a_model_of_any_rank_takes_any(tensors: Live, model: str, raw: bool) -> None:
    for shape in ([], [3], [2, 3], [1, 2, 3, 1], [0, 2]):
        data = np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)
        assert np.array_equal(infer(tensors, request(model, data, raw=raw)), data)


@pytest.mark.parametrize("raw", [True, False])
def test_calls_of_a_model_of_any_rank_run_alone(tensors: Live, raw: bool) -> None:
    def ask(i: int) -> float:
        return float(
            infer(tensors, request("any-mean", np.full((1 + i % 3, 2), i, "<f4"), raw=raw))
        )

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, range(64))) == list(range(64))


def test_a_scalar_and_a_manifests_word_are_held_to(tensors: Live) -> None:
    assert infer(tensors, request("scalar", np.full((), 3, np.float32))) == 3
    assert infer(tensors, request("said", np.ones((3, 2), np.float32))).shape == (3, 2)
    for model in ("scalar", "said"):
        with pytest.raises(grpc.RpcError) as caught:
            infer(tensors, request(model, np.ones(2, np.float32)))
        assert "the model takes" in violations(caught.value)["inputs[0]"]
