"""Fit the head of knowledge/spans.py on the English XQuAD articles with odd numbers.

    python tools/train_span_head.py ../shared/data/qa/xquad.en.json

Prints exact match and F1 on the articles with even numbers, given the right sentence.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from forebay_server.knowledge import spans
from forebay_server.knowledge.evaluation import exact_match, f1
from forebay_server.knowledge.sentences import sentence_spans

#: Steps of gradient descent, its rate, and the weight of the squared weights.
STEPS, RATE, DECAY = 400, 0.5, 3e-4


def cases(path: Path, parity: int) -> list[tuple[str, str, list[str], int, int]]:
    """(question, sentence, answers, start, end) of articles whose number has this parity."""
    out = []
    for number, article in enumerate(json.loads(path.read_text())["data"]):
        if number % 2 != parity:
            continue
        for paragraph in article["paragraphs"]:
            text = paragraph["context"]
            for qa in paragraph["qas"]:
                answer = qa["answers"][0]
                at, end = answer["answer_start"], answer["answer_start"] + len(answer["text"])
                for a, b in sentence_spans(text):
                    if a <= at and end <= b:
                        right = [x["text"] for x in qa["answers"]]
                        out.append((qa["question"], text[a:b], right, at - a, end - a))
    return out


def main() -> None:
    """Fit, write, measure."""
    path = Path(sys.argv[1])
    groups = []
    for question, sentence, _, start, end in cases(path, 1):
        words = spans.words_of(sentence)[:80]
        runs = spans.candidates(words)
        found = [spans.trimmed(sentence, words[i][0], words[j][1]) for i, j in runs]
        if (start, end) in found:
            x = spans.features(question, sentence, words, "en")
            groups.append((x, found.index((start, end))))
    weights = np.zeros(groups[0][0].shape[1], np.float32)
    momentum = np.zeros_like(weights)
    for _ in range(STEPS):
        gradient = np.zeros_like(weights)
        for x, right in groups:
            scores = x @ weights
            p = np.exp(scores - scores.max())
            p /= p.sum()
            gradient += x[right] - p @ x
        momentum = 0.9 * momentum + gradient / len(groups) - DECAY * weights
        weights += RATE * momentum
    out = Path(spans.__file__).with_name("span_head.json")
    out.write_text(json.dumps([round(float(w), 4) for w in weights]) + "\n")
    spans._weights.cache_clear()
    for parity, name in ((1, "fitted on"), (0, "others")):
        exact, overlap, n = 0.0, 0.0, 0
        for question, sentence, right, _, _ in cases(path, parity):
            place = spans.answer_span(question, sentence, "en")
            given = sentence[slice(*place)] if place else ""
            exact, overlap, n = exact + exact_match(given, right), overlap + f1(given, right), n + 1
        print(f"{name}: {n} questions, exact match {exact / n:.3f}, F1 {overlap / n:.3f}")


if __name__ == "__main__":
    main()
