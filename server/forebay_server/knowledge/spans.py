"""The words of a sentence that answer a question by themselves: a guess by a small linear head.

The head scores runs of words by what kind of question is asked and what the run looks like: numbers,
names, its length, what stands before and after it, how far it is from the question's own words. Its
weights (span_head.json) were fitted by tools/train_span_head.py on half of the English XQuAD
articles; docs/retrieval.md says how well it does on the others.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from forebay_server.indexes.analysis import analyzer

#: Words of a candidate at most.
LONGEST = 9
_WORD = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]|[^\s\u3040-\u30ff\u4e00-\u9fff]+")
_EDGE = re.compile(r"^[^\w$€£%]+|[^\w%)]+$")
#: Words that ask, by the kind of answer. The first kind that has a match counts.
_KINDS: tuple[tuple[str, str], ...] = (
    ("count", r"\bhow (many|much|far|long|old|tall|large|big|often)\b|\bwie ?viele?\b|\bcuánt[oa]s?\b|сколько|كم|多少|几"),
    ("when", r"\bwhen\b|\b(what|which) (year|date|month|day|century|decade)\b|\bwann\b|\bjahr\b|\bcuándo\b|\baño\b|когда|году|متى|عام|年|何时|什么时候"),
    ("who", r"\bwho(m|se)?\b|\bwer|\bwe[mn]\b|\bquién(es)?\b|\bкто\b|кого|кому|من الذي|من هو|谁"),
    ("where", r"\bwhere\b|\b(what|which) (city|country|state|place|region)\b|\bwo\b|\bwohin\b|\bdónde\b|где|куда|أين|哪里|哪儿"),
    ("why", r"\bwhy\b|\bwarum\b|\bweshalb\b|\bpor qué\b|почему|لماذا|为什么"),
    ("percent", r"percent|prozent|por ?ciento|porcentaje|процент|نسبة|百分"),
    ("name", r"\bname\b|\bcalled\b|\bnamen?\b|\bllama|называ|имя|اسم|名"),
    ("which", r"\bwhich\b|\bwelche[rsnm]?\b|\bcuál(es)?\b|как(ой|ая|ое|ие)|أي|哪"),
    ("what", r"\bwhat\b|\bwas\b|\bqué\b|что|ماذا|ما |什么"),
)  # fmt: skip
_ASKING = [(name, re.compile(pattern, re.I)) for name, pattern in _KINDS]
NAMES = [name for name, _ in _KINDS] + ["other"]
_SMALL = frozenset(
    ["a", "an", "the", "of", "in", "on", "at", "by", "to", "for", "and", "or", "but", "with", "from", "as", "is", "was",
     "were", "are", "be", "been", "that", "this", "it", "its", "their", "his", "her", "der", "die", "das", "ein", "eine",
     "und", "oder", "von", "im", "am", "zu", "mit", "auf", "für", "den", "dem", "des", "el", "la", "los", "las", "un",
     "una", "de", "del", "y", "o", "en", "por", "para", "con", "que", "se", "и", "в", "на", "с", "по", "из", "для", "от",
     "к", "не", "что", "это"]
)  # fmt: skip
_BEFORE = ("in", "by", "of", "to", "the", "a", "from", "at", "on", "for", "because", "as", "is", "was", "were", "are", "and", "with", "than", "between", "called", "named", "about")  # fmt: skip
_MONTH = re.compile(r"^(jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)\w*$", re.I)
_NUMBER_WORD = re.compile(r"^(one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|\w+teen|\w+ty|hundred|thousand|million|billion|half|dozen)s?$", re.I)  # fmt: skip


def candidates(words: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Runs of words, [first, last] by index."""
    n = len(words)
    return [(i, j) for i in range(n) for j in range(i, min(n, i + LONGEST))]


def kind_of(question: str) -> int:
    """What is asked for, as an index into NAMES."""
    for i, (_, pattern) in enumerate(_ASKING):
        if pattern.search(question):
            return i
    return len(_ASKING)


