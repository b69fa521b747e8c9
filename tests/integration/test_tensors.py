"""ModelInfer on models of bare tensors, of the sorts that people bring."""

from __future__ import annotations

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


def write_model(root: Path, name: str, nodes: Sequence[Any], shape: Any, out: Any) -> None:
    """A model from `x` of that shape to `y`, of floats."""
    folder = root / name / "1"
    folder.mkdir(parents=True)
    graph = helper.make_graph(
        nodes,
        name,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, out)],
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), folder / "model.onnx")


@pytest.fixture(scope="module")
def tensors(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Live:
    root = tmp_path_factory.mktemp("tensors")
    same = [helper.make_node("Identity", ["x"], ["y"])]
    write_model(root, "same", same, ["rows", "columns"], ["rows", "columns"])
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
