"""Model folders as people leave them, and what is done to them while the server runs."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import grpc
import pytest
from forebay.oip import open_inference_pb2 as oip
from forebay.oip import open_inference_pb2_grpc as oip_grpc
from forebay.v1 import model_pb2 as pb

from tests.conftest import Live, Start, copy_models
from tests.integration.test_inference import violations
from tests.integration.test_registry import served_version, stub_of, upload
from tests.unit.engines.test_hostile_trees import chain

#: What a config.json may not be.
CONFIGS = ["[]", '{"id2label": ["yes"], "architectures": 3}', '"a word"']


def infer(live: Live, name: str) -> grpc.RpcError:
    """The error of a call to a model that cannot serve it."""
    with pytest.raises(grpc.RpcError) as caught:
        request = oip.ModelInferRequest(model_name=name)
        oip_grpc.GRPCInferenceServiceStub(live.channel).ModelInfer(request, timeout=10)
    return caught.value


def odd_folder(starters: Path, folder: Path, config: str) -> Path:
    """A text model's folder with such a config.json."""
    folder.mkdir(parents=True)
    for name in ("model.onnx", "tokenizer.json"):
        shutil.copy(starters / "sentiment" / "1" / name, folder / name)
    (folder / "config.json").write_text(config)
    return folder


@pytest.mark.parametrize("config", CONFIGS)
def test_an_odd_config_json_hurts_no_other_model_and_is_named(
    starters: Path, start: Start, tmp_path: Path, config: str
) -> None:
    models = copy_models(starters, tmp_path / "models", "iris")
    odd = odd_folder(starters, models / "an-odd" / "1", config)
    (odd_folder(starters, models / "late" / "1", config).parent / "model.yaml").write_text(
        "execution: {preload: false}\n"
    )
    live = start(models)
    assert served_version(live) == 1
    for name in ("an-odd", "late"):  # loaded with the server, and by its first call
        error = infer(live, name)
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "JSON" in str(error.details())
    with pytest.raises(grpc.RpcError) as caught:
        stub_of(live).ImportVersion(upload(odd, "new", piece=500_000))
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "JSON" in str(caught.value.details())


def test_a_version_policy_that_wants_no_version_there_is_is_said(
    starters: Path, start: Start, tmp_path: Path
) -> None:
    models = copy_models(starters, tmp_path / "models", "iris")
    (models / "iris" / "model.yaml").unlink(missing_ok=True)
    (models / "iris" / "model.yaml").write_text("version_policy: [7, 8]\n")
    live = start(models)
    error = infer(live, "iris")
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "version_policy is [7, 8]; the versions of iris are 1" in str(error.details())
    with pytest.raises(grpc.RpcError) as caught:
        stub_of(live).LoadModel(pb.LoadModelRequest(model="iris"))
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert served_version(live, "iris@1") == 1


@pytest.mark.parametrize(
    ("model", "lengths", "said"),
    [
        ("minilm", [16, 100_000], "has 100000; allowed are lengths up to the model's max_tokens"),
        ("minilm", [32, 16], "has 16 after 32; allowed are lengths from 1 that rise"),
        ("minilm", [16, 16], "has 16 after 16; allowed are lengths from 1 that rise"),
        ("minilm", [0, 16], "has 0; allowed are lengths from 1 that rise"),
        ("iris", [16], "is for models that read texts"),
    ],
)
def test_lengths_that_texts_cannot_be_padded_to_are_refused_at_load(
    starters: Path, start: Start, tmp_path: Path, model: str, lengths: list[int], said: str
) -> None:
    models = copy_models(starters, tmp_path / "models", "minilm", "iris")
    live = start(models)
    (models / model / "model.yaml").unlink(missing_ok=True)
    (models / model / "model.yaml").write_text(f"batching: {{length_buckets: {lengths}}}\n")
    with pytest.raises(grpc.RpcError) as caught:
        stub_of(live).UnloadModel(pb.UnloadModelRequest(model=model))
        stub_of(live).LoadModel(pb.LoadModelRequest(model=model))
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "model.yaml: batching.length_buckets: " in str(caught.value.details())
    assert said in str(caught.value.details())


def test_a_price_for_a_model_that_has_none_is_refused_at_load(
    starters: Path, start: Start, tmp_path: Path
) -> None:
    live = start(copy_models(starters, models := tmp_path / "models", "minilm"))
    (models / "minilm" / "model.yaml").unlink(missing_ok=True)
    (models / "minilm" / "model.yaml").write_text("generation: {prices: {prompt: 1.0}}\n")
    stub_of(live).UnloadModel(pb.UnloadModelRequest(model="minilm"))
    with pytest.raises(grpc.RpcError) as caught:
        stub_of(live).LoadModel(pb.LoadModelRequest(model="minilm"))
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "generation.prices: is for language models alone" in str(caught.value.details())


def test_trees_that_would_end_the_process_are_refused(
    starters: Path, start: Start, tmp_path: Path
) -> None:
    live = start(copy_models(starters, tmp_path / "models", "iris"))
    folder = tmp_path / "deep"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(chain(200_000).SerializeToString())
    with pytest.raises(grpc.RpcError) as caught:
        stub_of(live).ImportVersion(upload(folder, "deep", piece=500_000))
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "is deeper than 4096 levels" in str(caught.value.details())
    assert served_version(live) == 1


def states(live: Live) -> dict[int, int]:
    """State of each version of iris."""
    model = stub_of(live).GetModel(pb.GetModelRequest(model="iris")).model
    return {v.version: v.state for v in model.versions}


