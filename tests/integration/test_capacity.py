"""`forebay plan` and `forebay bench tune` on real models, a running server among them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from forebay_cli.fit import fit_live
from forebay_cli.main import app
from forebay_server.capacity.cost import CostModel
from forebay_server.repository.manifest import read_config
from typer.testing import CliRunner

from tests.conftest import Live


@pytest.mark.parametrize(("model", "lengths"), [("minilm", [8, 32]), ("iris", [1])])
def test_a_running_server_is_fitted_from_its_answers(
    live: Live, model: str, lengths: list[int]
) -> None:
    found = fit_live(live.channel, [], model, lengths, seconds=0.3)
    cost = found.model
    assert 0 < cost.seconds(1, max(lengths)) < 1
    assert max(cost.overhead_s) > 0
    if model == "iris":  # 32 rows cost it less than a busy machine's noise
        assert cost.seconds(32, max(lengths)) >= cost.seconds(1, max(lengths))
    else:
        assert cost.seconds(32, max(lengths)) > cost.seconds(1, max(lengths))
        assert list(found.lengths) == lengths
        assert all(abs(tokens - asked) <= 1 for asked, tokens in found.lengths.items())


def test_a_call_of_several_batches_is_fitted_by_its_parts(live: Live) -> None:
    def cost(rows: int) -> CostModel:
        return fit_live(live.channel, [], "iris", [], seconds=0.2, rows=rows).model

    whole, split = zip(*((cost(512), cost(1024)) for _ in range(2)), strict=True)
    # The answer to 1,024 rows tells of two batches together; fitted by it a row would cost twice as much.
    assert min(c.seconds(512, 1) for c in split) < 1.6 * max(c.seconds(512, 1) for c in whole)
    assert all(min(c.overhead_s) >= 0 for c in split)
    with pytest.raises(ValueError, match="--max-batch-size"):
        fit_live(live.channel, [], "iris", [], seconds=0.1, rows=600, most=600)


def test_a_folder_is_fitted_and_planned_for(starters: Path, tmp_path: Path) -> None:
    cost, plans = tmp_path / "cost.json", tmp_path / "plans.json"
    run = CliRunner().invoke(
        app,
        f"plan --fit {starters / 'iris'} --save {cost} --rate 30000 --p99-ms 10 --keep-policy "
        f"--price 1 --output {plans}".split(),
    )
    assert run.exit_code == 0, run.output
    assert CostModel.read(cost).base_s >= 0
    made = json.loads(plans.read_text())["plans"]
    assert made[0]["replicas"] >= 2, "45 us a call bound a replica to 22,000 calls/s"
    assert made[0]["p99_s"] <= 0.01
    again = CliRunner().invoke(app, ["plan", "--cost", str(cost)])
    assert again.exit_code == 0
    assert "calls/s" in again.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rate", "1"], "one of --fit and --cost"),
        (["--cost", "nowhere.json"], "nowhere.json"),
        (["--cost", "x", "--tokens", "9-3"], "--tokens"),
        (["--cost", "x", "--routing", "best"], "allowed are two_choices"),
    ],
)
def test_wrong_arguments_are_named(arguments: list[str], said: str) -> None:
    run = CliRunner().invoke(app, ["plan", *arguments])
    assert run.exit_code == 2
    assert said in run.output


def test_a_tuned_policy_is_one_that_the_server_reads(starters: Path, tmp_path: Path) -> None:
    folder = tmp_path / "iris"
    shutil.copytree(starters / "iris", folder)
    before = read_config(folder / "model.yaml")
    command = ["bench", "tune", str(folder), "--seconds", "0.05", "--callers", "8"]
    shown = CliRunner().invoke(app, [*command, "--no-write"])
    assert shown.exit_code == 0, shown.output
    assert "recommended" in shown.output
    assert read_config(folder / "model.yaml") == before
    assert CliRunner().invoke(app, command).exit_code == 0
    after = read_config(folder / "model.yaml")
    assert after.default_for == before.default_for
    assert after.batching.max_batch_size is not None
    assert after.execution.intra_op_threads is not None
