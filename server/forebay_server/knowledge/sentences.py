"""Sentences of a text with their places."""

from __future__ import annotations

import re

#: Words whose full stop ends no sentence.
_SHORT = frozenset(
    [
        "mr",
        "mrs",
        "ms",
        "dr",
        "prof",
        "st",
        "vs",
        "etc",
        "fig",
        "eq",
        "no",
        "vol",
        "ed",
        "inc",
        "ltd",
        "co",
        "jr",
        "sr",
        "e.g",
        "i.e",
        "u.s",
        "z.b",
        "d.h",
        "bzw",
        "ca",
        "nr",
        "abs",
        "art",
        "p",
        "pp",
        "cf",
        "al",
        "et",
        "sec",
        "approx",
    ]
)
# A run of stops is tried at its beginning alone: at each of its stops it would take the square of the
# run's length, and the matching holds the interpreter, so that one odd document stopped the server.
_END = re.compile(
    r"(?<![.!?…])[.!?…]+[\"'”’)\]]*(?=\s)|[。！？]+[”’」』)]*|(?<![।॥؟])[।॥؟]+(?=\s|$)|\n[ \t]*\n+"
)
_WORD_BEFORE = re.compile(r"([^\s(\[\"“]+)$")


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """(start, end) of every sentence, without the blanks around; empty lines end one too."""
    out: list[tuple[int, int]] = []
    start = 0
    for match in _END.finditer(text):
        if (
            match[0].startswith(".")
            and len(match[0]) == 1
            and not ends_sentence(text, match.start())
        ):
            continue
        _add(text, start, match.end(), out)
        start = match.end()
    _add(text, start, len(text), out)
    return out


def ends_sentence(text: str, stop: int) -> bool:
    """Whether the full stop at `stop` ends a sentence."""
    before = _WORD_BEFORE.search(text, max(0, stop - 20), stop)
    word = before[1].lower() if before else ""
    if word in _SHORT or (len(word) == 1 and word.isalpha()):
        return False
    after = text[stop + 1 : stop + 4].lstrip()
    return not after or not after[0].islower()


def _add(text: str, start: int, end: int, out: list[tuple[int, int]]) -> None:
    piece = text[start:end]
    left = len(piece) - len(piece.lstrip())
    right = len(piece.rstrip())
    if right > left:
        out.append((start + left, start + right))
