"""Ensembles of trees in an ONNX model, by the operator that the extension brings (server/native/src/trees).

ONNX Runtime walks tree after tree and row after row, and waits for memory at each node. The extension's
operator walks several together, and answers the same. A model's file stays as it is: its nodes are
replaced in memory, where all that they say is known here. The others, and all where the extension is
missing, run as they always did.
"""

from __future__ import annotations

import importlib.util
import secrets
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

#: The domain of the extension's operators.
DOMAIN = "forebay"
_ML = "ai.onnx.ml"
_MODES = {b"LEAF": 0, b"BRANCH_LEQ": 1, b"BRANCH_LT": 2}
_TRANSFORMS = {b"NONE": 0, b"LOGISTIC": 1, b"SOFTMAX": 2}
#: Attributes that are the same there; those of a classifier begin with `class_` in place of `target_`.
_SAME = (
    "nodes_treeids",
    "nodes_nodeids",
    "nodes_featureids",
    "nodes_values",
    "nodes_truenodeids",
    "nodes_falsenodeids",
    "nodes_missing_value_tracks_true",
    "base_values",
    "n_targets",
)
_WEIGHTS = ("treeids", "nodeids", "ids", "weights")
#: And those that say nothing to it as they are.
_READ = {"nodes_modes", "nodes_hitrates", "post_transform", "aggregate_function"}
_LABELS = {"classlabels_int64s", "classlabels_strings"}
_FLOATS, _INTS, _INT, _STRING, _INT64 = 6, 7, 2, 8, 7
#: By which a regressor's trees are found again.
_NUMBER = "number"


@cache
def library() -> str | None:
    """The extension's file, which ONNX Runtime loads as a library of operators; None without it."""
    package = importlib.util.find_spec("forebay_native")
    for folder in (package.submodule_search_locations or []) if package else []:
        for name in ("forebay_native.abi3.so", "forebay_native.pyd"):
            if (Path(folder) / name).exists():
                return str(Path(folder) / name)
    return None


def replaced(model: Any) -> bytes | None:
    """The model (of `tree_depth.read`, which it changes) with the extension's operators; None when it
    has no trees that they know."""
    nodes = model.graph.node
    found = 0
    for at in reversed(range(len(nodes))):
        node = nodes[at]
        if node.domain == _ML and node.op_type == "TreeEnsembleRegressor":
            found += _regressor(node)
        elif node.domain == _ML and node.op_type == "TreeEnsembleClassifier":
            found += _classifier(model, at)
    if not found:
        return None
    model.opset_import.add(domain=DOMAIN, version=1)
    return bytes(model.SerializeToString())


def whole(model: Any) -> int | None:
    """Of a model that `replaced` has changed: the number by which the extension finds its trees, if the
    model is these trees and nothing else, from its only input to its only output; else None."""
    graph = model.graph
    if len(graph.node) != 1 or graph.initializer or len(graph.output) != 1 or len(graph.input) != 1:
        return None
    (node,) = graph.node
    ends = [graph.input[0].name], [graph.output[0].name]
    numbers = [a.i for a in node.attribute if a.name == _NUMBER]
    if node.domain != DOMAIN or not numbers or (list(node.input), list(node.output)) != ends:
        return None
    return int(numbers[0])


def _regressor(node: Any) -> bool:
    own = {a.name: a for a in node.attribute}
    weights = {f"target_{n}" for n in _WEIGHTS}
    modes = _modes(own, {*_SAME, *weights, *_READ})
    if modes is None or _string(own, "post_transform", b"NONE") != b"NONE":
        return False
    aggregate = _string(own, "aggregate_function", b"SUM")
    if aggregate not in (b"SUM", b"AVERAGE"):
        return False
    _become(node, "TreeRegressor", [own[n] for n in own if n in weights or n in _SAME], modes)
    node.attribute.add(name="average", type=_INT, i=int(aggregate == b"AVERAGE"))
    # By chance: a model's file, which may name this operator itself, must not name another's trees.
    node.attribute.add(name=_NUMBER, type=_INT, i=secrets.randbits(62))
    return True


def _classifier(model: Any, at: int) -> bool:
    nodes = model.graph.node
    node = nodes[at]
    own = {a.name: a for a in node.attribute}
    weights = {f"class_{n}": f"target_{n}" for n in _WEIGHTS}
    modes = _modes(own, {*_SAME, *weights, *_READ, *_LABELS})
    transform = _TRANSFORMS.get(_string(own, "post_transform", b"NONE"))
    if modes is None or transform is None or "aggregate_function" in own or len(node.output) != 2:
        return False
    strings = list(own["classlabels_strings"].strings) if "classlabels_strings" in own else []
    ints = list(own["classlabels_int64s"].ints) if "classlabels_int64s" in own else []
    labels = list(range(len(strings))) or ints
    if len(labels) < 2:
        return False
    kept = [own[n] for n in own if n in weights or n in _SAME]
    for attribute in kept:
        attribute.name = weights.get(attribute.name, attribute.name)
    _become(node, "TreeClassifier", kept, modes)
    node.attribute.add(name="labels", type=_INTS, ints=labels)
    node.attribute.add(name="transform", type=_INT, i=transform)
    if strings:
        label = node.output[0]
        index, names = f"{label}/{DOMAIN}/index", f"{label}/{DOMAIN}/names"
        node.output[0] = index
        model.graph.initializer.add(
            name=names, dims=[len(strings)], data_type=_STRING, string_data=strings
        )
        gather = type(node)(op_type="Gather", input=[names, index], output=[label])
        nodes.insert(at + 1, gather)
        if all(o.domain not in ("", "ai.onnx") for o in model.opset_import):
            model.opset_import.add(version=13)
    return True


def _modes(own: Mapping[str, Any], known: set[str]) -> list[int] | None:
    """The nodes' modes by number; None when anything is said that the operators do not know."""
    if not own.keys() <= known or "nodes_modes" not in own:
        return None
    modes = [_MODES.get(m) for m in own["nodes_modes"].strings]
    return None if None in modes else modes  # type: ignore[return-value]


def _string(own: Mapping[str, Any], name: str, default: bytes) -> bytes:
    return bytes(own[name].s) if name in own else default


def _become(node: Any, op_type: str, kept: list[Any], modes: list[int]) -> None:
    attributes = [type(a).FromString(a.SerializeToString()) for a in kept]
    del node.attribute[:]
    node.op_type, node.domain = op_type, DOMAIN
    node.attribute.extend(attributes)
    node.attribute.add(name="modes", type=_INTS, ints=modes)
