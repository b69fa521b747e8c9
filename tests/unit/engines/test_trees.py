"""The extension's trees against ONNX Runtime's own operator, on ensembles of all kinds."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from forebay.errors import FailedPrecondition
from forebay_server.core.interfaces import Batch, EngineSpec, Item, TensorSpec
from forebay_server.engines import tree_depth, trees
from forebay_server.engines.onnx import OnnxEngine
from numpy.typing import NDArray
from onnx import TensorProto, helper

LIBRARY = trees.library()
pytestmark = pytest.mark.skipif(
    LIBRARY is None, reason="the extension forebay_native is not built (cargo is needed)"
)
FEATURES = 6


def tree(
    rng: np.random.Generator, id: int, depth: int, mode: str, tracks: bool
) -> dict[str, list[Any]]:
    """A random tree whose node ids are in no order; leaves at all depths."""
    out: dict[str, list[Any]] = {
        k: [] for k in ("id", "feature", "value", "mode", "true", "false", "tracks")
    }

    def grow(level: int) -> int:
        at = len(out["id"])
        leaf = level >= depth or (level > 0 and rng.random() < 0.2)
        for key, value in (
            ("id", at),
            ("feature", 0 if leaf else int(rng.integers(FEATURES))),
            # Of few values, so that rows hit thresholds exactly.
            ("value", 0.0 if leaf else float(np.float32(rng.integers(-4, 5) / 4))),
            ("mode", "LEAF" if leaf else mode),
            ("true", 0),
            ("false", 0),
            ("tracks", int(tracks and rng.random() < 0.5)),
        ):
            out[key].append(value)
        if not leaf:
            out["true"][at] = grow(level + 1)
            out["false"][at] = grow(level + 1)
        return at

    grow(0)
    ids = rng.permutation(len(out["id"])).tolist()
    for key in ("id", "true", "false"):
        out[key] = [ids[i] for i in out[key]]
    return out


def ensemble(
    seed: int,
    *,
    count: int = 7,
    depth: int = 5,
    mode: str = "BRANCH_LEQ",
    tracks: bool = False,
    targets: int = 1,
    dense: bool = True,
    negative: bool = True,
    only: int | None = None,
    classes: list[int] | list[str] | None = None,
    **more: Any,
) -> onnx.ModelProto:
    """A model of random trees. `dense`: each leaf has a weight for each target."""
    rng = np.random.default_rng(seed)
    a: dict[str, list[Any]] = {}
    prefix = "target" if classes is None else "class"

    def put(name: str, values: list[Any]) -> None:
        a.setdefault(name, []).extend(values)

    for t in range(count):
        made = tree(rng, t, depth, mode, tracks)
        put("nodes_treeids", [t] * len(made["id"]))
        for name, key in (
            ("nodeids", "id"),
            ("featureids", "feature"),
            ("values", "value"),
            ("modes", "mode"),
            ("truenodeids", "true"),
            ("falsenodeids", "false"),
            ("missing_value_tracks_true", "tracks"),
        ):
            put(f"nodes_{name}", made[key])
        for node, node_mode in zip(made["id"], made["mode"], strict=True):
            if node_mode != "LEAF":
                continue
            chosen = range(targets) if dense else [int(rng.integers(targets))]
            for target in chosen if only is None else [only]:
                weight = float(np.float32(rng.normal() if negative else rng.random() / count))
                put(f"{prefix}_treeids", [t])
                put(f"{prefix}_nodeids", [node])
                put(f"{prefix}_ids", [target])
                put(f"{prefix}_weights", [weight])
    if not tracks:
        del a["nodes_missing_value_tracks_true"]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, targets])]
    if classes is None:
        node = helper.make_node(
            "TreeEnsembleRegressor",
            ["x"],
            ["y"],
            domain="ai.onnx.ml",
            n_targets=targets,
            **a,
            **more,
        )
    else:
        kind = "strings" if isinstance(classes[0], str) else "int64s"
        node = helper.make_node(
            "TreeEnsembleClassifier",
            ["x"],
            ["label", "y"],
            domain="ai.onnx.ml",
            **{f"classlabels_{kind}": classes},
            **a,
            **more,
        )
        of = TensorProto.STRING if kind == "strings" else TensorProto.INT64
        outputs.insert(0, helper.make_tensor_value_info("label", of, [None]))
    graph = helper.make_graph(
        [node],
        "trees",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, FEATURES])],
        outputs,
    )
    opsets = [helper.make_opsetid("ai.onnx.ml", 3)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def both(model: onnx.ModelProto, folder: Path) -> tuple[ort.InferenceSession, ort.InferenceSession]:
    """ONNX Runtime's own, in the trees' order, and the extension's."""
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    made = trees.replaced(tree_depth.read(path))
    assert made is not None
    kinds = {n.op_type for n in onnx.load_from_string(made).graph.node}
    assert not {k for k in kinds if k.startswith("TreeEnsemble")}
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    own = ort.InferenceSession(str(path), options)
    options = ort.SessionOptions()
    options.register_custom_ops_library(LIBRARY)
    return own, ort.InferenceSession(made, options)


