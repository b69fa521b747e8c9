"""What an error says to who made a mistake: the wrong thing, and what would be right."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import forebay
import grpc
import pytest
from forebay.v1 import embedding_pb2, embedding_pb2_grpc
from google.rpc import error_details_pb2, status_pb2

from tests.conftest import Live, Start, copy_models
from tests.integration.gateway import Gateway


@pytest.mark.parametrize(
    ("path", "body", "field", "known"),
    [  # a route of the server itself, routes of the gateway, a nested message
        ("embeddings:embed", {"text": ["a"]}, "text", "texts"),
        ("tokens:tokenize", {"text": "a"}, "text", "texts"),
        ("collections", {"name": "c"}, "name", "collection"),
        ("collections", {"collection": "c", "config": {"dimension": 3}}, "config.dimension", "dimensions"),
    ],
)  # fmt: skip
def test_an_unknown_field_is_answered_with_the_known_ones(
    gateway: Gateway, path: str, body: dict, field: str, known: str
) -> None:
    answer = gateway.http.post(f"/api/v1/{path}", json=body)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["param"] == field
    said, _, names = error["message"].partition("; known are ")
    assert said == f"{field}: is no field of this request"
    assert known in names.split(", ")


def test_what_does_not_match_its_pattern_is_said_with_the_value(gateway: Gateway) -> None:
    answer = gateway.http.get("/api/v1/usage", params={"from_day": "yesterday"})
    assert answer.status_code == 400
    description = r"is 'yesterday'; it must match \d{4}-\d{2}-\d{2}"
    assert answer.json()["error"]["message"] == f"from_day: {description}"


@pytest.mark.parametrize(
    ("model", "hint"),
    [("minilmm", "Did you mean minilm, minilm-int8?"), ("gpt-4o", "Known are digits, housing, ")],
)
def test_an_unknown_model_is_answered_with_what_is_near_or_there(
    gateway: Gateway, model: str, hint: str
) -> None:
    answer = gateway.http.post("/v1/embeddings", json={"model": model, "input": "a"})
    assert answer.status_code == 404
    assert f"model {model!r} was not found. {hint}" in answer.json()["error"]["message"]


def test_a_model_of_another_task_is_answered_with_those_of_the_right_one(
    starters: Path, start: Start, tmp_path: Path
) -> None:
    """Also with those that are not loaded; not with broken ones, nor with what the key may not use."""
    models = copy_models(starters, tmp_path / "models", "iris", "minilm")
    (models / "minilm" / "model.yaml").unlink(missing_ok=True)
    (models / "minilm" / "model.yaml").write_text("execution: {preload: false}\n")
    for name, yaml in (("secret", "execution: {preload: false}\n"), ("broken", "engnie: x\n")):
        shutil.copytree(models / "minilm", models / name, copy_function=os.link)
        (models / name / "model.yaml").unlink()
        (models / name / "model.yaml").write_text(yaml)
    live = start(models, auth__required="always")
    create = live.server.keys.create
    anything = live.run(create("a", ("infer", "read")))[1]
    some = live.run(create("b", ("infer",), models=("iris", "minilm")))[1]
    for secret, named in ((anything, "minilm, secret"), (some, "minilm")):
        with pytest.raises(grpc.RpcError) as caught:
            embedding_pb2_grpc.EmbeddingServiceStub(live.channel).Embed(
                embedding_pb2.EmbedRequest(model="iris", texts=["a"]),
                metadata=[("authorization", f"Bearer {secret}")],
            )
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        said = str(caught.value.details())
        assert said.endswith(f"this call needs embedding; models for it are {named}")
    assert set(live.server.repository.pool.loaded) == {("iris", 1)}


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("/api/v1/embeddings", " Did you mean /v1/embeddings, /api/v1/embeddings:embed?"),
        ("/v1/chat/completion", " Did you mean /v1/chat/completions"),
        ("/nothing/like/it", ""),
    ],
)
def test_an_unknown_path_is_answered_with_near_ones(gateway: Gateway, path: str, hint: str) -> None:
    answer = gateway.http.post(path, json={})
    assert answer.status_code == 404
    said, _, rest = answer.json()["error"]["message"].partition("was not found.")
    assert said == f"path '{path}' "
    assert rest.startswith(hint)
    assert bool(rest) == bool(hint)


def test_a_wrong_method_is_answered_with_those_that_the_path_takes(gateway: Gateway) -> None:
    for path, taken in (("/api/v1/embeddings:embed", "POST"), ("/v1/files", "GET, POST")):
        answer = gateway.http.put(path)
        assert answer.status_code == 405
        assert answer.headers["allow"] == taken
        assert answer.json()["error"]["message"] == f"{path} does not take PUT; it takes {taken}"


def test_a_knowledge_base_of_an_unknown_language_is_refused_at_its_own_field(
    gateway: Gateway,
) -> None:
    body = {"knowledge_base": "h", "config": {"language": "english"}}
    answer = gateway.http.post("/api/v1/knowledge", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "config.language"
    assert "known are ar, da, de" in answer.json()["error"]["message"]


@pytest.mark.parametrize("kind", ["unary_unary", "stream_stream"])
def test_a_method_that_the_server_lacks_is_named_with_the_servers_version(
    live: Live, kind: str
) -> None:
    method = "/forebay.v1.EmbeddingService/EmbedImages"
    call = getattr(live.channel, kind)(method)
    with pytest.raises(grpc.RpcError) as caught:
        if kind == "unary_unary":
            call(b"", timeout=10)
        else:
            next(call(iter([b""]), timeout=10))
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    said = f"{method} is no method of this server, which is forebay {forebay.__version__}; "
    assert str(caught.value.details()).startswith(said)
    details = dict(caught.value.trailing_metadata())["grpc-status-details-bin"]  # type: ignore[attr-defined]
    info = error_details_pb2.ErrorInfo()
    assert status_pb2.Status.FromString(details).details[0].Unpack(info)
    assert info.reason == "UNIMPLEMENTED"
