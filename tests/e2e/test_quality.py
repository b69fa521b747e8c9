"""The served models are as good as their offline originals, on real data."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
from forebay.v1 import (
    classification_pb2,
    classification_pb2_grpc,
    tabular_pb2,
    tabular_pb2_grpc,
)

from tests.conftest import KEPT, Live, Start, copy_models


class Sentences(NamedTuple):
    """Labelled sentences, and what the offline model says of them."""

    texts: list[str]
    truth: np.ndarray
    offline: np.ndarray


class Houses(NamedTuple):
    """Held rows, and how well the offline model knows them."""

    rows: pd.DataFrame
    values: pd.Series
    offline: float


@pytest.fixture(scope="module")
def sentences(data: Path, starters: Path) -> Sentences:
    from forebay_exporters.starters import minilm

    with (data / "sentiment" / "sst_dev.tsv").open(encoding="utf-8") as file:
        rows = [
            r for r in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if r["label2"]
        ]
    texts = [r["sentence"] for r in rows]
    source = minilm.weights(KEPT / "cache", lambda *_: None)
    logits = minilm.embed(starters / "sentiment" / "1" / "model.onnx", source, texts)
    truth = np.array([r["label2"] == "1" for r in rows])
    return Sentences(texts, truth, logits[:, 2] > logits[:, 0])


@pytest.fixture(scope="module")
def houses(data: Path) -> Houses:
    from forebay_exporters.sklearn_export import r2
    from forebay_exporters.starters import tables

    with gzip.open(data / "tabular" / "california_housing.csv.gz") as file:
        table = pd.read_csv(file)
    target = table.pop("median_house_value")
    train, held = tables.split(len(table))
    model = tables.regressor(table).fit(table.iloc[train], target.iloc[train])
    sample, values = table.iloc[held], target.iloc[held]
    return Houses(sample, values, r2(values, model.predict(sample)))


@pytest.fixture(scope="module")
def live(starters: Path, start: Start, tmp_path_factory: pytest.TempPathFactory) -> Live:
    return start(copy_models(starters, tmp_path_factory.mktemp("models"), "sentiment", "housing"))


def test_sentiment_on_sst_dev_equals_the_offline_model(live: Live, sentences: Sentences) -> None:
    texts, truth, offline = sentences
    stub = classification_pb2_grpc.ClassificationServiceStub(live.channel)
    answer = stub.Classify(classification_pb2.ClassifyRequest(texts=texts))
    scores = [{x.label: x.score for x in r.labels} for r in answer.results]
    served = np.array([s["positive"] > s["negative"] for s in scores])
    accuracy = float((served == truth).mean())
    print(f"sentiment on {len(texts)} SST dev sentences: {accuracy:.4f}")
    assert accuracy > 0.8
    # Dynamic int8 ranges depend on the batch, so single answers at the border may differ.
    assert accuracy == pytest.approx(float((offline == truth).mean()), abs=0.01)


def test_housing_r2_on_held_rows_equals_the_offline_model(live: Live, houses: Houses) -> None:
    from forebay_exporters.sklearn_export import r2

    request = tabular_pb2.PredictRequest(model="housing")
    for name in houses.rows:
        if name == "ocean_proximity":
            request.columns.add(name=name, strings=houses.rows[name])
        else:
            request.columns.add(name=name, numbers=houses.rows[name])
    stub = tabular_pb2_grpc.TabularServiceStub(live.channel)
    values = [p.value for p in stub.Predict(request).predictions]
    served, offline = r2(houses.values, values), houses.offline
    print(f"housing R2 on {len(values)} held rows: served {served:.4f}, offline {offline:.4f}")
    assert served == pytest.approx(offline, abs=0.001)
