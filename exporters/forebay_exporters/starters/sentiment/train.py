"""The recipe of head.safetensors: `python -m forebay_exporters.starters.sentiment.train DATA CACHE`.

Positive and negative: rt_polarity (Pang & Lee 2005, CC BY 4.0), rows of SST's train split alone.
Neutral: statements and questions that judge nothing, half from SciFact's abstracts (ODC-By 1.0), half
from CLINC150's utterances (CC BY 3.0), as many as there are of each other class. So `neutral` means
"not an opinion", which is what this data can teach; lukewarm reviews are not in it.
Multinomial logistic regression on MiniLM's unit vectors; C by five-fold cross-validation.
"""

from __future__ import annotations

import csv
import gzip
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any, cast

import numpy as np
from safetensors.numpy import save_file

from forebay_exporters.bert_graph import BertGraph
from forebay_exporters.starters import minilm
from forebay_exporters.starters.sentiment import FACTS, HEAD, LABELS

SEED = 20261124


def polarity(data: Path, split: str) -> tuple[list[str], list[int]]:
    """Sentences of a split with 0 for negative and 2 for positive."""
    texts, labels = [], []
    with gzip.open(data / "sentiment" / "rt_polarity.tsv.gz", "rt", encoding="utf-8") as file:
        for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            if row["sst_split"] == split:
                texts.append(row["sentence"])
                labels.append(2 if row["label"] == "1" else 0)
    return texts, labels


def neutral(data: Path, count: int) -> list[str]:
    """Texts that judge nothing."""
    rng = random.Random(SEED)
    facts: list[str] = []
    with gzip.open(data / "retrieval" / "scifact" / "corpus.jsonl.gz", "rt") as file:
        for line in file:
            sentences = json.loads(line)["text"].split(". ")
            facts.extend(s for s in sentences if 30 <= len(s) <= 200)
    with gzip.open(data / "intent" / "clinc150_small.json.gz", "rt") as file:
        utterances = [text for text, _ in json.load(file)["train"]]
    half = count // 2
    return rng.sample(facts, half) + rng.sample(utterances, min(count - half, len(utterances)))


def main(data: Path, cache: Path) -> None:
    """Train, evaluate, write."""
    import onnx
    from sklearn import linear_model

    source = minilm.weights(cache, lambda *_: None)
    config = json.loads((source / "config.json").read_text())
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model.onnx"
        onnx.save(BertGraph(source / "model.safetensors", config).build(), model)
        texts, labels = polarity(data, "train")
        rest = neutral(data, len(texts) // 2)
        x = minilm.embed(model, source, texts + rest)
        y = np.array(labels + [1] * len(rest))
        held, truth = polarity(data, "dev")
        x_held, y_held = minilm.embed(model, source, held), np.array(truth)
    fit = (
        cast(Any, linear_model)
        .LogisticRegressionCV(
            Cs=[1, 3, 10, 30, 100],
            cv=5,
            max_iter=2000,
            random_state=SEED,
            l1_ratios=(0,),
            scoring="accuracy",
            use_legacy_attributes=False,
        )
        .fit(x, y)
    )
    scores = fit.decision_function(x_held)
    predicted = np.where(scores[:, 2] > scores[:, 0], 2, 0)
    accuracy = float((predicted == y_held).mean())
    save_file(
        {
            "weight": fit.coef_.T.astype(np.float32).copy(),
            "bias": fit.intercept_.astype(np.float32),
        },
        str(HEAD),
    )
    facts = {
        "source": "rt_polarity (CC BY 4.0), SciFact (ODC-By 1.0), CLINC150 (CC BY 3.0)",
        "labels": LABELS,
        "metrics": {
            "accuracy_positive_negative": round(accuracy, 4),
            "held_out": f"rt_polarity, SST dev split, {len(held)} sentences",
        },
    }
    FACTS.write_text(json.dumps(facts, indent=2) + "\n")
    print(f"accuracy on {len(held)} held-out sentences: {accuracy:.4f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
