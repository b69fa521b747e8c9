"""Trees that are none, in files of strangers: refused with the fault, whichever operator finds it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from forebay.errors import FailedPrecondition
from forebay_server.core.interfaces import EngineSpec, TensorSpec
from forebay_server.engines import tree_depth
from forebay_server.engines.onnx import OnnxEngine
from forebay_server.repository.inspect import describe
from onnx import TensorProto, helper

NAN = float("nan")
ML = "ai.onnx.ml"


def stump(kind: str, **changes: Any) -> onnx.ModelProto:
    """A node with two leaves, but for `changes`; those to None are left out."""
    a: dict[str, Any] = {
        "nodes_treeids": [0, 0, 0],
        "nodes_nodeids": [0, 1, 2],
        "nodes_featureids": [0, 0, 0],
        "nodes_values": [0.5, 0.0, 0.0],
        "nodes_modes": ["BRANCH_LEQ", "LEAF", "LEAF"],
        "nodes_truenodeids": [1, 0, 0],
        "nodes_falsenodeids": [2, 0, 0],
        "treeids": [0, 0],
        "nodeids": [1, 2],
        "ids": [0, 0],
        "weights": [1.0, 2.0],
        **({"n_targets": 1} if kind == "Regressor" else {"classlabels_int64s": [0, 1, 2]}),
        **changes,
    }
    prefix = "target_" if kind == "Regressor" else "class_"
    named = {prefix + k if k in ("treeids", "nodeids", "ids", "weights") else k: a[k] for k in a}
    outputs = [("y", TensorProto.FLOAT, [None, None])]
    if kind == "Classifier":
        outputs.insert(0, ("label", TensorProto.INT64, [None]))
    return model_of(
        helper.make_node(
            f"TreeEnsemble{kind}",
            ["x"],
            [name for name, _, _ in outputs],
            domain=ML,
            **{k: v for k, v in named.items() if v is not None},
        ),
        outputs,
    )


def model_of(node: Any, outputs: list[Any], version: int = 3) -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, None])
    made = [helper.make_tensor_value_info(*one) for one in outputs]
    opsets = [helper.make_opsetid(ML, version), helper.make_opsetid("", 17)]
    graph = helper.make_graph([node], "trees", [x], made)
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def load(model: onnx.ModelProto, folder: Path) -> OnnxEngine:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    inputs = (TensorSpec("x", "FP32", (-1, -1)),)
    outputs = tuple(TensorSpec(o.name, "FP32", (-1, -1)) for o in model.graph.output)
    engine = OnnxEngine(EngineSpec("m", 1, "onnxruntime", str(path), "tensors", inputs, outputs))
    engine.load()
    return engine


@pytest.mark.parametrize(
    "changes",
    [
        {"nodes_truenodeids": [77, 0, 0]},
        {"nodes_falsenodeids": [-1, 0, 0]},
        {"nodes_featureids": [-5, 0, 0]},
        {"nodes_nodeids": [0, 1, 1]},
        {"nodes_treeids": [0, 1, 0]},
        {"nodes_values": [0.5]},
        {"nodes_modes": ["BRANCH_LEQ"]},
        {"nodes_modes": ["BRANCH_XX", "LEAF", "LEAF"]},
        {"nodes_truenodeids": [1]},
        {"nodes_nodeids": [0]},
        {"treeids": [0, 9]},
        {"nodeids": [1, 55]},
        {"ids": [0, 99_999_999]},
        {"ids": [0, -7]},
        {"ids": [0]},
        {"weights": [1.0]},
        {"base_values": [1.0] * 50},
        {"post_transform": "XX"},
    ],
)
@pytest.mark.parametrize("kind", ["Regressor", "Classifier"])
def test_what_is_no_ensemble_is_refused(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match=r"model\.onnx cannot be loaded: .+"):
        load(stump(kind, **changes), tmp_path)


@pytest.mark.parametrize("n", [0, -3])
def test_a_regressor_without_targets_is_refused(n: int, tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match=r"model\.onnx cannot be loaded: .+"):
        load(stump("Regressor", n_targets=n), tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"nodes_featureids": [100_000_000, 0, 0]},
        {"nodes_featureids": [1000, 0, 0]},
        {"n_targets": 1 << 61},
        {"n_targets": (1 << 63) - 1},
    ],
)
def test_what_a_run_has_no_room_for_ends_that_run_alone(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    engine = load(stump("Regressor", **changes), tmp_path)
    assert engine._sessions is not None
    with pytest.raises(Exception, match=r"feature|memory|overflow"):
        engine._sessions.run(["y"], {"x": np.zeros((3, 3), np.float32)})


def test_a_threshold_that_is_no_number_lets_nothing_pass(tmp_path: Path) -> None:
    engine = load(stump("Regressor", nodes_values=[NAN, 0.0, 0.0]), tmp_path)
    assert engine._sessions is not None
    (y,) = engine._sessions.run(["y"], {"x": np.zeros((20, 1), np.float32)})
    assert y.ravel().tolist() == [2.0] * 20


def chain(levels: int, mode: str = "BRANCH_LEQ") -> onnx.ModelProto:
    """A tree of which each node has a leaf and the next one."""
    n = 2 * levels + 1
    even = list(range(0, n - 1, 2))
    true, false = [0] * n, [0] * n
    for i in even:
        true[i], false[i] = i + 2, i + 1
    return stump(
        "Regressor",
        nodes_treeids=[0] * n,
        nodes_nodeids=list(range(n)),
        nodes_featureids=[0] * n,
        nodes_values=[0.5] * n,
        nodes_modes=[mode if i < n - 1 and i % 2 == 0 else "LEAF" for i in range(n)],
        nodes_truenodeids=true,
        nodes_falsenodeids=false,
        treeids=[0],
        nodeids=[n - 1],
        ids=[0],
        weights=[1.0],
    )


def chain_of_five(levels: int) -> onnx.ModelProto:
    """The same by the operator of version 5."""
    n = levels
    last = [int(i == n - 1) for i in range(n)]
    node = helper.make_node(
        "TreeEnsemble",
        ["x"],
        ["y"],
        domain=ML,
        n_targets=1,
        tree_roots=[0],
        nodes_featureids=[0] * n,
        nodes_splits=helper.make_tensor("s", TensorProto.FLOAT, [n], [0.5] * n),
        nodes_modes=helper.make_tensor("m", TensorProto.UINT8, [n], [0] * n),
        nodes_truenodeids=[0 if i == n - 1 else i + 1 for i in range(n)],
        nodes_trueleafs=last,
        nodes_falsenodeids=[1] * n,
        nodes_falseleafs=[1] * n,
        leaf_targetids=[0, 0],
        leaf_weights=helper.make_tensor("w", TensorProto.FLOAT, [2], [1.0, 2.0]),
    )
    return model_of(node, [("y", TensorProto.FLOAT, [None, None])], version=5)


def within(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same trees within a branch."""
    inner = helper.make_graph(
        model.graph.node, "b", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    )
    holder = helper.make_node("If", ["c"], ["z"], then_branch=inner, else_branch=inner)
    made = model_of(holder, [("z", TensorProto.FLOAT, [None, None])])
    made.graph.initializer.append(helper.make_tensor("c", TensorProto.BOOL, [], [True]))
    return made