def two_versions(starters: Path, root: Path) -> Path:
    models = copy_models(starters, root, "iris")
    shutil.copytree(models / "iris" / "1", models / "iris" / "2")
    (models / "iris" / "model.yaml").unlink(missing_ok=True)
    (models / "iris" / "model.yaml").write_text("version_policy: all\n")
    return models


def test_a_version_that_was_unloaded_stays_so_until_it_is_wanted(
    starters: Path, start: Start, tmp_path: Path
) -> None:
    models = two_versions(starters, tmp_path / "models")
    live = start(models, models__poll_s=0.05)
    stub_of(live).UnloadModel(pb.UnloadModelRequest(model="iris", version=2))
    time.sleep(1)
    assert states(live) == {1: pb.MODEL_STATE_READY, 2: pb.MODEL_STATE_AVAILABLE}
    assert served_version(live, "iris@2") == 2
    stub_of(live).UnloadModel(pb.UnloadModelRequest(model="iris"))
    assert served_version(live, "iris@1") == 1
    # Back by a call, the model is kept up with its folder as any other.
    shutil.copytree(models / "iris" / "1", models / "iris" / "3")
    deadline = time.monotonic() + 10
    while states(live).get(3) != pb.MODEL_STATE_READY:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_unload_goes_on_when_its_caller_has_left(
    starters: Path, start: Start, tmp_path: Path
) -> None:
    live = start(two_versions(starters, tmp_path / "models"))
    with pytest.raises(grpc.RpcError):
        stub_of(live).UnloadModel(pb.UnloadModelRequest(model="iris"), timeout=0.2)
    deadline = time.monotonic() + 10
    while set(states(live).values()) != {pb.MODEL_STATE_AVAILABLE}:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("path", ["a\0b", "net.onnx/more", "x/../net.onnx", "net.onnx/."])
def test_an_import_names_a_path_that_cannot_be(
    starters: Path, start: Start, tmp_path: Path, path: str
) -> None:
    live = start(copy_models(starters, tmp_path / "models", "iris"))
    parts = [
        pb.ImportVersionRequest(header=pb.ImportHeader(model="new")),
        pb.ImportVersionRequest(chunk={"path": "net.onnx", "data": b"x"}),
        pb.ImportVersionRequest(chunk={"path": path, "data": b"x"}),
    ]
    with pytest.raises(grpc.RpcError) as caught:
        stub_of(live).ImportVersion(iter(parts))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert set(violations(caught.value)) == {"chunk.path"}
    assert not (tmp_path / "models" / "new").exists()


def test_an_import_does_not_hide_a_model_without_version_folders(
    starters: Path, start: Start, tmp_path: Path
) -> None:
    shutil.copytree(starters / "iris" / "1", tmp_path / "models" / "flat")
    live = start(tmp_path / "models")
    assert served_version(live, "flat") == 1
    with pytest.raises(grpc.RpcError) as caught:
        stub_of(live).ImportVersion(upload(starters / "iris" / "1", "flat"))
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "flat/1" in str(caught.value.details())
    assert served_version(live, "flat@1") == 1


def test_aliases_of_a_model_that_is_added_lead_to_it(
    starters: Path, start: Start, tmp_path: Path
) -> None:
    models = copy_models(starters, tmp_path / "models", "iris")
    live = start(models, models__poll_s=0.05)
    for name in ("seen", "loaded"):
        new = tmp_path / name
        shutil.copytree(starters / "iris" / "1", new / "1")
        (new / "model.yaml").write_text("aliases: {stable: 1}\nexecution: {preload: true}\n")
        new.rename(models / name)
        if name == "loaded":
            stub_of(live).LoadModel(pb.LoadModelRequest(model=name))
        deadline = time.monotonic() + 10
        while name not in live.server.repository.catalogue.folders:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert served_version(live, f"{name}@stable") == 1
    # What is removed stays so: the file is asked once.
    stub_of(live).SetAlias(pb.SetAliasRequest(model="seen", alias="stable"))
    live.run(live.server.repository.refresh())
    with pytest.raises(grpc.RpcError) as caught:
        served_version(live, "seen@stable")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_a_start_removes_what_uploads_have_left(
    starters: Path, start: Start, tmp_path: Path
) -> None:
    models = copy_models(starters, tmp_path / "models", "iris")
    alone, beside = models / "new" / ".upload-1-7-8", models / "iris" / ".upload-2-7-9"
    for left in (alone, beside):
        left.mkdir(parents=True)
        (left / "model.onnx").write_bytes(b"half of it")
    live = start(models)
    assert served_version(live) == 1
    assert not alone.parent.exists()
    assert not beside.exists()


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("config.json", "the folder has no ONNX file"),
        ("model.safetensors", "forebay export huggingface"),
        ("pytorch_model.bin", "pytorch_model.bin is never read by the server"),
    ],
)
def test_a_folder_without_an_onnx_file_is_in_the_index_with_the_reason(
    starters: Path, start: Start, tmp_path: Path, file: str, said: str
) -> None:
    models = copy_models(starters, tmp_path / "models", "iris")
    (models / "mine").mkdir()
    (models / "mine" / file).write_text('{"model_type": "bert"}')
    live = start(models)
    found = {m.name: m for m in stub_of(live).ListModels(pb.ListModelsRequest()).models}
    [version] = found["mine"].versions
    assert version.state == pb.MODEL_STATE_FAILED
    assert said in version.reason
