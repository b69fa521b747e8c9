"""`housing`, `iris` and `digits`: small tabular models, fitted on first start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from forebay_exporters.sklearn_export import export_sklearn, r2

Progress = Callable[[str, float], None]
SEED = 20261124
HOLD = 0.2
HOUSING_UNITS = {
    "longitude": "degrees",
    "latitude": "degrees",
    "housing_median_age": "years",
    "median_income": "10,000 USD",
}


def housing_data(data: Path | None, cache: Path) -> tuple[pd.DataFrame, Any, str] | None:
    """California housing: features, price, and where it is from; None when it cannot be had."""
    for folder in [data, cache] if data else [cache]:
        path = (folder / "tabular" / "california_housing.csv.gz") if folder else None
        if path is not None and path.exists():
            table = pd.read_csv(path)
            target: Any = table["median_house_value"]
            return table.drop(columns="median_house_value"), target, path.name
    try:
        from sklearn.datasets import fetch_california_housing

        fetched: Any = fetch_california_housing(data_home=str(cache), as_frame=True)
    except Exception:  # no network, or a mirror that is gone: there is a bundled data set
        return None
    return fetched.data, fetched.target * 100_000, "scikit-learn's download"


def split(n: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Rows to train on and rows held out, the same at every start."""
    order = np.random.default_rng(SEED).permutation(n)
    held = int(n * HOLD)
    return order[held:], order[:held]


def regressor(features: pd.DataFrame) -> Any:
    """Imputation, one-hot of strings, a random forest."""
    from sklearn.compose import ColumnTransformer
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import OneHotEncoder

    numbers = [c for c in features if pd.api.types.is_numeric_dtype(features[c])]
    strings = [c for c in features if c not in numbers]
    parts: list[Any] = [("numbers", SimpleImputer(strategy="median"), numbers)]
    if strings:
        parts.append(("strings", OneHotEncoder(handle_unknown="ignore"), strings))
    forest = RandomForestRegressor(
        n_estimators=40,
        max_depth=13,
        min_samples_leaf=5,
        max_features=0.5,
        random_state=SEED,
        n_jobs=-1,
    )
    return Pipeline([("features", ColumnTransformer(parts)), ("forest", forest)])


def make_housing(root: Path, cache: Path, data: Path | None, progress: Progress) -> Path:
    """The house-price model. Without California's data: scikit-learn's `diabetes`, saying so."""
    from sklearn.datasets import load_diabetes

    found = housing_data(data, cache)
    if found is not None:
        features, target, where = found
        what, unit = "median_house_value", "USD"
        text = "Median house price of a Californian district, random forest"
    else:
        bundled: Any = load_diabetes(as_frame=True)
        features, target, where = bundled.data, bundled.target, "scikit-learn's bundled data"
        what, unit = "disease_progression", ""
        text = "NOT house prices: the California data could not be had, this is `diabetes`"
    progress("fitting the random forest", 0.2)
    train, held = split(len(features))
    model = regressor(features).fit(features.iloc[train], target.iloc[train])
    score = r2(target.iloc[held], model.predict(features.iloc[held]))
    progress("converting it to ONNX", 0.7)
    path = export_sklearn(
        model,
        features.iloc[held],
        root,
        "housing",
        describing=features.iloc[train],
        target=target.iloc[held],
        target_name=what,
        target_unit=unit,
        description=text,
        units=HOUSING_UNITS,
        metrics={"r2": round(score, 4), "held_rows": len(held), "split_seed": SEED},
        source={"data": where},
    )
    (root / "housing" / "model.yaml").write_text("default_for: [tabular-regression]\n")
    return path


def make_classifier(root: Path, name: str, progress: Progress) -> Path:
    """`iris` or `digits`: standardised features, logistic regression."""
    from sklearn.datasets import load_digits, load_iris
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    progress(f"fitting {name}", 0.3)
    loaded: Any = (load_iris if name == "iris" else load_digits)(as_frame=True)
    features: pd.DataFrame = loaded.data
    features.columns = [c.replace(" (cm)", "").replace(" ", "_") for c in features.columns]
    target = pd.Series([str(loaded.target_names[i]) for i in loaded.target])
    train, held = split(len(features))
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(
        features.iloc[train], target.iloc[train]
    )
    accuracy = float((model.predict(features.iloc[held]) == target.iloc[held]).mean())
    path = export_sklearn(
        model,
        features.iloc[held],
        root,
        name,
        describing=features.iloc[train],
        target=target.iloc[held],
        target_name="species" if name == "iris" else "digit",
        description=f"{name} of scikit-learn, logistic regression",
        units=dict.fromkeys(features.columns, "cm") if name == "iris" else {},
        metrics={"accuracy": round(accuracy, 4), "held_rows": len(held), "split_seed": SEED},
        source={"data": "scikit-learn's bundled data"},
    )
    if name == "iris":
        (root / name / "model.yaml").write_text("default_for: [tabular-classification]\n")
    return path
