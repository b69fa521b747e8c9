"""The served models are as good as their offline originals, on real data."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from forebay.v1 import (
    classification_pb2,
    classification_pb2_grpc,
    tabular_pb2,
    tabular_pb2_grpc,
)

from tests.conftest import KEPT, Live


def test_sentiment_on_sst_dev_equals_the_offline_model(live: Live, data: Path) -> None:
    from forebay_exporters.starters import minilm

    with (data / "sentiment" / "sst_dev.tsv").open(encoding="utf-8") as file:
        rows = [
            r for r in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if r["label2"]
        ]
    texts = [r["sentence"] for r in rows]
    truth = np.array([r["label2"] == "1" for r in rows])
    stub = classification_pb2_grpc.ClassificationServiceStub(live.channel)
    answer = stub.Classify(classification_pb2.ClassifyRequest(texts=texts))
    scores = [{x.label: x.score for x in r.labels} for r in answer.results]
    served = np.array([s["positive"] > s["negative"] for s in scores])
    source = minilm.weights(KEPT / "cache", lambda *_: None)
    model = KEPT / "models" / "sentiment" / "1" / "model.onnx"
    logits = minilm.embed(model, source, texts)
    offline = logits[:, 2] > logits[:, 0]
    accuracy = float((served == truth).mean())
    print(f"sentiment on {len(rows)} SST dev sentences: {accuracy:.4f}")
    assert accuracy > 0.8
    # Dynamic int8 ranges depend on the batch, so single answers at the border may differ.
    assert accuracy == pytest.approx(float((offline == truth).mean()), abs=0.01)


def test_housing_r2_on_held_rows_equals_the_offline_model(live: Live, data: Path) -> None:
    from forebay_exporters.sklearn_export import r2
    from forebay_exporters.starters import tables

    with gzip.open(data / "tabular" / "california_housing.csv.gz") as file:
        table = pd.read_csv(file)
    target = table.pop("median_house_value")
    train, held = tables.split(len(table))
    model = tables.regressor(table).fit(table.iloc[train], target.iloc[train])
    offline = r2(target.iloc[held], model.predict(table.iloc[held]))
    request = tabular_pb2.PredictRequest(model="housing")
    sample = table.iloc[held]
    for name in sample:
        if name == "ocean_proximity":
            request.columns.add(name=name, strings=sample[name])
        else:
            request.columns.add(name=name, numbers=sample[name])
    stub = tabular_pb2_grpc.TabularServiceStub(live.channel)
    values = [p.value for p in stub.Predict(request).predictions]
    served = r2(target.iloc[held], values)
    print(f"housing R2 on {len(values)} held rows: served {served:.4f}, offline {offline:.4f}")
    assert served == pytest.approx(offline, abs=0.001)
