"""Instances of one ONNX model: one set of sessions, a thread to each batch, all threads to a lone one."""

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
from forebay_server.core.interfaces import Batch, EngineSpec, Item, TokenInput
from forebay_server.engines import factory
from forebay_server.engines.onnx import BESIDE_S, OnnxEngine
from forebay_server.repository.inspect import describe
from forebay_server.repository.loading import Defaults, engine_spec
from forebay_server.repository.manifest import ModelConfig, read_config
from tokenizers import Tokenizer


def spec_of(folder: Path, **execution: Any) -> EngineSpec:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    config = ModelConfig.model_validate({"execution": execution})
    return engine_spec("minilm", 1, folder, describe(folder), config, Defaults(), tokenizer)


@pytest.fixture
def pair(starters: Path) -> Iterator[list[OnnxEngine]]:
    spec = spec_of(starters / "minilm" / "1", instances=2, intra_op_threads=1, lone_threads=2)
    engines = factory.open_all(spec)
    yield engines  # type: ignore[misc]
    for engine in engines:
        engine.close()


class Watched:
    """A session that says that it runs, and runs on only when told."""

    def __init__(self, name: str, session: Any, ran: list[str]) -> None:
        self.name, self.session, self.ran = name, session, ran
        self.go = threading.Event()
        self.go.set()

    def run(self, *arguments: Any) -> Any:
        self.ran.append(self.name)
        assert self.go.wait(10)
        return self.session.run(*arguments)


def text(n: int = 9) -> Batch:
    ids = np.random.default_rng(n).integers(1000, 20_000, n)
    return Batch([Item(TokenInput(ids), n)], n, 1)


def vector(engine: OnnxEngine, batch: Batch) -> Any:
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
def test_threads_go_by_cores_until_the_configuration_says_otherwise(
    starters: Path,
    monkeypatch: pytest.MonkeyPatch,
    cores: int,
    execution: dict[str, Any],
    expected: tuple[int, int, int],
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    spec = spec_of(starters / "minilm" / "1", **execution)
    assert (spec.instances, spec.intra_op_threads, spec.lone_threads) == expected


def test_instances_share_the_weights(pair: list[OnnxEngine]) -> None:
    first, second = pair
    assert first.info()["memory_bytes"] > 0
    assert second.info()["memory_bytes"] == 0
    first.close()
    assert np.isfinite(vector(second, text())).all(), "the other one's end takes nothing away"


def test_a_lone_run_is_wide_and_runs_beside_each_other_are_narrow(pair: list[OnnxEngine]) -> None:
    first, second = pair
    sessions = first._sessions
    assert sessions is not None and sessions.wide is not None and second._sessions is sessions
    ran: list[str] = []
    wide = Watched("wide", sessions.wide, ran)
    narrow = Watched("narrow", sessions.narrow, ran)
    sessions.wide, sessions.narrow = wide, narrow  # type: ignore[assignment]
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


def test_answers_are_the_same_beside_each_other(pair: list[OnnxEngine]) -> None:
    batches = [text(n) for n in range(3, 40)]
    alone = [vector(pair[0], b) for b in batches]
    with ThreadPoolExecutor(4) as pool:
        beside = list(pool.map(lambda p: vector(pair[p[0] % 2], p[1]), enumerate(batches)))
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
