"""scikit-learn to ONNX: held equal, refused when unequal; skops and joblib."""

from __future__ import annotations

import json
import tempfile
import uuid
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import pytest
import skops.io
from forebay_cli.main import app
from forebay_exporters.artefact import ExportError
from forebay_exporters.joblib_sandbox import joblib_to_skops
from forebay_exporters.parity import Bounds, report
from forebay_exporters.sklearn_export import export_sklearn, load_skops
from forebay_exporters.starters import tables
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import (
    GradientBoostingClassifier,
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    RandomForestRegressor,
)
from sklearn.impute import SimpleImputer
from sklearn.linear_model import Ridge
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from typer.testing import CliRunner

from tests.conftest import data_folder


@pytest.fixture
def table() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {"size": rng.normal(80, 20, 300), "rooms": rng.integers(1, 6, 300).astype(float)}
    )
    frame["town"] = rng.choice(["Bath", "York", ""], 300)
    frame.loc[::7, "size"] = np.nan
    return frame


def mixed(final) -> Pipeline:
    parts = ColumnTransformer(
        [
            ("numbers", make_pipeline(SimpleImputer(), StandardScaler()), ["size", "rooms"]),
            ("town", OneHotEncoder(handle_unknown="ignore"), ["town"]),
        ]
    )
    return Pipeline([("parts", parts), ("final", final)])


def test_a_pipeline_with_gaps_and_categories_is_the_same_in_onnx(
    table: pd.DataFrame, tmp_path: Path
) -> None:
    target = table["rooms"] * 1000 + table["town"].str.len() * 50
    model = mixed(Ridge()).fit(table, target)
    folder = export_sklearn(model, table, tmp_path, "prices", target=target)
    manifest = json.loads((folder / "manifest.json").read_text())
    features = {f["name"]: f for f in manifest["tabular"]["features"]}
    assert features["size"]["nullable"]
    assert not features["rooms"]["nullable"]
    assert features["town"]["categories"] == ["Bath", "York"]
    metric = manifest["parity"]["task_metric"]
    assert metric["exported"] == pytest.approx(metric["original"], abs=1e-4)
    with pytest.raises(ExportError, match="already"):
        export_sklearn(model, table, tmp_path, "prices")


def test_ranges_are_those_of_the_rows_that_describe_not_of_the_sample(
    table: pd.DataFrame, tmp_path: Path
) -> None:
    train, held = table.iloc[:200], table.iloc[200:].copy()
    held.loc[held.index[1], "rooms"] = 99.0
    model = mixed(Ridge()).fit(train, train["rooms"])
    folder = export_sklearn(model, held, tmp_path, "m", describing=train)
    manifest = json.loads((folder / "manifest.json").read_text())
    rooms = {f["name"]: f for f in manifest["tabular"]["features"]}["rooms"]
    assert (rooms["min"], rooms["max"]) == (train["rooms"].min(), train["rooms"].max())
    assert manifest["parity"]["samples"] == len(held)
    with pytest.raises(ExportError, match="columns"):
        export_sklearn(model, held, tmp_path, "n", describing=train[["rooms", "size", "town"]])


def test_the_housing_model_says_the_ranges_of_its_training_rows(tmp_path: Path) -> None:
    folder = data_folder()
    if folder is None:
        pytest.skip("no data folder: set FOREBAY_DATA, or put it at ../shared/data")
    found = tables.housing_data(folder, tmp_path)
    assert found is not None
    rows = found[0].iloc[tables.split(len(found[0]))[0]]
    made = tables.make_housing(tmp_path, tmp_path, folder, lambda *_: None)
    manifest = json.loads((made / "manifest.json").read_text())
    for feature in manifest["tabular"]["features"]:
        column = rows[feature["name"]]
        if feature["type"] == "number":
            assert (feature["min"], feature["max"]) == (column.min(), column.max()), feature
        assert feature["nullable"] == bool(column.isna().any()), feature


def test_a_classifier_keeps_classes_and_probabilities(table: pd.DataFrame, tmp_path: Path) -> None:
    label = np.where(table["rooms"] > 3, "large", "small")
    model = mixed(GradientBoostingClassifier(n_estimators=20)).fit(table, label)
    folder = export_sklearn(model, table, tmp_path, "kinds", target=label)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["tabular"]["classes"] == ["large", "small"]
    assert manifest["parity"]["max_abs_diff"] < 1e-3


def test_bounds_that_are_missed_fail_the_export_and_leave_nothing(
    table: pd.DataFrame, tmp_path: Path
) -> None:
    model = mixed(Ridge()).fit(table, table["rooms"])
    with pytest.raises(ExportError, match="not the model"):
        export_sklearn(model, table, tmp_path, "m", bounds=Bounds(max_abs_diff=-1.0))
    assert not list((tmp_path / "m").iterdir())


def test_nan_is_out_of_bounds() -> None:
    with pytest.raises(ExportError):
        report(np.array([1.0]), np.array([np.nan]), Bounds(max_abs_diff=1.0))


