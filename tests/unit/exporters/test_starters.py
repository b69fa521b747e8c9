"""Starter models are made once; one that is not whole is made again."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
from forebay_exporters.starters import make_starters, missing


def test_a_starter_is_made_once_and_again_when_a_file_is_cut(tmp_path: Path) -> None:
    root = tmp_path / "models"
    made: list[str] = []

    def make() -> None:
        faults = make_starters(
            root, tmp_path, progress=lambda text, _: made.append(text), only=("iris",)
        )
        assert not faults

    make()
    assert "making iris" in made
    assert "iris" not in missing(root)
    model = root / "iris" / "1" / "model.onnx"
    whole, stamp = model.read_bytes(), model.stat().st_mtime_ns
    made.clear()
    make()
    assert not made
    assert model.stat().st_mtime_ns == stamp
    model.write_bytes(whole[: len(whole) // 2])
    assert "iris" in missing(root)
    make()
    assert len(model.read_bytes()) == len(whole)


def test_two_that_begin_at_once_make_it_once(tmp_path: Path) -> None:
    both = Barrier(2)

    def make() -> tuple[dict[str, str], list[str]]:
        made: list[str] = []
        both.wait(10)
        faults = make_starters(
            tmp_path / "models",
            tmp_path,
            progress=lambda text, _: made.append(text),
            only=("iris", "digits"),
        )
        return faults, made

    with ThreadPoolExecutor() as pool:
        results = [f.result() for f in [pool.submit(make), pool.submit(make)]]
    assert [faults for faults, _ in results] == [{}, {}]
    assert sum(made.count("making iris") for _, made in results) == 1


def test_a_graph_that_is_not_the_model_is_refused(starters: Path, tmp_path: Path, monkeypatch):
    """The check is by the weights alone: it sees what the graph's writer got wrong."""
    from forebay_exporters.artefact import ExportError
    from forebay_exporters.starters import minilm

    class Wrong(minilm.BertGraph):
        def __init__(self, weights: Path, config: dict) -> None:
            super().__init__(weights, config | {"num_attention_heads": 6})

    monkeypatch.setattr(minilm, "BertGraph", Wrong)
    with pytest.raises(ExportError, match="the artefact is not the model: max_abs_diff"):
        minilm.make(tmp_path, starters.parent / "cache", lambda *_: None)
    assert not (tmp_path / "minilm" / "1").exists()
    assert (tmp_path / ".failed" / "minilm-1.json").exists()
