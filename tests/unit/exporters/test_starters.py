"""Starter models are made once; one that is not whole is made again."""

from __future__ import annotations

from pathlib import Path

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