def rows(seed: int, n: int, missing: float = 0.0) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    x = np.where(
        rng.random((n, FEATURES)) < 0.5,
        rng.integers(-5, 6, (n, FEATURES)) / 4,
        rng.normal(size=(n, FEATURES)),
    )
    x[rng.random(x.shape) < 0.02] = np.inf
    x[rng.random(x.shape) < missing] = np.nan
    return x.astype(np.float32)


def same(model: onnx.ModelProto, folder: Path, *, missing: float = 0.0, exact: bool = True) -> None:
    own, ours = both(model, folder)
    assert [(o.name, o.type) for o in own.get_outputs()] == [
        (o.name, o.type) for o in ours.get_outputs()
    ]
    for n in (1, 2, 15, 16, 17, 150, 300):
        x = rows(n, n, missing)
        found: Any = zip(own.run(None, {"x": x}), ours.run(None, {"x": x}), strict=True)
        for a, b in found:
            assert a.shape == b.shape
            if exact or a.dtype != np.float32:
                np.testing.assert_array_equal(a, b)
            else:
                np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("mode", ["BRANCH_LEQ", "BRANCH_LT"])
@pytest.mark.parametrize("tracks", [False, True])
@pytest.mark.parametrize("count", [1, 7, 40])
def test_regressors(mode: str, tracks: bool, count: int, tmp_path: Path) -> None:
    model = ensemble(count, count=count, mode=mode, tracks=tracks)
    same(model, tmp_path, missing=0.2)


@pytest.mark.parametrize(
    "more",
    [
        {"base_values": [0.25]},
        {"aggregate_function": "AVERAGE"},
        {"aggregate_function": "AVERAGE", "base_values": [0.5]},
        {"targets": 3},
        {"targets": 3, "dense": False, "base_values": [0.5, -1.0, 2.0]},
        {"targets": 2, "aggregate_function": "AVERAGE"},
        {"depth": 12, "count": 3},
    ],
)
def test_regressors_of_other_kinds(more: dict[str, Any], tmp_path: Path) -> None:
    same(ensemble(3, **more), tmp_path)


def test_trees_that_are_a_whole_model_are_found_by_their_number(tmp_path: Path) -> None:
    import forebay_native

    def number(model: onnx.ModelProto) -> int | None:
        path = tmp_path / "model.onnx"
        onnx.save(model, str(path))
        read = tree_depth.read(path)
        made = trees.replaced(read)
        assert made is not None
        found = trees.whole(read)
        options = ort.SessionOptions()
        options.register_custom_ops_library(LIBRARY)
        sessions.append(ort.InferenceSession(made, options))
        return found

    sessions: list[ort.InferenceSession] = []
    whole = number(ensemble(3, count=5))
    assert whole is not None
    visits = forebay_native.tree_visits(whole)
    assert visits is not None and 5 <= visits <= 5 * 12
    several = number(ensemble(3, targets=3))
    assert several is not None and forebay_native.tree_visits(several) is None
    more = ensemble(3)
    more.graph.node.add(op_type="Identity", input=[more.graph.output[0].name], output=["more"])
    more.graph.output[0].name = "more"
    assert number(more) is None
    sessions.clear()
    gc.collect()
    assert forebay_native.tree_visits(whole) is None, "its session has ended"


def test_a_leaf_without_a_weight_adds_its_nodes_own_value(tmp_path: Path) -> None:
    """As ONNX Runtime does for a single target, and for that alone."""
    for targets in (1, 2):
        model = ensemble(6, targets=targets, dense=False)
        own = {a.name: a for a in model.graph.node[0].attribute}
        own["nodes_values"].floats[:] = [v or 3.25 for v in own["nodes_values"].floats]
        for name in ("treeids", "nodeids", "ids"):
            del own[f"target_{name}"].ints[::2]
        del own["target_weights"].floats[::2]
        same(model, tmp_path)


THREE: list[Any] = [[0, 1, 2], [7, 3, 5], ["setosa", "versicolor", "virginica"]]


@pytest.mark.parametrize("classes", THREE)
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("transform", ["NONE", "LOGISTIC", "SOFTMAX"])
def test_classifiers_of_three(
    classes: Any, dense: bool, negative: bool, transform: str, tmp_path: Path
) -> None:
    bases: list[dict[str, Any]] = [{}, {"base_values": [0.1, -0.2, 0.3]}]
    for base in bases:
        model = ensemble(
            4,
            targets=3,
            classes=classes,
            dense=dense,
            negative=negative,
            post_transform=transform,
            **base,
        )
        same(model, tmp_path, exact=transform == "NONE")