def test_skops_types_must_be_trusted(table: pd.DataFrame, tmp_path: Path) -> None:
    model = mixed(Ridge()).fit(table, table["rooms"])
    skops.io.dump(model, tmp_path / "m.skops")
    loaded = load_skops(tmp_path / "m.skops")
    assert np.allclose(loaded.predict(table), model.predict(table))


@pytest.mark.parametrize(
    ("model", "data", "said"),
    [
        ("junk", "rows", "junk.skops cannot be read as a skops file"),
        ("missing", "rows", "missing.skops cannot be read as a skops file"),
        ("good", "missing", "missing.csv cannot be read as CSV"),
        ("good", "other", "other.csv has no column 'price'; it has rooms, area"),
    ],
)
def test_files_that_cannot_be_read_are_named_in_one_line(
    tmp_path: Path, model: str, data: str, said: str
) -> None:
    (tmp_path / "rows.csv").write_text("rooms,price\n1,2\n2,4\n3,6\n")
    (tmp_path / "other.csv").write_text("rooms,area\n1,2\n")
    (tmp_path / "junk.skops").write_text("no archive")
    skops.io.dump(Ridge().fit([[1.0], [2.0]], [1.0, 2.0]), tmp_path / "good.skops")
    command = ["export", "sklearn", str(tmp_path / f"{model}.skops"), "--name", "m"]
    command += ["--data", str(tmp_path / f"{data}.csv"), "--target", "price"]
    run = CliRunner().invoke(app, [*command, "--models", str(tmp_path)])
    assert run.exit_code == 1, run.output
    assert said in run.output
    assert len(run.output.strip().splitlines()) == 1


class Evil:
    """A pickle that runs a command."""

    def __reduce__(self):
        import os

        return os.system, ("touch /tmp/forebay-evil-was-here; exit 3",)


def test_joblib_is_read_in_a_sandbox_only(table: pd.DataFrame, tmp_path: Path) -> None:
    model = mixed(Ridge()).fit(table, table["rooms"])
    joblib.dump(model, tmp_path / "m.joblib")
    loaded = load_skops(joblib_to_skops(tmp_path / "m.joblib"))
    assert np.allclose(loaded.predict(table), model.predict(table))
    joblib.dump(Evil(), tmp_path / "evil.joblib")
    mark = Path("/tmp/forebay-evil-was-here")
    mark.unlink(missing_ok=True)
    joblib_to_skops_result = None
    try:
        joblib_to_skops_result = joblib_to_skops(tmp_path / "evil.joblib")
    except ExportError:
        pass  # as good: what counts is that the command did not run
    assert not mark.exists(), joblib_to_skops_result


def test_a_bare_estimator_of_numbers_takes_them_as_one_matrix(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = pd.DataFrame(rng.normal(size=(200, 3)), columns=["a", "b", "c"])
    truth = rows["a"] * 2 - rows["c"]
    forest = RandomForestRegressor(5, random_state=0).fit(rows, truth)
    path = export_sklearn(forest, rows, tmp_path, "forest", 1, target=truth)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["tabular"]["layout"] == "matrix"
    assert [i["shape"] for i in manifest["inputs"]] == [[-1, 3]]


@pytest.mark.parametrize("kind", [HistGradientBoostingClassifier, HistGradientBoostingRegressor])
def test_histogram_based_boosting_keeps_its_ways_for_missing_values(
    kind: type, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    rows = pd.DataFrame(rng.normal(size=(300, 3)), columns=["a", "b", "c"])
    truth = rows["a"] * 2 - rows["c"]
    rows.loc[::5, "a"] = np.nan
    if kind is HistGradientBoostingClassifier:
        truth = (truth > 0).astype(int)
    model = kind(max_iter=20).fit(rows, truth)
    path = export_sklearn(model, rows, tmp_path, "boosted", 1, target=truth)
    manifest = json.loads((path / "manifest.json").read_text())
    assert [f["nullable"] for f in manifest["tabular"]["features"]] == [True, False, False]


class Call:
    """Unpickling it calls a function: what a pickle may do."""

    def __init__(self, function, *args) -> None:
        self.it = function, args

    def __reduce__(self):
        return self.it


def test_the_sandbox_neither_writes_nor_reads_beyond_its_folder(tmp_path: Path) -> None:
    mark = Path(tempfile.gettempdir()) / f"forebay-written-{uuid.uuid4().hex}"
    for name, call in (
        ("write", Call(Path.write_text, mark, "x")),
        ("make", Call(Path.mkdir, mark)),
        ("read", Call(Path.read_text, Path("/etc/passwd"))),
    ):
        joblib.dump(call, tmp_path / f"{name}.joblib")
        with pytest.raises(ExportError, match="Permission denied"):
            joblib_to_skops(tmp_path / f"{name}.joblib")
    assert not mark.exists()


def test_a_failed_export_keeps_its_report(table: pd.DataFrame, tmp_path: Path) -> None:
    model = mixed(Ridge()).fit(table, table["rooms"])
    with pytest.raises(ExportError, match=r"\.failed/m-1\.json"):
        export_sklearn(model, table, tmp_path, "m", 1, bounds=Bounds(max_abs_diff=-1.0))
    kept = json.loads((tmp_path / ".failed" / "m-1.json").read_text())
    assert kept["samples"] == len(table)
    assert kept["faults"]
