"""Chunks of parsed documents, by words instead of a model's tokens."""

from __future__ import annotations

import re
import time

import pytest
from forebay_server.knowledge.chunking import ChunkConfig, Method, chunk
from forebay_server.knowledge.parsers import parse


def words(text: str) -> list[tuple[int, int]]:
    return [m.span() for m in re.finditer(r"\S+", text)]


@pytest.mark.parametrize("method", ["tokens", "sentence", "heading", "parent_child"])
def test_each_chunk_has_the_headings_above_it(method: Method) -> None:
    text = "Before.\n# A\none.\n### A1\ntwo.\n## A2\nthree.\n# B\nfour.\n"
    config = ChunkConfig(method, tokens=3, overlap=0)
    above = {"one.": ["A"], "two.": ["A", "A1"], "three.": ["A", "A2"], "four.": ["B"]}
    for c in chunk(parse("x.md", text.encode()), config, words, 3):
        headings = [t for place, t in zip((8, 17, 29, 42), ("A", "A1", "A2", "B"), strict=True)
                    if place <= c.start]  # fmt: skip
        assert list(c.headings)[-1:] == headings[-1:]
        for word, titles in above.items():
            if text[c.start : c.end].startswith(word):
                assert list(c.headings) == titles


def test_a_text_of_headings_is_cut_in_linear_time() -> None:
    parsed = parse("x.md", b"# a\n" * 100_000)
    began = time.perf_counter()
    chunks = chunk(parsed, ChunkConfig(tokens=10, overlap=0), words, 256)
    assert len(chunks) == 20_000
    assert time.perf_counter() - began < 10
