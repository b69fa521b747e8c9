"""Sentences of texts, odd ones among them."""

from __future__ import annotations

import time

import pytest
from forebay_server.knowledge.sentences import sentence_spans


def test_sentences_end_where_a_reader_says() -> None:
    text = 'Wait... what?! He said "no." Dr. Who came.\n\nA new one. यह है। Ende…'
    assert [text[a:b] for a, b in sentence_spans(text)] == [
        "Wait...", "what?!", 'He said "no."', "Dr. Who came.", "A new one.", "यह है।", "Ende…",
    ]  # fmt: skip


@pytest.mark.parametrize("stop", [".", "!", "…", "।", "؟"])
def test_a_long_run_of_stops_takes_no_time(stop: str) -> None:
    began = time.perf_counter()
    text = stop * 200_000 + "x"
    assert sentence_spans(text) == [(0, len(text))]
    assert time.perf_counter() - began < 2
