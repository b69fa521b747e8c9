"""scikit-learn estimators and pipelines to ONNX, with named features, and held equal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast
from zipfile import BadZipFile

import numpy as np
import pandas as pd

from forebay_exporters.artefact import ExportError, version_folder, write_manifest
from forebay_exporters.parity import Bounds, report

LIBRARIES = ("scikit-learn", "skl2onnx", "onnx", "onnxruntime")
#: Types that skops does not list as safe though nothing can be done with them.
HARMLESS = ("numpy.dtype",)
#: String columns with more values than this are free text, not categories.
MAX_CATEGORIES = 1000
#: Characters of a converter's fault; it may quote all trees.
MAX_FAULT = 500


def export_sklearn(
    estimator: Any,
    sample: pd.DataFrame,
    root: Path,
    name: str,
    version: int = 1,
    *,
    describing: pd.DataFrame | None = None,
    target: Any = None,
    target_name: str = "target",
    target_unit: str = "",
    description: str = "",
    units: Mapping[str, str] | None = None,
    metrics: Mapping[str, Any] | None = None,
    source: Mapping[str, Any] | None = None,
    bounds: Bounds | None = None,
) -> Path:
    """Export a fitted estimator or pipeline as `<root>/<name>/<version>`.

    Args:
        estimator: fitted; takes a DataFrame with the sample's columns, in order.
        sample: real rows that parity is checked on. Missing numbers are NaN, missing strings "" or
            None.
        describing: rows that types, gaps, ranges and categories are read from: those the model was
            fitted on, since a request beyond them is warned of. Default: the sample.
        target: true values of the sample, for the task metric (R2 or accuracy).
        bounds: parity; default: mean difference of 1e-4 of the predictions' spread for regression,
            probabilities within 1e-3 for classification.

    Raises:
        ExportError: the estimator cannot be converted, or the artefact is not equal to it.
    """
    import onnxruntime as ort
    from skl2onnx import to_onnx
    from skl2onnx.common.data_types import FloatTensorType, StringTensorType

    rows = sample if describing is None else describing
    if list(rows.columns) != list(sample.columns):
        raise ExportError(
            f"the rows that describe the features have columns {list(rows.columns)}, "
            f"the sample has {list(sample.columns)}"
        )
    features = describe_features(rows, units or {})
    classifier = hasattr(estimator, "classes_")
    types = [
        (f["name"], (StringTensorType if f["type"] == "string" else FloatTensorType)([None, 1]))
        for f in features
    ]
    options = {"zipmap": False} if classifier else None
    convert = partial(cast(Any, to_onnx), estimator, options=_options(estimator, options))
    layout = "columns"
    with _whole_numbers():
        try:
            model = convert(initial_types=types)
        except Exception as e:
            fault = f"{type(estimator).__name__} cannot be converted to ONNX"
            if any(f["type"] == "string" for f in features):
                raise ExportError(f"{fault}: {str(e)[:MAX_FAULT]}") from e
            try:  # an estimator without a pipeline before it takes all numbers as one matrix
                model = convert(initial_types=[("input", FloatTensorType([None, len(features)]))])
            except Exception as e:
                raise ExportError(f"{fault}: {str(e)[:MAX_FAULT]}") from e
            layout = "matrix"
    with version_folder(root, name, version) as folder:
        path = folder / "model.onnx"
        path.write_bytes(model.SerializeToString())
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        outputs = [o.name for o in session.get_outputs()]
        feeds: Mapping[str, Any] = to_feeds(features, sample)
        if layout == "matrix":
            feeds = {"input": np.concatenate([feeds[f["name"]] for f in features], axis=1)}
        values: list[Any] = list(session.run(outputs, feeds))
        tabular: dict[str, Any] = {
            "features": features,
            "layout": layout,
            "output": outputs[0],
            "target": {"name": target_name, "unit": target_unit},
        }
        if classifier:
            classes = [str(c) for c in estimator.classes_]
            tabular |= {"probabilities_output": outputs[1], "classes": classes}
            original, exported = estimator.predict_proba(sample), values[1]
            metric = None
            if target is not None:
                truth = np.asarray(target).astype(str)
                metric = (
                    "accuracy",
                    float((estimator.predict(sample).astype(str) == truth).mean()),
                    float((np.asarray(values[0]).astype(str) == truth).mean()),
                )
            limit = bounds or Bounds(max_abs_diff=1e-3, max_metric_loss=0.005)
        else:
            original, exported = estimator.predict(sample), np.asarray(values[0]).reshape(-1)
            metric = None
            if target is not None:
                truth = np.asarray(target, np.float64)
                metric = ("r2", r2(truth, original), r2(truth, exported))
            limit = bounds or Bounds(
                mean_abs_diff=1e-4 * float(np.std(original)) + 1e-12, max_metric_loss=0.001
            )
        write_manifest(
            folder,
            "tabular-classification" if classifier else "tabular-regression",
            libraries=LIBRARIES,
            description=description,
            source={"kind": "sklearn", "id": type(estimator).__name__, **(source or {})},
            tabular=tabular,
            metrics=dict(metrics or {}),
            parity=report(original, exported, limit, metric),
        )
    return root / name / str(version)


@contextmanager
def _whole_numbers() -> Iterator[None]:
    """Have skl2onnx's attributes be whole numbers where they are booleans, which protobuf refuses: those
    that say where missing values go, in scikit-learn's histogram-based boosting."""
    from skl2onnx.common import _container

    make = _container.make_node

    def whole(*arguments: Any, **attributes: Any) -> Any:
        for name, value in attributes.items():
            if isinstance(value, list) and any(isinstance(v, bool | np.bool_) for v in value):
                attributes[name] = [int(v) for v in value]
        return make(*arguments, **attributes)

    _container.make_node = whole
    try:
        yield
    finally:
        _container.make_node = make


