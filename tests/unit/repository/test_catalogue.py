"""What the folders say, and how often it is said."""

from __future__ import annotations

from pathlib import Path

import pytest
from forebay.errors import FailedPrecondition, NotFound
from forebay_server.repository.catalogue import Catalogue


def model(root: Path, name: str, yaml: str) -> Path:
    folder = root / name
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "model.onnx").touch()
    (folder / "model.yaml").write_text(yaml)
    return folder


async def test_a_model_yaml_that_cannot_be_read_is_named_once_until_it_changes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = model(tmp_path, "bad", "engnie: onnxruntime\n")
    model(tmp_path, "good", "engine: onnxruntime\n")
    catalogue = Catalogue(tmp_path)
    for _ in range(3):
        await catalogue.read()
    assert [r.levelname for r in caplog.records] == ["ERROR"]
    assert "engnie" in caplog.text
    assert set(catalogue.configs) == {"good"}
    with pytest.raises(FailedPrecondition, match="engnie"):
        catalogue.config("bad")
    (folder / "model.yaml").write_text("engine: none of these\n")
    await catalogue.read()
    assert len(caplog.records) == 2
    (folder / "model.yaml").write_text("engine: onnxruntime\n")
    await catalogue.read()
    assert set(catalogue.configs) == {"good", "bad"}
    assert not catalogue.faults


async def test_an_unknown_model_is_answered_with_the_nearest(tmp_path: Path) -> None:
    model(tmp_path, "minilm", "")
    catalogue = Catalogue(tmp_path)
    await catalogue.read()
    with pytest.raises(NotFound) as caught:
        catalogue.folder("minilmm")
    assert "minilm" in caught.value.message


async def test_an_unknown_model_that_resembles_none_is_answered_with_those_there_are(
    tmp_path: Path,
) -> None:
    model(tmp_path, "minilm", "")
    catalogue = Catalogue(tmp_path)
    await catalogue.read()
    with pytest.raises(NotFound, match=r"'gpt-4o' was not found\. Known are minilm\.$"):
        catalogue.folder("gpt-4o")
    for i in range(12):
        model(tmp_path, f"other{i:02}", "")
    await catalogue.read()
    with pytest.raises(NotFound, match=r" minilm, other00, .*, other08, 3 more\.$"):
        catalogue.folder("gpt-4o")


async def test_a_folder_without_a_version_is_not_found_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "mine" / "v1").mkdir(parents=True)
    catalogue = Catalogue(tmp_path)
    await catalogue.read()
    with pytest.raises(NotFound, match="no version folder, named by a number"):
        catalogue.folder("mine")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("engnie: auto\n", "model.yaml: engnie: is no key here; known are description, engine, "),
        (
            "execution: {instnaces: 2}\n",
            "model.yaml: execution.instnaces: is no key here; known are providers, ",
        ),
        ("execution: [\n", "model.yaml: line 2, column 1: expected the node content"),
    ],
)
async def test_a_fault_in_model_yaml_is_one_line_with_what_is_allowed(
    tmp_path: Path, text: str, said: str
) -> None:
    model(tmp_path, "bad", text)
    catalogue = Catalogue(tmp_path)
    await catalogue.read()
    assert catalogue.faults["bad"].startswith(said)
    assert "\n" not in catalogue.faults["bad"]
