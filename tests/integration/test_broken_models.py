"""Models whose files are damaged, or that find no room: what callers hear, and what those who can mend it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import onnx
import pytest
from forebay.errors import Unavailable
from forebay.oip import open_inference_pb2 as oip
from forebay.oip import open_inference_pb2_grpc as oip_grpc
from forebay.v1 import embedding_pb2, embedding_pb2_grpc, model_pb2, model_pb2_grpc
from forebay_server.repository import pool
from google.rpc import error_details_pb2, status_pb2

from tests.conftest import Live, Start, copy_models
from tests.integration.gateway import Gateway
from tests.integration.test_access import bearer
from tests.integration.test_registry import served_version, stub_of

LATE = "execution: {preload: false}\n"


def of_opset_99(data: bytes) -> bytes:
    model = onnx.load_model_from_string(data)
    model.opset_import[0].version = 99
    return model.SerializeToString()


#: What is done to a file, and a word of what is said of it.
DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "stranger": (lambda _: b"this is not ONNX", "Protobuf"),
    "cut": (lambda data: data[: len(data) // 2], "Protobuf"),
    "opset": (of_opset_99, "Opset 99"),
}


@dataclass
class Broken:
    """A server that asks for keys, with damaged models; `iris` is whole."""

    live: Live
    gateway: Gateway
    models: Path
    admin: str
    caller: str


@pytest.fixture(scope="module")
def broken(
    starters: Path, start: Start, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Broken]:
    models = copy_models(starters, tmp_path_factory.mktemp("a folder") / "models", "iris")
    whole = (starters / "iris" / "1" / "model.onnx").read_bytes()
    for name, (damage, _) in DAMAGES.items():
        (models / name / "1").mkdir(parents=True)
        (models / name / "1" / "model.onnx").write_bytes(damage(whole))
        if name != "cut":  # that one is loaded with the server
            (models / name / "model.yaml").write_text(LATE)
    live = start(models, auth__required="always")
    create = live.server.keys.create
    admin = live.run(create("admin", ("infer", "read", "admin")))[1]
    caller = live.run(create("caller", ("infer", "read")))[1]
    gateway = Gateway(live)
    yield Broken(live, gateway, models, admin, caller)
    gateway.stop()


def embed(live: Live, model: str, secret: str = "") -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        embedding_pb2_grpc.EmbeddingServiceStub(live.channel).Embed(
            embedding_pb2.EmbedRequest(model=model, texts=["a"]),
            metadata=bearer(secret) if secret else None,
        )
    return caught.value


def details(error: grpc.RpcError) -> tuple[str, float | None]:
    """The reason, and RetryInfo's seconds where there is one."""
    metadata = {m.key: m.value for m in error.trailing_metadata()}
    reason, retry = "", None
    info, delay = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    for detail in status_pb2.Status.FromString(metadata["grpc-status-details-bin"]).details:
        if detail.Unpack(info):
            reason = info.reason
        elif detail.Unpack(delay):
            retry = delay.retry_delay.ToNanoseconds() / 1e9
    return reason, retry


@pytest.mark.parametrize("name", DAMAGES)
def test_callers_hear_that_it_has_to_be_mended_and_not_where_it_lies(
    broken: Broken, name: str
) -> None:
    for _ in range(2):  # the first call loads it, the second knows what came of that
        error = embed(broken.live, name, broken.caller)
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert details(error) == ("MODEL_REJECTED", None)
        said = str(error.details())
        assert said.startswith(f"model {name}@1 cannot be served until it is mended: model.onnx ")
        assert DAMAGES[name][1] in said
        assert "/" not in said


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/v1/embeddings:embed", {"model": "stranger", "texts": ["a"]}),
        ("/v1/embeddings", {"model": "stranger", "input": "a"}),
        ("/v1/chat/completions", {"model": "stranger", "messages": [{"role": "user", "content": "a"}]}),
        ("/v2/models/stranger/infer", {"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [1]}]}),
        ("/v2/models/stranger", None),
    ],
)  # fmt: skip
def test_every_http_door_says_so(broken: Broken, path: str, body: dict | None) -> None:
    headers = dict(bearer(broken.caller))
    answer = broken.gateway.http.request(
        "POST" if body else "GET", path, json=body, headers=headers
    )
    assert answer.status_code == 400, answer.text
    assert "retry-after" not in answer.headers
    assert "until it is mended" in answer.text
    assert str(broken.models.parent.name) not in answer.text
    if not path.startswith("/v2"):
        assert answer.json()["error"]["code"] == "model_rejected"


def test_the_open_inference_protocol_says_so(broken: Broken) -> None:
    stub = oip_grpc.GRPCInferenceServiceStub(broken.live.channel)
    key = bearer(broken.caller)
    assert not stub.ModelReady(oip.ModelReadyRequest(name="cut"), metadata=key).ready
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelMetadata(oip.ModelMetadataRequest(name="cut"), metadata=key)
    assert details(caught.value) == ("MODEL_REJECTED", None)
    [answer] = stub.ModelStreamInfer(iter([oip.ModelInferRequest(model_name="cut")]), metadata=key)
    assert "until it is mended" in answer.error_message
    assert "/" not in answer.error_message