def _options(estimator: Any, options: dict[str, Any] | None) -> dict[int, dict[str, Any]] | None:
    if options is None:
        return None
    final = estimator.steps[-1][1] if hasattr(estimator, "steps") else estimator
    return {id(final): options}


def r2(truth: Any, predicted: Any) -> float:
    """Coefficient of determination."""
    truth, predicted = np.asarray(truth, np.float64), np.asarray(predicted, np.float64)
    return float(1 - ((truth - predicted) ** 2).sum() / ((truth - truth.mean()) ** 2).sum())


def describe_features(rows: pd.DataFrame, units: Mapping[str, str]) -> list[dict[str, Any]]:
    """Types, gaps, ranges and categories, as seen in the rows."""
    out: list[dict[str, Any]] = []
    for name in rows.columns:
        column: Any = rows[name]
        one: dict[str, Any] = {"name": str(name), "unit": units.get(str(name), "")}
        if pd.api.types.is_bool_dtype(column):
            one |= {"type": "boolean", "nullable": False}
        elif pd.api.types.is_numeric_dtype(column):
            one |= {
                "type": "number",
                "nullable": bool(column.isna().any()),
                "min": float(column.min()),
                "max": float(column.max()),
            }
        else:
            values = column.dropna().astype(str)
            values = values[values != ""]
            one |= {"type": "string", "nullable": len(values) < len(column)}
            kinds = sorted(values.unique().tolist())
            if len(kinds) <= MAX_CATEGORIES:
                one["categories"] = kinds
        out.append(one)
    return out


def to_feeds(features: list[dict[str, Any]], sample: pd.DataFrame) -> dict[str, Any]:
    """A sample as the ONNX model's inputs: one [n, 1] tensor per feature."""
    feeds = {}
    for feature in features:
        column = sample[feature["name"]]
        if feature["type"] == "string":
            feeds[feature["name"]] = column.fillna("").astype(str).to_numpy(object).reshape(-1, 1)
        else:
            feeds[feature["name"]] = column.to_numpy(np.float32).reshape(-1, 1)
    return feeds


def read_table(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """A CSV file's rows. Raises ExportError when it cannot be read or lacks one of the columns."""
    try:
        table = pd.read_csv(path)
    except (OSError, ValueError) as e:
        raise ExportError(f"{path} cannot be read as CSV: {e}") from None
    for column in columns:
        if column not in table:
            raise ExportError(f"{path} has no column {column!r}; it has {', '.join(table.columns)}")
    return table


def load_skops(path: Path, trusted: tuple[str, ...] = ()) -> Any:
    """A model from a skops file. Types beyond skops' own safe list must be named in `trusted`.

    Raises:
        ExportError: it is no skops file, or holds types that are not trusted.
    """
    import skops.io

    accepted = (*HARMLESS, *trusted)
    try:
        found = skops.io.get_untrusted_types(file=path)
    except (OSError, BadZipFile, KeyError, ValueError) as e:
        raise ExportError(f"{path} cannot be read as a skops file: {e}") from None
    unknown = [t for t in found if t not in accepted]
    if unknown:
        raise ExportError(
            f"{path.name} holds types that are not trusted: {', '.join(unknown)}; "
            "name them with --trust after a look at what they are"
        )
    return skops.io.load(path, trusted=list(accepted))
