"""What commands say of wrong settings: one line, whichever command reads them."""

from __future__ import annotations

from pathlib import Path

import pytest
from forebay.settings import load_settings
from forebay_cli.main import app
from typer.testing import CliRunner


@pytest.mark.parametrize(
    "command", [["config"], ["keys", "list"], ["models", "list"], ["plan", "--fit", "minilm"]]
)
def test_a_wrong_variable_is_one_line(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOREBAY_GRCP_PORT", "1")
    run = CliRunner().invoke(app, command)
    assert run.exit_code == 2, run.output
    assert run.output.startswith("forebay: FOREBAY_GRCP_PORT names no setting")
    assert len(run.output.strip().splitlines()) == 1


def test_a_key_for_calls_is_no_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exported in a shell, it must not keep a server from starting there."""
    monkeypatch.setenv("FOREBAY_KEY", "fb_secret")
    monkeypatch.setenv("FOREBAY_HOME", str(tmp_path))
    load_settings()
    run = CliRunner().invoke(app, ["config"])
    assert run.exit_code == 0, run.output
    assert "fb_secret" not in run.output
