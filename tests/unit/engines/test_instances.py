"""Instances of one model: loaded once, a thread to each batch, all threads to a lone one."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forebay.errors import FailedPrecondition
from forebay_server.capacity import fitting
from forebay_server.core.interfaces import Batch, Engine, EngineSpec, Item, TokenInput
from forebay_server.engines import factory
from forebay_server.engines.occupancy import BESIDE_S
from forebay_server.engines.onnx import OnnxEngine
from forebay_server.repository.inspect import describe
from forebay_server.repository.loading import Defaults, engine_spec
from forebay_server.repository.manifest import ModelConfig, read_config
from tokenizers import Tokenizer


def spec_of(folder: Path, engine: str = "onnxruntime", **execution: Any) -> EngineSpec:
    file = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file)) if file.exists() else None
    config = ModelConfig.model_validate({"engine": engine, "execution": execution})
    return engine_spec("model", 1, folder, describe(folder), config, Defaults(), tokenizer)


@pytest.fixture(params=["onnxruntime", "openvino"])
def pair(starters: Path, request: pytest.FixtureRequest) -> Iterator[list[Any]]:
    if request.param == "openvino":
        pytest.importorskip("openvino", reason="the extra `cpu` is not installed")
    execution = {"instances": 2, "intra_op_threads": 1, "lone_threads": 2}
    engines = factory.open_all(spec_of(starters / "minilm" / "1", request.param, **execution))
    yield engines
    for engine in engines:
        engine.close()


class Watched:
    """What runs a model, saying that it does, and only when told."""

    def __init__(self, name: str, runner: Any, ran: list[str]) -> None:
        self.name, self.runner, self.ran = name, runner, ran
        self.go = threading.Event()
        self.go.set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.runner, name)

    def run(self, *arguments: Any) -> Any:
        self.begin()
        return self.runner.run(*arguments)

    def infer(self, *arguments: Any, **more: Any) -> Any:
        self.begin()
        return self.runner.infer(*arguments, **more)

    def begin(self) -> None:
        self.ran.append(self.name)
        assert self.go.wait(10)


def watch(pair: list[Any], ran: list[str]) -> Watched:
    """Has the runs of both instances written down. Gives what the first's lone runs go by."""
    if isinstance(pair[0], OnnxEngine):
        sessions: Any = pair[0]._sessions
        assert sessions is pair[1]._sessions
        sessions.narrow = Watched("narrow", sessions.narrow, ran)
        sessions.wide = Watched("wide", sessions.wide, ran)
        return sessions.wide
    for engine in pair:
        engine._narrow = Watched("narrow", engine._narrow, ran)
        engine._wide = Watched("wide", engine._wide, ran)
    return pair[0]._wide


def text(n: int = 9) -> Batch:
    ids = np.random.default_rng(n).integers(1000, 20_000, n)
    return Batch([Item(TokenInput(ids), n)], n, 1)


def vector(engine: Engine, batch: Batch) -> Any:
    (row,) = engine.finish(engine.execute(engine.prepare(batch)), batch)
    return row


@pytest.mark.parametrize(
    ("cores", "execution", "expected"),
    [
        (2, {}, (2, 1, 2)),
        (1, {}, (1, 1, 0)),
        (16, {}, (1, 16, 0)),
        (2, {"isolation": "process"}, (1, 2, 0)),
        (2, {"providers": ["cuda", "cpu"]}, (1, 2, 0)),
        (2, {"intra_op_threads": 2}, (1, 2, 0)),
        (2, {"instances": 2, "intra_op_threads": 1}, (2, 1, 0)),
    ],
)
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_threads_go_by_cores_until_the_configuration_says_otherwise(
    starters: Path,
    monkeypatch: pytest.MonkeyPatch,
    engine: str,
    cores: int,
    execution: dict[str, Any],
    expected: tuple[int, int, int],
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    spec = spec_of(starters / "minilm" / "1", engine, **execution)
    assert (spec.instances, spec.intra_op_threads, spec.lone_threads) == expected


@pytest.mark.parametrize(("cores", "expected"), [(1, (1, 1, 0)), (2, (2, 1, 0)), (16, (1, 1, 0))])
def test_a_table_has_a_core_to_each_batch(
    starters: Path, monkeypatch: pytest.MonkeyPatch, cores: int, expected: tuple[int, int, int]
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    spec = spec_of(starters / "housing" / "1")
    assert (spec.instances, spec.intra_op_threads, spec.lone_threads) == expected


def test_instances_share_the_weights(pair: list[Any]) -> None:
    first, second = pair
    assert first.info()["memory_bytes"] > 0
    assert second.info()["memory_bytes"] == 0
    first.close()
    assert np.isfinite(vector(second, text())).all(), "the other one's end takes nothing away"


def test_a_lone_run_is_wide_and_runs_beside_each_other_are_narrow(pair: list[Any]) -> None:
    first, second = pair
    ran: list[str] = []
    wide = watch(pair, ran)
    vector(first, text())
    assert ran == ["wide"]
    wide.go.clear()
    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(vector, first, text())
        while len(ran) < 2:
            time.sleep(0.001)
        vector(second, text())
        assert ran == ["wide", "wide", "narrow"]
        wide.go.set()
        busy.result(10)
    vector(first, text())
    assert ran[-1] == "narrow", "right after runs that met, the next is likely to meet one too"
    time.sleep(2 * BESIDE_S)
    vector(first, text())
    assert ran[-1] == "wide"


def test_answers_are_the_same_beside_each_other(pair: list[Any]) -> None:
    batches = [text(n) for n in range(3, 40)]
    alone = [vector(pair[0], b) for b in batches]
    with ThreadPoolExecutor(2) as pool:  # one thread to each instance, as in the server
        even, odd = pool.map(
            lambda engine, own: [vector(engine, b) for b in own],
            pair,
            (batches[::2], batches[1::2]),
        )
    beside = [(even, odd)[i % 2][i // 2] for i in range(len(batches))]
    for a, b in zip(alone, beside, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_failing_first_run_leaves_nothing_open(starters: Path) -> None:
    spec = spec_of(starters / "minilm" / "1", instances=2)
    opened: list[Any] = []

    def load(engine: Any) -> None:
        opened.append(engine)
        engine.load()
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        factory.open_all(spec, load)
    (engine,) = opened
    assert engine.info()["memory_bytes"] == 0


def test_a_process_has_no_lone_threads(tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    path.write_text("execution: {isolation: process, lone_threads: 2}\n")
    with pytest.raises(FailedPrecondition, match="lone_threads needs isolation: thread"):
        read_config(path)


def test_a_plan_counts_an_instance_with_its_own_threads(
    starters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[EngineSpec] = []

    def watched(spec: EngineSpec) -> Any:
        opened.append(spec)
        return factory.open_all(spec)

    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(fitting, "open_all", watched)
    monkeypatch.setattr(fitting, "SHAPE_S", 0.0)
    _, _, instances = fitting.fit_folder(starters / "sentiment", [16])
    (spec,) = opened
    assert instances == 2
    assert (spec.intra_op_threads, spec.lone_threads) == (1, 0), (
        "alone it would look twice as quick"
    )
