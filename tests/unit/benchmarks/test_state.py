"""A run that was cut off goes on where it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.peers import report
from benchmarks.peers.state import State

FACTS = {"machine": {"cpu": "x"}, "commit": "abc", "seconds": 4.0, "warmup": 2.0}


def test_records_are_there_again_and_a_line_cut_off_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "state.jsonl"
    State.open(path, FACTS, new=False).add(round=0, server="a", rps=1.0)
    with path.open("a") as file:
        file.write('{"round": 0, "serv')
    again = State.open(path, FACTS, new=False)
    assert again.has(round=0, server="a")
    assert not again.has(round=1, server="a")
    again.add(round=1, server="a", rps=2.0)
    assert State.open(path, FACTS, new=False).has(round=1, server="a")


def test_other_code_or_options_are_another_run(tmp_path: Path) -> None:
    path = tmp_path / "state.jsonl"
    State.open(path, FACTS, new=False).add(round=0)
    with pytest.raises(ValueError, match="commit"):
        State.open(path, {**FACTS, "commit": "def"}, new=False)
    assert not State.open(path, {**FACTS, "commit": "def"}, new=True).records


def test_a_fault_is_tried_once_more(tmp_path: Path) -> None:
    state = State.open(tmp_path / "state.jsonl", FACTS, new=False)
    state.add(round=0, server="a", fault="refused")
    assert not state.has(round=0, server="a")
    state.add(round=0, server="a", fault="refused")
    assert state.has(round=0, server="a")


def test_a_report_of_faults_and_absent_peers_needs_no_figures(tmp_path: Path) -> None:
    state = State.open(tmp_path / "state.jsonl", FACTS, new=False)
    state.add(absent="ray", why="no wheel")
    state.add(round=0, group="tabular", server="a", config="w1", end=True, fault="it\nended")
    report.write(state, "peers", tmp_path)
    text = (tmp_path / "peers.md").read_text()
    assert "- ray is not here: no wheel" in text
    assert "- a, w1: it ended" in text
    assert (tmp_path / "peers.json").exists()
