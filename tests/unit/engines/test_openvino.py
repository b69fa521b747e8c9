"""The OpenVINO engine beside ONNX Runtime on the same file: equal within bounds, refused alike."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forebay.errors import FailedPrecondition, Unavailable
from forebay_server.core.interfaces import Batch, Engine, EngineSpec, Item, TokenInput
from forebay_server.engines import factory
from forebay_server.repository.inspect import describe
from forebay_server.repository.loading import Defaults, engine_spec
from forebay_server.repository.manifest import ModelConfig
from numpy.typing import NDArray
from tokenizers import Tokenizer

pytest.importorskip("openvino", reason="the extra `cpu` is not installed")

from forebay_server.engines import openvino

TEXTS = (
    "A man is eating food.",
    "Dynamic batching gathers many small calls into full batches for the model.",
    "Ein Vorbecken speist die Turbinen eines Kraftwerks.",
    "!",
    "2 + 2 = 4",
    "The patient was given 20 mg of the drug twice a day for six weeks. " * 8,
)
#: Least cosine of any text with fp32 in ONNX Runtime, by precision. "!" is the worst of them.
BOUNDS = {"fp32": 0.999999, "bf16": 0.9995, "int8": 0.99}

Make = Callable[..., Engine]


@pytest.fixture(scope="module")
def minilm(starters: Path) -> Path:
    return starters / "minilm" / "1"


@pytest.fixture(scope="module")
def items(minilm: Path) -> list[Item]:
    tokenizer = Tokenizer.from_file(str(minilm / "tokenizer.json"))
    tokenizer.no_padding()
    ids = [np.array(tokenizer.encode(t).ids, np.int64) for t in TEXTS]
    return [Item(TokenInput(i), len(i)) for i in ids]


def spec_of(folder: Path, **config: Any) -> EngineSpec:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return engine_spec(
        "minilm", 1, folder, describe(folder), ModelConfig(**config), Defaults(), tokenizer
    )


@pytest.fixture
def make(minilm: Path) -> Iterator[Make]:
    """Loads engines; closes them after the test."""
    made: list[Engine] = []

    def load(folder: Path = minilm, **config: Any) -> Engine:
        engine = factory.create(spec_of(folder, **config))
        made.append(engine)
        engine.load()
        return engine

    yield load
    for engine in made:
        engine.close()


def run(engine: Engine, items: list[Item]) -> NDArray[Any]:
    batch = Batch(items, max(i.length for i in items), len(items))
    return np.stack([np.asarray(r) for r in engine.finish(_run(engine, batch), batch)])


def _run(engine: Engine, batch: Batch) -> Any:
    return engine.execute(engine.prepare(batch))


def least_cosine(a: NDArray[Any], b: NDArray[Any]) -> float:
    return float((a * b).sum(axis=1).min())


def needs(precision: str, folder: Path) -> None:
    lacks = openvino.lacking(spec_of(folder, engine="openvino", engine_options=given(precision)))
    if lacks:
        pytest.skip(lacks)


def given(precision: str, **more: Any) -> dict[str, Any]:
    return {"precision": precision, **more}


@pytest.mark.parametrize("precision", list(BOUNDS))
@pytest.mark.parametrize("isolation", ["thread", "process"])
def test_answers_equal_onnx_runtimes(make: Make, minilm, items, precision, isolation) -> None:
    needs(precision, minilm)
    execution = {"isolation": isolation}
    ours = make(engine="openvino", engine_options=given(precision), execution=execution)
    assert ours.info()["providers"] == [f"openvino-{precision}"]
    assert least_cosine(run(make(), items), run(ours, items)) >= BOUNDS[precision]


@pytest.mark.parametrize("precision", list(BOUNDS))
def test_a_text_is_the_same_alone_and_in_a_padded_batch(make: Make, minilm, items, precision):
    needs(precision, minilm)
    engine = make(engine="openvino", engine_options=given(precision))
    alone = np.concatenate([run(engine, [i]) for i in items])
    assert least_cosine(alone, run(engine, items)) >= 0.9995


@pytest.mark.parametrize(("precision", "share"), [("int8", 0.3), ("bf16", 0.55)])
def test_weights_take_less_memory(minilm: Path, precision: str, share: float) -> None:
    model = openvino.read(minilm / "model.onnx")

    def bytes_of() -> int:
        constants = (op for op in model.get_ops() if op.get_type_name() == "Constant")
        return sum(op.get_byte_size() for op in constants)

    before = bytes_of()
    # Four products in each of six layers, and the table of words.
    assert openvino.compress(model, precision) == 25
    assert bytes_of() < before * share


def test_larger_groups_are_further_from_the_original(make: Make, minilm, items) -> None:
    needs("int8", minilm)
    original = run(make(), items)
    cosine = [
        float((original * run(make(engine="openvino", engine_options=o), items)).sum(1).mean())
        for o in (given("int8"), given("int8", group_size=128))
    ]
    assert cosine[0] > cosine[1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"precision": "int4"}, r"engine_options\.precision is 'int4'; known are fp32, bf16, int8"),
        ({"precision": "int8", "group_size": 33}, r"engine_options\.group_size is 33"),
    ],
)
def test_odd_options_are_named(make: Make, minilm, options, said) -> None:
    needs("int8", minilm)
    with pytest.raises(FailedPrecondition, match=said):
        make(engine="openvino", engine_options=options)


@pytest.mark.parametrize("content", [b"", b"not a model", None])
def test_bad_files_are_refused_by_name(make: Make, minilm, tmp_path, content) -> None:
    folder = shutil.copytree(minilm, tmp_path / "1")
    file = folder / "model.onnx"
    file.write_bytes(file.read_bytes()[:30_000] if content is None else content)
    with pytest.raises(FailedPrecondition, match=r"model\.onnx") as e:
        make(folder, engine="openvino")
    assert str(tmp_path) not in e.value.message
    assert e.value.reason == "MODEL_REJECTED"


def test_an_output_that_is_not_there_is_named(minilm: Path) -> None:
    from dataclasses import replace

    spec = replace(spec_of(minilm, engine="openvino"), output="logits")
    with pytest.raises(FailedPrecondition, match="has no output 'logits'; it has sentence_embeddi"):
        factory.create(spec).load()


def test_operators_that_openvino_lacks_are_named(make: Make, starters: Path) -> None:
    folder = starters / "housing" / "1"
    spec = engine_spec(
        "housing", 1, folder, describe(folder), ModelConfig(engine="openvino"), Defaults(), None
    )
    with pytest.raises(FailedPrecondition, match=r"model\.onnx .*TreeEnsembleRegressor"):
        factory.create(spec).load()


def test_a_closed_engine_says_so(make: Make, items) -> None:
    engine = make(engine="openvino")
    engine.close()
    for use in (engine.check_health, lambda: run(engine, items)):
        with pytest.raises(Unavailable):
            use()


def test_without_the_package_onnx_runtime_serves_and_it_is_said(
    make: Make, items, monkeypatch, caplog
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "openvino" else real(n, *a)
    )
    engine = make(engine="openvino", engine_options=given("int8"))
    assert engine.info()["providers"] == ["cpu"]
    assert engine.info()["providers_missing"] == ["openvino"]
    assert "openvino is not installed" in caplog.text
    assert np.abs(run(engine, items) - run(make(), items)).max() < 1e-6


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_without_the_instructions_onnx_runtime_serves_and_it_is_said(
    make: Make, monkeypatch, caplog, precision
) -> None:
    monkeypatch.setattr(openvino, "_capabilities", frozenset)
    monkeypatch.setattr(openvino, "_has_vnni", lambda: False)
    engine = make(engine="openvino", engine_options=given(precision))
    assert engine.info()["providers_missing"] == ["openvino"]
    assert "the processor has no" in caplog.text
