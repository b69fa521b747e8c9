"""nDCG@10 on SciFact (Wadden et al. 2020, as BEIR has it): what a precision costs in retrieval."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forebay_exporters.artefact import ExportError

FILES = ("corpus.jsonl.gz", "queries.jsonl", "qrels_test.tsv")
#: Texts to unit vectors [texts, dimensions].
Embed = Callable[[Sequence[str]], NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents and the test queries by id, and which documents are relevant to which query."""

    documents: dict[str, str]
    queries: dict[str, str]
    relevant: dict[str, set[str]]


def read(folder: Path) -> Corpus:
    """The test split. Raises ExportError naming the file that is missing."""
    for name in FILES:
        if not (folder / name).exists():
            raise ExportError(f"{folder} has no {name}; SciFact has {', '.join(FILES)}")
    with gzip.open(folder / FILES[0], "rt", encoding="utf-8") as file:
        rows: list[dict[str, Any]] = [json.loads(line) for line in file]
    documents = {str(d["_id"]): f"{d.get('title', '')} {d['text']}".strip() for d in rows}
    relevant: dict[str, set[str]] = {}
    with (folder / FILES[2]).open(encoding="utf-8") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            if int(row["score"]) > 0:
                relevant.setdefault(row["query-id"], set()).add(row["corpus-id"])
    with (folder / FILES[1]).open(encoding="utf-8") as file:
        asked = {str(q["_id"]): str(q["text"]) for q in map(json.loads, file)}
    return Corpus(documents, {q: asked[q] for q in relevant}, relevant)


def score(embed: Embed, corpus: Corpus) -> dict[str, float]:
    """nDCG@10 and recall@10 by exact search, with the 95% interval of the first."""
    from forebay_server.knowledge.evaluation import Judged, figure, ndcg, recall

    names = list(corpus.documents)
    documents = embed(list(corpus.documents.values()))
    queries = embed(list(corpus.queries.values()))
    judged = []
    for query, scores in zip(corpus.queries, queries @ documents.T, strict=True):
        mine = corpus.relevant[query]
        best = np.argsort(-scores, kind="stable")[:10]
        judged.append(Judged(tuple(names[i] in mine for i in best), len(mine)))
    found = figure("ndcg@10", [ndcg(j, 10) for j in judged], 0)
    return {
        "ndcg@10": found.value,
        "low": found.low,
        "high": found.high,
        "recall@10": float(np.mean([recall(j, 10) for j in judged])),
    }
