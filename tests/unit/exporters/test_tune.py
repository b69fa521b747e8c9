"""`forebay export tune`: measures real engines, writes a profile that the repository loads."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from forebay_exporters import scifact, tune
from forebay_exporters.artefact import ExportError
from forebay_server.repository.manifest import ModelConfig, read_config
from typer.testing import CliRunner

QUICK = {"rounds": 1, "seconds": 0.02}
MINE = "description: mine\ndefault_for: [embedding]\nexecution: {preload: false}\n"


@pytest.fixture(scope="module", autouse=True)
def _small() -> Iterator[None]:
    """Workloads that a test has time for."""
    shapes = {"SHAPES": ((1, 8), (4, 8)), "WORKLOADS": ("1x8", "4x8", "mixed")}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**shapes, "MIXED": (5, 24), "CALLERS": 8}.items():
            patch.setattr(tune, name, value)
        yield


def minilm(starters: Path, folder: Path) -> Path:
    """A repository of one model, with settings of its owner's."""
    shutil.copytree(starters / "minilm" / "1", folder / "minilm" / "1")
    (folder / "minilm" / "model.yaml").write_text(MINE)
    return folder


@pytest.fixture
def root(starters: Path, tmp_path: Path) -> Path:
    return minilm(starters, tmp_path)


@pytest.fixture(scope="module")
def tuned(starters: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tune.Outcome]:
    """The model, tuned once for the tests that only look."""
    root = minilm(starters, tmp_path_factory.mktemp("tuned"))
    return root, tune.tune(root, "minilm", **QUICK)


def test_the_winners_profile_is_written_beside_what_was_there(tuned) -> None:
    root, outcome = tuned
    path = root / "minilm" / "model.yaml"
    config = read_config(path)
    assert (config.description, config.default_for) == ("mine", ["embedding"])
    assert config.execution.preload is False
    assert config.engine == outcome.best.keys["engine"]
    assert config.engine_options == outcome.best.keys["engine_options"]
    assert "# | onnxruntime |" in path.read_text()
    assert not list(path.parent.glob("*.part"))
    # The profile serves: what was chosen loads, and its vectors are within the bounds.
    texts = list(tune.TEXTS)
    original = tune.Loaded(root / "minilm" / "1", ModelConfig(engine="onnxruntime"))
    chosen = tune.Loaded(root / "minilm" / "1", config)
    cosine = (original.embed(texts) * chosen.embed(texts)).sum(axis=1)
    assert cosine.mean() >= tune.MIN_MEAN_COSINE
    original.close()
    chosen.close()


def test_every_way_is_measured_on_every_workload(tuned) -> None:
    _, outcome = tuned
    names = [c.name for c in outcome.groups[0]]
    assert names == ["onnxruntime", "openvino fp32", "openvino bf16", "openvino int8"]
    for group in outcome.groups:
        assert group[0].ratios == dict.fromkeys(tune.WORKLOADS, 1.0)
        for one in group:
            assert one.fault or set(one.ratios) == set(tune.WORKLOADS)
            assert one.fault or all(r > 0 for r in one.rates["mixed"])


def test_a_precision_that_is_too_far_off_is_shown_and_not_taken(root: Path, monkeypatch) -> None:
    monkeypatch.setattr(tune, "MIN_MEAN_COSINE", 0.99999)
    outcome = tune.tune(root, "minilm", **QUICK)
    int8 = outcome.groups[0][3]
    assert "cosine below 0.99999" in int8.fault or "cannot be had" in int8.fault
    assert outcome.best.keys["engine_options"].get("precision") != "int8"


def corpus() -> scifact.Corpus:
    documents = dict(enumerate(tune.TEXTS))
    return scifact.Corpus(
        {str(i): t for i, t in documents.items()},
        {"q1": "someone eats", "q2": "forecast for california"},
        {"q1": {"0"}, "q2": {"2"}},
    )


def test_retrieval_decides_where_a_corpus_is_given(root: Path, monkeypatch) -> None:
    outcome = tune.tune(root, "minilm", judge=corpus(), **QUICK)
    if outcome.best.keys["engine"] == "openvino":
        assert outcome.groups[0][0].ndcg == 1.0
        assert any(c.ndcg == 1.0 for c in outcome.groups[0][1:])
        assert "nDCG@10" in tune.table(outcome.groups[0])[0]
    # Whichever is quicker on this machine: a rival that is twice as quick is judged, and taken only
    # where retrieval keeps what it was.
    reference, rival = outcome.groups[0][:2]
    rival.ratios = dict.fromkeys(tune.WORKLOADS, 2.0)
    config = read_config(root / "minilm" / "model.yaml")

    def judged() -> tune.Candidate:
        group = [reference, rival]
        return tune._judged(root / "minilm" / "1", config, group, corpus(), lambda said: None)

    assert judged() is rival and rival.ndcg == reference.ndcg == 1.0
    monkeypatch.setattr(tune, "MAX_NDCG_LOSS", -0.01)  # nothing can be so much better
    assert judged() is reference and "nDCG@10 falls" in rival.fault


def test_ndcg_is_the_textbooks() -> None:
    given = corpus()
    rows = {"someone eats": 1.0, "forecast for california": 0.0}

    def embed(texts):
        """q1 finds its document first, q2 finds another before its own."""
        import numpy as np

        order = {given.documents["0"]: (1, 0), given.documents["2"]: (0, 0.5)}
        order |= {given.documents["1"]: (0, 1)}
        return np.array(
            [(rows[t], 1 - rows[t]) if t in rows else order.get(t, (0, 0)) for t in texts]
        )

    assert scifact.score(embed, given)["ndcg@10"] == pytest.approx((1 + 1 / 1.584962500721156) / 2)


@pytest.mark.parametrize(
    ("name", "version", "said"),
    [
        ("nobody", None, "has no model 'nobody'"),
        ("minilm", 7, r"minilm has no version 7; it has \[1\]"),
        ("iris", None, "iris is a tabular-classification model; encoders are tuned"),
    ],
)
def test_what_cannot_be_tuned_is_named(root: Path, starters: Path, name, version, said) -> None:
    shutil.copytree(starters / "iris", root / "iris")
    with pytest.raises(ExportError, match=said):
        tune.tune(root, name, version=version, **QUICK)
    assert (root / "minilm" / "model.yaml").read_text() == MINE


def test_the_command_shows_the_table(root: Path) -> None:
    from forebay_cli.main import app

    words = ["export", "tune", "minilm", "--models", str(root), "--rounds", "1"]
    done = CliRunner().invoke(app, [*words, "--seconds", "0.05"])
    assert done.exit_code == 0, done.output
    assert "| openvino int8 |" in done.output and "4x8" in done.output
    words[2] = "nobody"
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 1 and "nobody" in done.output
