"""How deep the trees of an ONNX model are, before ONNX Runtime opens it.

It builds them by recursion: some ten thousand levels end the process.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from forebay_server.engines.onnx_format import model_of
from forebay_server.engines.signature import rejected

#: Levels of a tree at most.
MAX_DEPTH = 4096
Ints = NDArray[np.int64]


def read(path: Path) -> Any:
    """A model that has ensembles of trees; None of others.

    Raises:
        FailedPrecondition: MODEL_REJECTED; it cannot be read, or a tree is deeper than any that is grown,
            or has no end.
    """
    with path.open("rb") as file:
        if not path.stat().st_size:
            return None
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data.find(b"TreeEnsemble") < 0:
                return None
            try:
                model = model_of(data[:])
            except DecodeError as e:
                raise rejected(f"{path.name} cannot be loaded: {e}") from None
    for node in _nodes([model.graph, *model.functions]):
        if node.op_type.startswith("TreeEnsemble"):
            _check(node, path.name)
    return model


def _nodes(graphs: Iterable[Any]) -> Iterator[Any]:
    """Those of graphs, and of the graphs within them."""
    left = list(graphs)
    while left:
        for node in left.pop().node:
            yield node
            for attribute in node.attribute:
                left += [attribute.g, *attribute.graphs]


def _check(node: Any, file: str) -> None:
    own = {a.name: a for a in node.attribute}

    def ints(name: str) -> Ints:
        return np.array(own[name].ints if name in own else [], np.int64)

    true, false = ints("nodes_truenodeids"), ints("nodes_falsenodeids")
    if node.op_type == "TreeEnsemble":
        children = _children_by_place(
            true, false, ints("nodes_trueleafs"), ints("nodes_falseleafs")
        )
    else:
        modes = list(own["nodes_modes"].strings) if "nodes_modes" in own else []
        inner = np.array([m != b"LEAF" for m in modes], bool)
        ids = ints("nodes_treeids"), ints("nodes_nodeids")
        children = _children_by_id(*ids, true, false, inner)
    if children is None:  # attributes that differ in length: refused when the model is opened
        return
    if not _ends(children):
        raise rejected(
            f"{file}: {node.op_type}: a tree leads back to itself, or is deeper than {MAX_DEPTH} "
            "levels, the limit"
        )


def _children_by_place(true: Ints, false: Ints, ends: Ints, ends_too: Ints) -> Ints | None:
    """[nodes, 2] places of inner nodes, -1 for leaves."""
    if not len(true) == len(false) == len(ends) == len(ends_too):
        return None
    children = np.stack([np.where(ends == 1, -1, true), np.where(ends_too == 1, -1, false)], 1)
    return np.where((children < 0) | (children >= len(true)), -1, children)


def _children_by_id(
    trees: Ints, nodes: Ints, true: Ints, false: Ints, inner: NDArray[np.bool_]
) -> Ints | None:
    """[nodes, 2] places of inner nodes, -1 for leaves and for ids that are not there."""
    n = len(nodes)
    if not len(trees) == n == len(true) == len(false) == len(inner) or not n:
        return None
    _, tree = np.unique(trees, return_inverse=True)
    known, node = np.unique(np.concatenate([nodes, true, false]), return_inverse=True)
    keys = np.tile(tree, 3) * len(known) + node
    order = np.argsort(keys[:n], kind="stable")
    at = np.searchsorted(keys[:n], keys[n:], sorter=order)
    found = order[np.minimum(at, n - 1)]
    found = np.where((keys[found] == keys[n:]) & inner[found], found, -1)
    return np.where(inner[:, None], np.stack([found[:n], found[n:]], 1), -1)


def _ends(children: Ints) -> bool:
    """Whether each node is reached within `MAX_DEPTH` levels by every way, level by level."""
    parents = np.bincount(children[children >= 0], minlength=len(children))
    level = np.flatnonzero(parents == 0)
    left = len(children)
    for _ in range(MAX_DEPTH):
        if not len(level):
            break
        left -= len(level)
        below = children[level]
        reached, times = np.unique(below[below >= 0], return_counts=True)
        parents[reached] -= times
        level = reached[parents[reached] == 0]
    return left == 0