@pytest.mark.parametrize(
    "model",
    [
        chain(200_000),  # ONNX Runtime's own recursion would end the process
        chain(200_000, "BRANCH_GT"),
        chain_of_five(200_000),
        within(chain(200_000)),
        stump("Regressor", nodes_truenodeids=[0, 0, 0]),
        stump(
            "Classifier",
            nodes_modes=["BRANCH_LEQ", "BRANCH_LEQ", "LEAF"],
            nodes_falsenodeids=[2, 0, 0],
        ),
    ],
)
def test_trees_that_are_too_deep_or_endless_are_refused_unopened(
    model: onnx.ModelProto, tmp_path: Path
) -> None:
    with pytest.raises(FailedPrecondition, match="a tree leads back to itself, or is deeper than"):
        load(model, tmp_path)
    with pytest.raises(FailedPrecondition, match="a tree leads back to itself, or is deeper than"):
        describe(tmp_path)


@pytest.mark.parametrize("make", [chain, chain_of_five])
def test_trees_as_deep_as_the_limit_are_served(make: Any, tmp_path: Path) -> None:
    engine = load(make(tree_depth.MAX_DEPTH - 1), tmp_path)
    assert engine._sessions is not None
    (y,) = engine._sessions.run(["y"], {"x": np.zeros((20, 1), np.float32)})
    assert y.ravel().tolist() == [1.0] * 20


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"TreeEnsemble" + bytes(range(256)))
    with pytest.raises(FailedPrecondition, match=r"model\.onnx cannot be loaded: "):
        tree_depth.read(path)