def features(
    question: str, sentence: str, words: Sequence[tuple[int, int]], language: str
) -> NDArray[np.float32]:
    """[candidates, features]: what a run of words looks like, by itself and by the question's kind."""
    terms = analyzer(language).terms
    asked = set(terms(question))
    raw = [sentence[a:b] for a, b in words]
    bare = [_EDGE.sub("", w) for w in raw]
    n = len(words)
    shared = np.array([bool(asked & set(terms(w))) for w in bare], bool)
    small = np.array([w.lower() in _SMALL or not w for w in bare], bool)
    capital = np.array([w[:1].isupper() for w in bare], bool)
    digit = np.array([any(c.isdigit() for c in w) for w in bare], bool)
    number = digit | np.array([bool(_NUMBER_WORD.match(w)) for w in bare], bool)
    year = np.array([bool(re.fullmatch(r"1\d{3}s?|20\d\ds?", w)) for w in bare], bool)
    month = np.array([bool(_MONTH.match(w)) for w in bare], bool)
    stop = np.array([bool(re.search(r"[,;:.!?)。，；]$", w)) for w in raw], bool)
    opened = np.array([w[:1] in "(\"“'«「" for w in raw], bool)
    at = np.arange(n)
    near = np.abs(at[:, None] - at[shared][None, :]).min(axis=1) if shared.any() else np.full(n, n)
    weight = _counts(~small & ~shared)
    runs = candidates(words)
    base = np.zeros((len(runs), _BASE), np.float32)
    cumulative = {
        name: _counts(a) for name, a in (("shared", shared), ("small", small), ("capital", capital), ("number", number), ("year", year), ("month", month), ("stop", stop))
    }  # fmt: skip
    for k, (i, j) in enumerate(runs):
        length = j - i + 1

        def share(name: str, i: int = i, j: int = j, length: int = length) -> float:
            c = cumulative[name]
            return (c[j + 1] - c[i]) / length

        inner_stops = cumulative["stop"][j] - cumulative["stop"][i]
        distance = near[i : j + 1].min()
        before = bare[i - 1].lower() if i else "^"
        row = [
            1.0, length == 1, length == 2, length == 3, 4 <= length <= 5, length >= 6, length / LONGEST,
            share("shared"), share("shared") > 0, shared[i], shared[j], share("small"), small[i], small[j],
            share("capital"), share("capital") == 1, capital[i], capital[j], share("number"), number[i], number[j],
            share("year") > 0, share("month") > 0, "%" in raw[j] or "percent" in bare[j].lower(), inner_stops > 0, inner_stops,
            stop[j], j == n - 1, i == 0, opened[i], i > 0 and stop[i - 1], i > 0 and shared[i - 1], j + 1 < n and shared[j + 1],
            min(distance, 10) / 10, distance <= 1, distance <= 3, i / n,
            i > 0 and capital[i - 1] and capital[i], j + 1 < n and capital[j + 1] and capital[j],
            i > 0 and number[i - 1], j + 1 < n and number[j + 1] and not stop[j],
            j + 1 < n and small[j + 1], i > 0 and small[i - 1], (weight[j + 1] - weight[i]) / length,
            *(before == b for b in _BEFORE),
        ]  # fmt: skip
        base[k] = row
    kind = kind_of(question)
    out = np.zeros((len(runs), _BASE * (1 + len(NAMES))), np.float32)
    out[:, :_BASE] = base
    out[:, _BASE * (1 + kind) : _BASE * (2 + kind)] = base
    return out


_BASE = 44 + len(_BEFORE)


def _counts(flags: NDArray[np.bool_]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(flags)])


def words_of(sentence: str) -> list[tuple[int, int]]:
    """Places of a sentence's words; single letters for Chinese and Japanese."""
    return [m.span() for m in _WORD.finditer(sentence)]


def trimmed(sentence: str, start: int, end: int) -> tuple[int, int]:
    """A run without the punctuation around it."""
    piece = sentence[start:end]
    left = re.match(r"^[^\w$€£]+", piece)
    start += left.end() if left else 0
    right = re.search(r"[^\w%)]+$", sentence[start:end])
    return start, (start + right.start() if right else end)


@functools.cache
def _weights() -> NDArray[np.float32]:
    return np.array(json.loads(Path(__file__).with_name("span_head.json").read_text()), np.float32)


def answer_span(question: str, sentence: str, language: str) -> tuple[int, int] | None:
    """Where, in a sentence, the words stand that answer; None for sentences without words."""
    words = words_of(sentence)[:80]
    if not words:
        return None
    scores = features(question, sentence, words, language) @ _weights()
    i, j = candidates(words)[int(scores.argmax())]
    start, end = trimmed(sentence, words[i][0], words[j][1])
    return (start, end) if end > start else None


Span = Callable[[str, str, str], tuple[int, int] | None]