def test_the_path_is_for_the_admin_scope(broken: Broken) -> None:
    embed(broken.live, "stranger", broken.caller)
    full = str(broken.models / "stranger" / "1" / "model.onnx")
    for secret, shown in ((broken.admin, True), (broken.caller, False)):
        stub = model_pb2_grpc.ModelServiceStub(broken.live.channel)
        request = model_pb2.GetModelRequest(model="stranger")
        [version] = stub.GetModel(request, metadata=bearer(secret)).model.versions
        index = oip_grpc.GRPCInferenceServiceStub(broken.live.channel).RepositoryIndex(
            oip.RepositoryIndexRequest(), metadata=bearer(secret)
        )
        watched = stub.WatchModels(
            model_pb2.WatchModelsRequest(model="stranger"), metadata=bearer(secret)
        )
        reasons = [version.reason, *(m.reason for m in index.models if m.name == "stranger")]
        reasons.append(next(iter(watched)).model.versions[0].reason)
        watched.cancel()
        for reason in reasons:
            assert (full in reason) == shown
            assert "model.onnx" in reason


def test_the_log_has_the_path(
    starters: Path, start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    models = copy_models(starters, tmp_path / "models", "iris")
    file = models / "stranger" / "1" / "model.onnx"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"this is not ONNX")
    (models / "stranger" / "model.yaml").write_text(LATE)
    live = start(models)
    for _ in range(2):
        embed(live, "stranger")
    said = [r.getMessage() for r in caplog.records if "stranger@1 is not served" in r.getMessage()]
    assert len(said) == 1
    assert str(file) in said[0]


@pytest.mark.parametrize("file", ["model.onnx", "model.yaml"])
def test_a_model_that_is_mended_serves_its_next_call(
    starters: Path, start: Start, tmp_path: Path, file: str
) -> None:
    models = copy_models(starters, tmp_path / "models", "iris")
    folder = models / "iris"
    (folder / "model.yaml").unlink(missing_ok=True)
    (folder / "model.yaml").write_text(LATE)
    if file == "model.onnx":
        (folder / "1" / file).unlink()
        (folder / "1" / file).write_bytes(b"this is not ONNX")
    else:  # what it says can be read, and does not fit the model
        (folder / file).write_text(LATE + "batching: {length_buckets: [16]}\n")
    live = start(models)
    for _ in range(2):
        with pytest.raises(grpc.RpcError) as caught:
            served_version(live)
        assert details(caught.value) == ("MODEL_REJECTED", None)
        live.run(live.server.repository.refresh())  # nothing has changed
    if file == "model.onnx":
        shutil.copy(starters / "iris" / "1" / file, folder / "1" / file)
    else:
        (folder / file).write_text(LATE + "batching: {max_batch_size: 16}\n")
    live.run(live.server.repository.refresh())
    assert served_version(live) == 1


def test_a_model_without_room_says_when_to_come_again_and_is_served_once_there_is_some(
    starters: Path, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = copy_models(starters, tmp_path / "models", "housing", "iris")
    shutil.copytree(models / "housing", models / "second")
    for name in ("second", "iris"):
        (models / name / "model.yaml").unlink(missing_ok=True)
        (models / name / "model.yaml").write_text(LATE)
    size = (models / "housing" / "1" / "model.onnx").stat().st_size
    live = start(models, models__memory_budget_bytes=int(size * 2))
    assert served_version(live) == 1
    for _ in range(2):
        error = embed(live, "second")
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        reason, retry = details(error)
        assert reason == "MODEL_NOT_READY"
        assert retry is not None and 0 < retry <= pool.RETRY_S
    # No model was evicted for one that does not fit even so.
    versions = stub_of(live).GetModel(model_pb2.GetModelRequest(model="iris")).model.versions
    assert versions[0].state == model_pb2.MODEL_STATE_READY
    monkeypatch.setattr(pool, "RETRY_S", 0.0)  # a caller that has waited
    with pytest.raises(grpc.RpcError):
        stub_of(live).LoadModel(model_pb2.LoadModelRequest(model="second"))
    stub_of(live).UnloadModel(model_pb2.UnloadModelRequest(model="housing"))
    error = embed(live, "second")  # it is loaded, and does no embeddings
    assert details(error)[0] == "WRONG_TASK"


def test_a_load_that_failed_for_what_passes_is_tried_again(
    starters: Path, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = copy_models(starters, tmp_path / "models", "iris")
    (models / "iris" / "model.yaml").unlink(missing_ok=True)
    (models / "iris" / "model.yaml").write_text(LATE)
    live = start(models)
    load, killed = pool.load, Unavailable("the model's process died", reason="ENGINE_DIED")

    def dies(*_: object) -> None:
        raise killed

    monkeypatch.setattr(pool, "load", dies)
    for _ in range(2):  # the second is not loaded again
        error = embed(live, "iris")
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        reason, retry = details(error)
        assert reason == "MODEL_NOT_READY"
        assert retry is not None and 0 < retry <= pool.RETRY_S
    monkeypatch.setattr(pool, "RETRY_S", 0.0)  # a caller that has waited
    with pytest.raises(grpc.RpcError):
        stub_of(live).LoadModel(model_pb2.LoadModelRequest(model="iris"))
    monkeypatch.setattr(pool, "load", load)
    assert served_version(live) == 1
