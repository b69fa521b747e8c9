"""Retrieval's figures through gRPC: SciFact nDCG@10 and XQuAD recall@5 with extraction's F1.

    python -m benchmarks.retrieval_quality

Needs the data folder (FOREBAY_DATA, or ../shared/data) and the starter model minilm.
"""

from __future__ import annotations

import collections
import csv
import gzip
import json
import re
import string
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
from forebay.v1 import collection_pb2 as cpb
from forebay.v1 import collection_pb2_grpc, knowledge_pb2_grpc
from forebay.v1 import knowledge_pb2 as kpb
from forebay_server.knowledge.evaluation import Judged, figure, ndcg, recall
from google.protobuf import json_format

from benchmarks.common import RESULTS, machine
from benchmarks.retrieval_server import running

LANGUAGES = ("en", "de", "es", "ar", "zh", "ru")
#: Questions per language that are answered by extraction.
ASKED = 300


def scifact(channel: grpc.Channel, data: Path) -> dict[str, dict[str, float]]:
    """nDCG@10 and recall@10 of the 300 test queries, by mode."""
    folder = data / "retrieval" / "scifact"
    with gzip.open(folder / "corpus.jsonl.gz", "rt") as file:
        corpus = [json.loads(line) for line in file]
    with (folder / "queries.jsonl").open() as file:
        queries = {str(q["_id"]): q["text"] for q in map(json.loads, file)}
    relevant: dict[str, set[str]] = {}
    with (folder / "qrels_test.tsv").open() as file:
        for row in csv.DictReader(file, delimiter="\t"):
            if int(row["score"]) > 0:
                relevant.setdefault(row["query-id"], set()).add(row["corpus-id"])
    stub = collection_pb2_grpc.CollectionServiceStub(channel)
    request = cpb.CreateCollectionRequest(collection="scifact")
    config = {"embedding_model": "minilm", "text_fields": [{"path": "text", "language": "en"}]}
    json_format.ParseDict(config, request.config)
    stub.CreateCollection(request)
    began = time.monotonic()
    for start in range(0, len(corpus), 500):
        upsert = cpb.UpsertPointsRequest(collection="scifact")
        for d in corpus[start : start + 500]:
            point = upsert.points.add(id=str(d["_id"]))
            point.payload.update({"text": f"{d.get('title', '')} {d['text']}".strip()})
        stub.UpsertPoints(upsert)
    took = time.monotonic() - began
    out: dict[str, dict[str, float]] = {"ingest": {"documents_per_s": len(corpus) / took}}
    weighted = {"method": "FUSION_METHOD_WEIGHTED"}
    modes = {
        "bm25": {"mode": "SEARCH_MODE_KEYWORD"},
        "dense": {"mode": "SEARCH_MODE_DENSE"},
        "hybrid rrf": {"mode": "SEARCH_MODE_HYBRID", "candidates": 100},
        "hybrid weighted": {"mode": "SEARCH_MODE_HYBRID", "candidates": 100, "fusion": weighted},
    }
    for name, extra in modes.items():

        def one(query: str, extra=extra) -> Judged:
            search = json_format.ParseDict(extra, cpb.SearchRequest())
            search.collection, search.text, search.limit = "scifact", queries[query], 10
            search.with_payload = False
            hits = stub.Search(search).hits
            mine = relevant[query]
            return Judged(tuple(h.id in mine for h in hits), len(mine))

        with ThreadPoolExecutor(16) as pool:
            judged = list(pool.map(one, relevant))
        quality = figure("ndcg@10", [ndcg(j, 10) for j in judged], 0)
        out[name] = {
            "ndcg@10": quality.value,
            "low": quality.low,
            "high": quality.high,
            "recall@10": sum(recall(j, 10) for j in judged) / len(judged),
        }
        print(name, out[name], flush=True)
    return out


def xquad(channel: grpc.Channel, data: Path, language: str) -> dict[str, float]:
    """A knowledge base of the language's 240 paragraphs, asked the 1,190 questions."""
    path = data / "qa" / (f"xquad.{language}.json" + ("" if language == "en" else ".gz"))
    raw = path.read_bytes()
    articles = json.loads(gzip.decompress(raw) if path.suffix == ".gz" else raw)["data"]
    paragraphs = [p for a in articles for p in a["paragraphs"]]
    stub = knowledge_pb2_grpc.KnowledgeServiceStub(channel)
    base = f"xquad-{language}"
    request = kpb.CreateKnowledgeBaseRequest(knowledge_base=base)
    request.config.language = language
    stub.CreateKnowledgeBase(request)
    began = time.monotonic()
    for i, p in enumerate(paragraphs):
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
        (q["question"], q["answers"][0]["text"], f"p{i}.txt")
        for i, p in enumerate(paragraphs)
        for q in p["qas"]
    ]

    def found(question: tuple[str, str, str]) -> float:
        ask = kpb.RetrieveRequest(knowledge_base=base, query=question[0])
        ask.retrieval.top_k = 5
        return float(any(c.name == question[2] for c in stub.Retrieve(ask).chunks))

    def answered(question: tuple[str, str, str]) -> tuple[float, float, float, float]:
        ask = kpb.AskRequest(knowledge_base=base, question=question[0], max_sentences=1)
        answer = stub.Ask(ask)
        text = answer.citations[0].quote if answer.citations else ""
        verified = float(all(c.verified for c in answer.citations))
        return (*scores(text, question[1]), float(question[1] in text), verified)

    with ThreadPoolExecutor(8) as pool:
        hits = list(pool.map(found, questions))
        step = max(1, len(questions) // ASKED)
        answers = list(pool.map(answered, questions[::step][:ASKED]))
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


def scores(given: str, gold: str) -> tuple[float, float]:
    """SQuAD's exact match and F1; by letters for Chinese."""

    def words(text: str) -> list[str]:
        text = "".join(c for c in text.lower() if c not in string.punctuation)
        text = re.sub(r"\b(a|an|the)\b", " ", text)
        return re.findall(r"[\u4e00-\u9fff]|[^\s\u4e00-\u9fff]+", text)

    a, b = words(given), words(gold)
    same = sum((collections.Counter(a) & collections.Counter(b)).values())
    if not same:
        return float(a == b), 0.0
    precision, recalled = same / len(a), same / len(b)
    return float(a == b), 2 * precision * recalled / (precision + recalled)


def main() -> None:
    """Measure what the arguments name (default: all), keep it beside what was measured before."""
    wanted = sys.argv[1:] or ["scifact", *LANGUAGES]
    kept = RESULTS / "retrieval_quality.json"
    results: dict = json.loads(kept.read_text()) if kept.exists() else {"scifact": {}, "xquad": {}}
    with tempfile.TemporaryDirectory() as folder, running(Path(folder)) as (channel, data):
        for name in wanted:
            if name == "scifact":
                results["scifact"] = scifact(channel, data)
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
        "Through gRPC; model minilm (fp32). `python -m benchmarks.retrieval_quality`.",
        "",
        "## SciFact, 300 test queries, 5,183 abstracts",
        "",
        "| search | nDCG@10 | 95% interval | recall@10 |",
        "|---|---|---|---|",
    ]
    for name, r in results["scifact"].items():
        if "ndcg@10" in r:
            lines.append(
                f"| {name} | {r['ndcg@10']:.4f} | {r['low']:.3f} to {r['high']:.3f} "
                f"| {r['recall@10']:.3f} |"
            )
    lines += [
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
        "An extracted answer is a whole sentence, so exact match with a short gold answer is rare; "
        "the fifth column is what counts. minilm is an English model: other languages lean on BM25.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
