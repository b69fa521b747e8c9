"""Our keyword index beside bm25s, tantivy and rank-bm25 on SciFact: build, query, update, scores.

pip install bm25s tantivy rank-bm25 && python -m benchmarks.keyword_libraries
"""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path

import numpy as np
from forebay_server.indexes.analysis import Analyzer
from forebay_server.indexes.keyword import KeywordIndex

from benchmarks.retrieval_server import data_folder

RESULTS = Path(__file__).parent / "results"


def timed(work) -> tuple[float, object]:
    """Seconds and value."""
    began = time.perf_counter()
    out = work()
    return time.perf_counter() - began, out


def main() -> None:
    """Measure, write, print."""
    import bm25s
    import tantivy
    from rank_bm25 import BM25Plus

    folder = data_folder() / "retrieval" / "scifact"
    with gzip.open(folder / "corpus.jsonl.gz", "rt") as file:
        texts = [f"{d.get('title', '')} {d['text']}" for d in map(json.loads, file)]
    with (folder / "queries.jsonl").open() as file:
        queries = [json.loads(line)["text"] for line in file][:300]
    terms = Analyzer("en").terms
    documents = [terms(t) for t in texts]
    asked = [terms(q) for q in queries]
    n = len(texts)
    rows = []

    build, oracle = timed(lambda: BM25Plus(documents, k1=1.2, b=0.75, delta=0))
    query, truth = timed(lambda: [oracle.get_scores(q) for q in asked])
    rows.append(("rank-bm25", build, query, "build anew", "oracle"))

    ours = KeywordIndex("en")
    build, _ = timed(
        lambda: [
            ours.append(range(i, min(n, i + 500)), texts[i : i + 500], np.ones(i, bool))
            for i in range(0, n, 500)
        ]
    )
    query, found = timed(lambda: [ours.score(q, n)[0] for q in queries])
    worst = max(float(np.abs(a - b).max()) for a, b in zip(found, truth, strict=True))
    update, _ = timed(lambda: ours.append([n], [texts[0]], np.ones(n, bool)))
    rows.append(("forebay", build, query, f"{update * 1e3:.1f} ms", f"{worst:.1e}"))

    def of_bm25s() -> bm25s.BM25:
        made = bm25s.BM25(method="bm25+", k1=1.2, b=0.75, delta=0)
        made.index(documents, show_progress=False)
        return made

    build, index = timed(of_bm25s)
    query, found = timed(lambda: [index.get_scores(q) for q in asked])
    worst = max(float(np.abs(a - b).max()) for a, b in zip(found, truth, strict=True))
    rows.append(("bm25s", build, query, "build anew", f"{worst:.1e}"))

    def of_tantivy() -> tantivy.Index:
        schema = tantivy.SchemaBuilder()
        schema.add_text_field("text", stored=False, tokenizer_name="whitespace")
        made = tantivy.Index(schema.build())
        writer = made.writer(50_000_000, 1)
        for d in documents:
            writer.add_document(tantivy.Document(text=" ".join(d)))
        writer.commit()
        made.reload()
        return made

    build, index = timed(of_tantivy)
    searcher = index.searcher()

    def ask(words: list[str]) -> object:
        parts = [
            (tantivy.Occur.Should, tantivy.Query.term_query(index.schema, "text", w)) for w in words
        ]
        return searcher.search(tantivy.Query.boolean_query(parts), 10)

    query, _ = timed(lambda: [ask(q) for q in asked])
    writer = index.writer(50_000_000, 1)

    def add_one() -> None:
        writer.add_document(tantivy.Document(text=" ".join(documents[0])))
        writer.commit()
        index.reload()

    update, _ = timed(add_one)
    rows.append(
        ("tantivy", build, query, f"{update * 1e3:.1f} ms", "lengths in one byte: not equal")
    )
    lines = [
        "# Keyword libraries on SciFact",
        "",
        f"{n} abstracts, {len(queries)} queries; one thread. Ours analyses the text itself in both columns.",
        "",
        "| library | build, s | query, ms | one more document | greatest difference of a score |",
        "|---|---|---|---|---|",
    ]
    for name, b, q, u, d in rows:
        lines.append(f"| {name} | {b:.2f} | {q / len(queries) * 1e3:.2f} | {u} | {d} |")
    text = "\n".join(lines) + "\n"
    (RESULTS / "keyword_libraries.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
