"""The extension's trees beside ONNX Runtime's operator and scikit-learn, one thread each.

    python -m benchmarks.trees [--rounds 7]

Each round takes every candidate in turn, on rows that differ from call to call; figures are medians, and
answers are held to be equal. Writes benchmarks/results/trees.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import skl2onnx
from forebay_server.engines import tree_depth, trees
from numpy.typing import NDArray
from skl2onnx.common.data_types import FloatTensorType
from sklearn.ensemble import (
    GradientBoostingClassifier,
    RandomForestClassifier,
    RandomForestRegressor,
)

from benchmarks import common

FEATURES = 8
ROWS = (1, 8, 64, 512)
#: Rows of a measurement, at least.
MEASURED = 4000


def estimators() -> dict[str, Any]:
    """Fitted ensembles: a forest of bounded depth, one grown to pure leaves, and boosted trees."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8000, FEATURES)).astype(np.float32)
    score = x @ rng.normal(size=FEATURES) + np.sin(3 * x[:, 0])
    classes = np.digitize(score, np.quantile(score, [0.25, 0.5, 0.75]))
    return {
        "random forest, 100 trees of depth 12": RandomForestRegressor(
            100, max_depth=12, random_state=0
        ).fit(x, score),
        "random forest, 100 full trees, 4 classes": RandomForestClassifier(100, random_state=0).fit(
            x, classes
        ),
        "boosting, 300 trees of 31 leaves, 2 classes": GradientBoostingClassifier(
            n_estimators=300, max_leaf_nodes=31, max_depth=30, random_state=0
        ).fit(x, classes > 1),
    }


def candidates(estimator: Any, folder: Path) -> dict[str, Callable[[NDArray[np.float32]], Any]]:
    """Name -> predicts rows."""
    options = {id(estimator): {"zipmap": False}} if hasattr(estimator, "classes_") else None
    types: Any = [("x", FloatTensorType([None, FEATURES]))]
    model: Any = skl2onnx.to_onnx(estimator, initial_types=types, options=options)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    plain = ort.InferenceSession(str(path), _options())
    own = trees.replaced(tree_depth.read(path))
    library = trees.library()
    assert own is not None and library is not None, "the extension is needed: make up builds it"
    with_ours = _options()
    with_ours.register_custom_ops_library(library)
    ours = ort.InferenceSession(own, with_ours)
    predict = getattr(estimator, "predict_proba", estimator.predict)
    return {
        "extension": lambda x: ours.run(None, {"x": x})[-1],
        "onnxruntime": lambda x: plain.run(None, {"x": x})[-1],
        "scikit-learn": predict,
    }


def _options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return options


def speed(rounds: int) -> dict[str, Any]:
    """Microseconds a row, by model, rows a call and candidate."""
    rng = np.random.default_rng(1)
    out: dict[str, Any] = {}
    for name, estimator in estimators().items():
        with tempfile.TemporaryDirectory() as folder:
            made = candidates(estimator, Path(folder))
            for rows in ROWS:
                calls = [
                    rng.normal(size=(rows, FEATURES)).astype(np.float32)
                    for _ in range(max(4, MEASURED // rows))
                ]
                for x in calls[:50]:
                    np.testing.assert_allclose(
                        made["extension"](x), made["onnxruntime"](x), rtol=1e-5, atol=1e-6
                    )
                took: dict[str, list[float]] = {}
                for _ in range(rounds):
                    for candidate, run in made.items():
                        # scikit-learn takes milliseconds for a call of one row.
                        some = calls[:40] if candidate == "scikit-learn" else calls
                        began = time.perf_counter()
                        for x in some:
                            run(x)
                        seconds = time.perf_counter() - began
                        took.setdefault(candidate, []).append(seconds / len(some) / rows * 1e6)
                out.setdefault(name, {})[str(rows)] = {
                    c: round(common.median(v), 2) for c, v in took.items()
                } | {
                    "ratio": round(
                        float(
                            np.median(np.array(took["onnxruntime"]) / np.array(took["extension"]))
                        ),
                        2,
                    )
                }
                print(name, rows, out[name][str(rows)], flush=True)
    return out


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    found = speed(rounds)
    machine = common.machine()
    kept = {"machine": machine, "rounds": rounds, "us_a_row": found}
    (common.RESULTS / "trees.json").write_text(json.dumps(kept, indent=1) + "\n")
    lines = [
        "# Trees",
        "",
        f"Microseconds a row, one thread, medians of {rounds} rounds; {machine['cpu']}, "
        f"{machine['cores']} cores, ONNX Runtime {machine['onnxruntime']}, {machine['date']}. "
        "The ratio is ONNX Runtime's time to the extension's, of the same round.",
        "",
        "| model | rows a call | extension | ONNX Runtime | scikit-learn | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for name, by_rows in found.items():
        for rows, f in by_rows.items():
            lines.append(
                f"| {name} | {rows} | {f['extension']} | {f['onnxruntime']} "
                f"| {f['scikit-learn']} | {f['ratio']} |"
            )
    lines += ["", "`python -m benchmarks.trees`"]
    (common.RESULTS / "trees.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
