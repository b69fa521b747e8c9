"""BM25 against rank_bm25 on a real corpus, and under updates."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import numpy as np
import pytest
from forebay_server.indexes.analysis import Analyzer
from forebay_server.indexes.keyword import KeywordIndex
from rank_bm25 import BM25Plus


@pytest.fixture(scope="module")
def scifact(data: Path) -> tuple[list[str], list[str]]:
    """Abstracts and claims."""
    folder = data / "retrieval" / "scifact"
    with gzip.open(folder / "corpus.jsonl.gz", "rt") as file:
        corpus = [json.loads(line) for line in file]
    with (folder / "queries.jsonl").open() as file:
        queries = [json.loads(line)["text"] for line in file]
    return [f"{d.get('title', '')} {d['text']}" for d in corpus], queries


def filled(texts: list[str], language: str = "en", step: int = 100) -> KeywordIndex:
    index = KeywordIndex(language)
    for start in range(0, len(texts), step):
        part = texts[start : start + step]
        index.append(range(start, start + len(part)), part, np.ones(start, bool))
    return index


def oracle(texts: list[str], language: str = "en") -> BM25Plus:
    terms = Analyzer(language).terms
    return BM25Plus([terms(t) for t in texts], k1=1.2, b=0.75, delta=0)


def test_scores_are_those_of_rank_bm25(scifact: tuple[list[str], list[str]]) -> None:
    texts, queries = scifact
    ours, theirs = filled(texts), oracle(texts)
    terms = Analyzer("en").terms
    for query in queries[:100]:
        scores, hit = ours.score(query, len(texts))
        expected = theirs.get_scores(terms(query))
        np.testing.assert_allclose(scores, expected, atol=1e-6)
        assert hit.sum() == (expected != 0).sum()


def test_words_that_nearly_all_documents_hold(scifact) -> None:
    texts = scifact[0][:300]
    ours, theirs = filled(texts, ""), oracle(texts, "")  # no stop words: `the` is in nearly all
    scores, _ = ours.score("the of protein", len(texts))
    np.testing.assert_allclose(scores, theirs.get_scores(["the", "of", "protein"]), atol=1e-6)


def test_scores_stay_exact_under_random_writes_and_removals(scifact) -> None:
    texts, queries = scifact
    chance = random.Random(7)
    index, alive, written = KeywordIndex("en"), np.zeros(0, bool), []
    for _ in range(60):
        dead = [s for s in np.flatnonzero(alive).tolist() if chance.random() < 0.05]
        alive[dead] = False
        index.delete(dead)
        new = [chance.choice(texts) for _ in range(chance.randint(1, 25))]
        index.append(range(len(written), len(written) + len(new)), new, alive)
        written += new
        alive = np.concatenate([alive, np.ones(len(new), bool)])
    slots = np.flatnonzero(alive)
    theirs = oracle([written[s] for s in slots])
    for query in queries[:20]:
        scores, _ = index.score(query, len(written))
        expected = theirs.get_scores(Analyzer("en").terms(query))
        np.testing.assert_allclose(scores[slots], expected, atol=1e-6)
    arrays, vocabulary = index.state_of(index.freeze(), alive)
    again = KeywordIndex("en")
    again.restore(arrays, vocabulary)
    np.testing.assert_allclose(
        again.score(queries[0], len(written))[0][slots],
        theirs.get_scores(Analyzer("en").terms(queries[0])),
        atol=1e-6,
    )


def test_a_phrase_must_stand_word_by_word() -> None:
    index = filled(["the heart of gold", "gold of the heart", "a golden heart"], "", 1)
    _, hit = index.score('"heart of gold"', 3)
    assert hit.tolist() == [True, False, False]
    assert index.holding("gold heart", 3).tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("language", "text", "query"),
    [
        ("de", "Die Häuser der Städte", "haus"),
        ("ru", "Все люди рождаются свободными", "свободный людей"),
        ("zh", "人人生而自由,在尊严和权利上一律平等。", "尊严"),
        ("ja", "すべての人間は、生まれながらにして自由であり", "自由"),
        ("ko", "모든 인간은 태어날 때부터 자유로우며", "인간"),
        ("hi", "सभी मनुष्यों को गौरव और अधिकारों के मामले में", "अधिकारों"),
        ("ar", "يولد جميع الناس أحراراً متساوين", "الناس"),
        ("", "Ｆｕｌｌ width ﬁgures", "full figures"),
    ],
)
def test_languages_find_their_words(language: str, text: str, query: str) -> None:
    index = filled([text, "something else"], language)
    scores, hit = index.score(query, 2)
    assert hit.tolist() == [True, False] and scores[0] > 0