@pytest.mark.parametrize("classes", [[0, 1], [4, 2], ["no", "yes"]])
@pytest.mark.parametrize("only", [0, 1, None])
@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("transform", ["NONE", "LOGISTIC", "SOFTMAX"])
@pytest.mark.parametrize("base", [[], [0.1], [0.1, -0.2]])
def test_classifiers_of_two(
    classes: Any,
    only: int | None,
    negative: bool,
    transform: str,
    base: list[float],
    tmp_path: Path,
) -> None:
    more: dict[str, Any] = {"base_values": base} if base else {}
    model = ensemble(
        5,
        targets=2,
        classes=classes,
        only=only,
        negative=negative,
        post_transform=transform,
        **more,
    )
    same(model, tmp_path, exact=transform == "NONE")


@pytest.mark.parametrize("mode", ["BRANCH_EQ", "BRANCH_GT"])
def test_what_the_operators_do_not_know_is_left_to_onnx_runtime(mode: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(ensemble(1, mode=mode).SerializeToString())
    assert trees.replaced(tree_depth.read(path)) is None


def test_a_model_whose_trees_the_extension_refuses_runs_as_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = ensemble(2, count=3)
    features = next(a for a in model.graph.node[0].attribute if a.name == "nodes_featureids")
    features.ints[0] = 5000  # more than a packed node can say
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 5001
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    engine = opened(path, 5001)
    assert "feature 5000" in caplog.text
    x = np.random.default_rng(0).normal(size=(3, 5001)).astype(np.float32)
    want = ort.InferenceSession(str(path)).run(None, {"x": x})[0]
    np.testing.assert_array_equal(answer(engine, x), want)


def test_the_engine_walks_them_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(ensemble(2).SerializeToString())
    engine = opened(path, FEATURES)
    assert not caplog.text
    x = rows(5, 40)
    own, _ = both(ensemble(2), tmp_path)
    np.testing.assert_array_equal(answer(engine, x), own.run(None, {"x": x})[0])


def test_rows_that_are_too_short_are_refused_and_not_read_beyond(tmp_path: Path) -> None:
    model = ensemble(2)
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "any"
    _, ours = both(model, tmp_path)
    with pytest.raises(Exception, match="rows of 2 features; 6 are needed"):
        ours.run(None, {"x": rows(1, 5)[:, :2]})


def with_weights_beside(file: str) -> onnx.ModelProto:
    """Trees, whose sums get a number added that lies in another file."""
    model = ensemble(2)
    model.graph.node[0].output[0] = "sums"
    beside = TensorProto(name="more", dims=[1], data_type=TensorProto.FLOAT)
    beside.data_location = TensorProto.EXTERNAL
    beside.external_data.add(key="location", value=file)
    model.graph.initializer.append(beside)
    model.graph.node.append(helper.make_node("Add", ["sums", "more"], ["y"]))
    model.opset_import.append(helper.make_opsetid("", 13))
    return model


def test_weights_in_another_file_are_read_beside_the_model_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = np.float32(1000).tobytes()
    folder, elsewhere = tmp_path / "model", tmp_path / "elsewhere"
    for made in (folder, elsewhere):
        made.mkdir()
    monkeypatch.chdir(elsewhere)
    path = folder / "model.onnx"
    path.write_bytes(with_weights_beside("weights.bin").SerializeToString())
    (elsewhere / "weights.bin").write_bytes(number)
    with pytest.raises(FailedPrecondition, match="External data path does not exist"):
        opened(path, FEATURES)
    caplog.clear()
    (folder / "weights.bin").write_bytes(number)
    assert answer(opened(path, FEATURES), rows(1, 3)).min() > 500
    assert not caplog.text


def opened(path: Path, features: int) -> OnnxEngine:
    spec = EngineSpec(
        "m",
        1,
        "onnxruntime",
        str(path),
        "tensors",
        (TensorSpec("x", "FP32", (-1, features)),),
        (TensorSpec("y", "FP32", (-1, 1)),),
        intra_op_threads=1,
        lone_threads=2,
    )
    engine = OnnxEngine(spec)
    engine.load()
    return engine


def answer(engine: OnnxEngine, x: NDArray[np.float32]) -> NDArray[np.float32]:
    batch = Batch([Item({"x": x}, rows=len(x))], 1, len(x))
    (out,) = engine.finish(engine.execute(engine.prepare(batch)), batch)
    return cast("NDArray[np.float32]", cast(Any, out)["y"])
