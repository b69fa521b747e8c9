"""ModelService: versions, aliases, traffic, promotion, import, events; state over restarts."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from pathlib import Path

import grpc
import pytest
from forebay.methods import methods
from forebay.oip import open_inference_pb2 as oip
from forebay.oip import open_inference_pb2_grpc as oip_grpc
from forebay.v1 import (
    embedding_pb2,
    embedding_pb2_grpc,
    model_pb2_grpc,
    tabular_pb2,
    tabular_pb2_grpc,
)
from forebay.v1 import model_pb2 as pb
from forebay_server.core.call import Call
from forebay_server.dataplane.registry import Registry
from forebay_server.services.model import ModelService
from google.protobuf import json_format

from tests.conftest import Live, Start, copy_models

IRIS = {"sepal_length": 5.1, "sepal_width": 3.5, "petal_length": 1.4, "petal_width": 0.2}


@pytest.fixture
def versions(starters: Path, start: Start, tmp_path: Path) -> Live:
    """A server with three versions of iris, all of them kept loaded."""
    models = copy_models(starters, tmp_path / "models", "iris")
    for version in ("2", "3"):
        shutil.copytree(models / "iris" / "1", models / "iris" / version)
    (models / "iris" / "model.yaml").unlink()
    (models / "iris" / "model.yaml").write_text(
        "version_policy: all\ndefault_for: [tabular-classification]\n"
    )
    return start(models, home=tmp_path / "home")


def stub_of(live: Live) -> model_pb2_grpc.ModelServiceStub:
    return model_pb2_grpc.ModelServiceStub(live.channel)


def served_version(live: Live, model: str = "iris", key: str = "") -> int:
    request = json_format.ParseDict(
        {"rows": [IRIS], "model": model, "sticky_key": key}, tabular_pb2.PredictRequest()
    )
    answer = tabular_pb2_grpc.TabularServiceStub(live.channel).Predict(request)
    return answer.served_by.version


def test_a_bare_name_is_the_newest_version_and_a_reference_the_one_it_names(versions: Live) -> None:
    assert served_version(versions) == 3
    assert served_version(versions, "iris@1") == 1
    with pytest.raises(grpc.RpcError) as caught:
        served_version(versions, "iris@9")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_a_call_without_a_model_is_told_whose_default_is_missing(
    starters: Path, start: Start, tmp_path: Path
) -> None:
    models = copy_models(starters, tmp_path / "models", "iris", "digits", "sentiment")
    (models / "iris" / "model.yaml").unlink()
    live = start(models, home=tmp_path / "home")
    with pytest.raises(grpc.RpcError) as several:
        served_version(live, model="")
    with pytest.raises(grpc.RpcError) as none:
        embedding_pb2_grpc.EmbeddingServiceStub(live.channel).Embed(
            embedding_pb2.EmbedRequest(texts=["a"])
        )
    for caught in (several, none):
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    said = several.value.details() or ""
    assert "no default model is set for" in said and "name one of digits, iris, or" in said
    assert "`default_for: [tabular-classification]`" in said and "sentiment" not in said
    said = none.value.details() or ""
    assert "no default model is set for embedding; no model here is for that task" in said
    assert not any(name in said for name in ("digits", "iris", "sentiment"))


def test_promote_and_rollback_move_production_and_keep_history(versions: Live) -> None:
    stub = stub_of(versions)
    stub.Promote(pb.PromoteRequest(model="iris", version=1))
    stub.Promote(pb.PromoteRequest(model="iris", version=2))
    assert served_version(versions) == 2
    stub.Rollback(pb.RollbackRequest(model="iris"))
    assert served_version(versions) == 1
    assert served_version(versions, "iris@production") == 1
    history = stub.GetModel(pb.GetModelRequest(model="iris")).history
    assert [(h.action, h.to_version) for h in history] == [
        ("rollback", 1),
        ("promote", 2),
        ("promote", 1),
    ]
    with pytest.raises(grpc.RpcError) as caught:
        stub.Rollback(pb.RollbackRequest(model="iris"))
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION


def test_a_split_shares_callers_and_keeps_each_on_one_version(versions: Live) -> None:
    stub_of(versions).SetTraffic(
        pb.SetTrafficRequest(
            model="iris", shares=[{"version": 1, "weight": 70}, {"version": 2, "weight": 30}]
        )
    )
    first = {f"user-{i}": served_version(versions, key=f"user-{i}") for i in range(200)}
    assert set(first.values()) == {1, 2}
    share = sum(v == 1 for v in first.values()) / 200
    assert 0.55 < share < 0.85
    for key, version in list(first.items())[:30]:
        assert served_version(versions, key=key) == version


def test_a_shadow_computes_and_nobody_sees_it(versions: Live) -> None:
    stub = stub_of(versions)
    stub.Promote(pb.PromoteRequest(model="iris", version=1))
    stub.SetTraffic(pb.SetTrafficRequest(model="iris", shadow=pb.Shadow(version=3, fraction=1.0)))
    for _ in range(5):
        assert served_version(versions) == 1
    deadline = time.monotonic() + 5
    while True:
        stats = {v.version: v.rows for v in stub.GetStatistics(pb.GetStatisticsRequest()).versions}
        if stats.get(3, 0) >= 5 or time.monotonic() > deadline:
            break
        time.sleep(0.02)
    assert stats[3] == 5


def test_routing_survives_a_restart(versions: Live, start: Start) -> None:
    stub = stub_of(versions)
    stub.SetAlias(pb.SetAliasRequest(model="iris", alias="staging", version=2))
    stub.Promote(pb.PromoteRequest(model="iris", version=1))
    versions.stop()
    again = start(versions.settings.models_root, home=versions.settings.home)
    assert served_version(again) == 1
    assert served_version(again, "iris@staging") == 2


def test_a_broken_version_is_refused_with_its_fault_and_the_old_one_serves(
    starters: Path, start: Start, tmp_path: Path
) -> None:
    models = copy_models(starters, tmp_path / "models", "iris")
    live = start(models)
    shutil.copytree(models / "iris" / "1", models / "iris" / "2")
    broken = models / "iris" / "2" / "model.onnx"
    data = broken.read_bytes()
    broken.unlink()
    broken.write_bytes(data[: len(data) // 2])
    with pytest.raises(grpc.RpcError) as caught:
        stub_of(live).LoadModel(pb.LoadModelRequest(model="iris"))
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "model.onnx" in caught.value.details()
    assert served_version(live) == 1
    index = oip_grpc.GRPCInferenceServiceStub(live.channel).RepositoryIndex(
        oip.RepositoryIndexRequest()
    )
    states = {m.version: (m.state, m.reason) for m in index.models}
    assert states["1"][0] == "READY"
    assert states["2"][0] == "UNAVAILABLE"
    assert "model.onnx" in states["2"][1]


def test_a_new_version_is_loaded_when_it_appears(
    starters: Path, start: Start, tmp_path: Path
) -> None:
    models = copy_models(starters, tmp_path / "models", "iris")
    live = start(models, models__poll_s=0.1)
    assert served_version(live) == 1
    shutil.copytree(models / "iris" / "1", models / ".staged")
    (models / ".staged").rename(models / "iris" / "2")
    deadline = time.monotonic() + 10
    while served_version(live) != 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_unloaded_model_is_loaded_again_by_its_next_call(
    starters: Path, start: Start, tmp_path: Path
) -> None:
    live = start(copy_models(starters, tmp_path / "models", "iris"))
    answer = stub_of(live).UnloadModel(pb.UnloadModelRequest(model="iris"))
    assert answer.model.versions[0].state == pb.MODEL_STATE_AVAILABLE
    answers: list[int] = []
    threads = [
        threading.Thread(target=lambda: answers.append(served_version(live))) for _ in range(8)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert answers == [1] * 8


def test_a_memory_budget_evicts_what_was_used_longest_ago(
    starters: Path, start: Start, tmp_path: Path
) -> None:
    models = copy_models(starters, tmp_path / "models", "iris", "housing")
    shutil.copytree(models / "housing", models / "second")
    for name in ("iris", "housing", "second"):
        (models / name / "model.yaml").unlink(missing_ok=True)
        (models / name / "model.yaml").write_text("execution: {preload: false}\n")
    size = (models / "housing" / "1" / "model.onnx").stat().st_size
    live = start(models, models__memory_budget_bytes=int(size * 2))
    stub = stub_of(live)
    stub.LoadModel(pb.LoadModelRequest(model="iris"))
    stub.LoadModel(pb.LoadModelRequest(model="housing"))
    stub.LoadModel(pb.LoadModelRequest(model="second"))
    states = {m.name: m.versions[0].state for m in stub.ListModels(pb.ListModelsRequest()).models}
    assert states["second"] == pb.MODEL_STATE_READY
    assert states["housing"] == pb.MODEL_STATE_AVAILABLE


def test_a_bare_call_means_the_same_whether_models_were_listed_or_not(
    starters: Path, start: Start, tmp_path: Path
) -> None:
    models = copy_models(starters, tmp_path / "models", "iris")
    (models / "iris" / "model.yaml").unlink(missing_ok=True)
    shutil.copytree(models / "iris", models / "second")
    (models / "second" / "model.yaml").write_text("execution: {preload: false}\n")
    live = start(models)
    for _ in range(2):
        with pytest.raises(grpc.RpcError) as caught:
            served_version(live, "")
        assert "name one of iris, second" in str(caught.value.details())
        stub_of(live).ListModels(pb.ListModelsRequest())


def upload(folder: Path, model: str, piece: int = 1000, **header):
    """The stream of an import, in pieces of so many bytes."""
    yield pb.ImportVersionRequest(header=pb.ImportHeader(model=model, **header))
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        for i in range(0, max(1, len(data)), piece):
            yield pb.ImportVersionRequest(chunk={"path": path.name, "data": data[i : i + piece]})


def test_import_makes_a_version_that_serves(starters: Path, start: Start, tmp_path: Path) -> None:
    live = start(copy_models(starters, tmp_path / "models", "iris"))
    stub = stub_of(live)
    answer = stub.ImportVersion(upload(starters / "iris" / "1", "flowers", load=True))
    assert answer.version == 1
    assert served_version(live, "flowers") == 1
    assert stub.ImportVersion(upload(starters / "iris" / "1", "flowers")).version == 2


@pytest.mark.parametrize("path", ["../evil.onnx", "/etc/evil", "model.pkl"])
def test_import_refuses_paths_and_pickles(
    starters: Path, start: Start, tmp_path: Path, path: str
) -> None:
    live = start(copy_models(starters, tmp_path / "models", "iris"))
    parts = [
        pb.ImportVersionRequest(header=pb.ImportHeader(model="bad")),
        pb.ImportVersionRequest(chunk={"path": path, "data": b"x"}),
    ]
    with pytest.raises(grpc.RpcError) as caught:
        stub_of(live).ImportVersion(iter(parts))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert not (tmp_path / "models" / "bad").exists()


def test_watchers_see_loads_and_unloads(starters: Path, start: Start, tmp_path: Path) -> None:
    live = start(copy_models(starters, tmp_path / "models", "iris"))
    stub = stub_of(live)
    stream = stub.WatchModels(pb.WatchModelsRequest())
    events = iter(stream)
    assert next(events).event == "current"
    stub.UnloadModel(pb.UnloadModelRequest(model="iris"))
    assert next(events).event == "unloaded"
    stub.LoadModel(pb.LoadModelRequest(model="iris"))
    assert [next(events).event for _ in range(2)] == ["loading", "loaded"]
    stream.cancel()


def test_what_changes_while_the_current_state_is_told_is_told_too(
    starters: Path, start: Start, tmp_path: Path
) -> None:
    """A reader may be slow: between the first message and its taking anything may happen."""
    live = start(copy_models(starters, tmp_path / "models", "iris"))
    repository = live.server.repository
    method = methods()["/forebay.v1.ModelService/WatchModels"]
    call = Call(method, {}, started=0.0, on_end=lambda _: None)
    call.request = pb.WatchModelsRequest()

    async def watched() -> list[str]:
        answers = ModelService(Registry(repository), repository).watch_models(call)
        seen = [(await anext(answers)).event]
        repository.events.publish("unloaded", "iris", 1)
        seen.append((await asyncio.wait_for(anext(answers), 5)).event)
        return seen

    assert live.run(watched()) == ["current", "unloaded"]


def test_an_onnx_file_alone_is_served_without_configuration(
    starters: Path, start: Start, tmp_path: Path
) -> None:
    folder = tmp_path / "models" / "plain"
    folder.mkdir(parents=True)
    shutil.copy(starters / "iris" / "1" / "model.onnx", folder / "net.onnx")
    live = start(tmp_path / "models")
    stub = oip_grpc.GRPCInferenceServiceStub(live.channel)
    meta = stub.ModelMetadata(oip.ModelMetadataRequest(name="plain"))
    assert {i.name for i in meta.inputs} == set(IRIS)
