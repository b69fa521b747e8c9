"""The doors of other APIs: OpenAI's, Cohere's and the Open Inference Protocol, on the real models."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import Start, copy_models
from tests.integration.gateway import Gateway


@pytest.fixture(scope="module")
def gateway(
    starters: Path, start: Start, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    root = tmp_path_factory.mktemp("models")
    running = Gateway(start(copy_models(starters, root, "iris", "minilm", "sentiment")))
    yield running
    running.stop()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings?api-version=2024-02-01", {"model": "minilm", "input": "a"}),
        ("/v2/rerank?beta=true", {"model": "minilm", "query": "a", "documents": ["a"]}),
    ],
)
def test_queries_that_other_apis_clients_add_are_taken(gateway: Gateway, path, body) -> None:
    assert gateway.http.post(path, json=body).status_code == 200


def test_openai_sdk_embeddings_models_moderations(gateway: Gateway) -> None:
    import openai

    client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none")
    default = client.embeddings.create(model="minilm", input=["hello", "world"])
    floats = client.embeddings.create(model="minilm", input="hello", encoding_format="float")
    assert np.allclose(default.data[0].embedding, floats.data[0].embedding, atol=1e-6)
    assert default.usage.total_tokens == 6
    ids = client.embeddings.create(model="minilm", input=[[101, 7592, 102]])
    assert np.allclose(ids.data[0].embedding, floats.data[0].embedding, atol=1e-5)
    assert "minilm" in [m.id for m in client.models.list()]
    assert client.models.retrieve("minilm").object == "model"
    result = client.moderations.create(model="sentiment", input=["This is awful.", "Lovely!"])
    assert [r.flagged for r in result.results] == [True, False]
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="nope", input="a")
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model="minilm", input="a", dimensions=3)
    assert "384" in str(caught.value)
    long = "a" * 1_000_001
    for given, param in ((long, "input"), (["a", long], "input[1]")):
        with pytest.raises(openai.APIStatusError) as caught:
            client.moderations.create(model="sentiment", input=given)
        assert caught.value.param == param
        with pytest.raises(openai.APIStatusError) as caught:
            client.embeddings.create(model="minilm", input=given)
        assert caught.value.param == param


def test_openai_sdk_hears_of_inputs_that_are_cut_and_may_refuse_that(gateway: Gateway) -> None:
    import openai

    client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none")
    create = client.embeddings.create
    long = ["short", "start " + "middle " * 1000 + "end"]
    by_default = create(model="minilm", input=long)
    assert by_default.usage.truncated == 1  # pyright: ignore[reportAttributeAccessIssue]
    whole = create(model="minilm", input=long[:1])
    assert whole.usage.model_dump() == {"prompt_tokens": 3, "total_tokens": 3}
    end = create(model="minilm", input=long, extra_body={"truncation": "end"})
    start = create(model="minilm", input=long, extra_body={"truncation": "start"})
    assert end.data[1].embedding == by_default.data[1].embedding != start.data[1].embedding
    for given, param in ((long, "input[1]"), (long[1], "input")):
        with pytest.raises(openai.BadRequestError) as caught:
            create(model="minilm", input=given, extra_body={"truncation": "none"})
        assert caught.value.param == param
        assert "the model takes 256 and truncation is off" in str(caught.value)
    with pytest.raises(openai.BadRequestError, match="allowed are end, start, none"):
        create(model="minilm", input="a", extra_body={"truncation": "cut"})


def test_base64_and_float_are_the_same_numbers(gateway: Gateway) -> None:
    body = {"model": "minilm", "input": "same"}
    floats = gateway.http.post("/v1/embeddings", json=body).json()["data"][0]["embedding"]
    coded = gateway.http.post("/v1/embeddings", json=body | {"encoding_format": "base64"})
    raw = base64.b64decode(coded.json()["data"][0]["embedding"])
    assert np.array_equal(np.frombuffer(raw, np.float32), np.array(floats, np.float32))


def test_rerank_in_coheres_shape(gateway: Gateway) -> None:
    body = {
        "model": "minilm",
        "query": "vaccines",
        "documents": ["cars", {"text": "immunity by vaccination"}],
        "top_n": 1,
        "return_documents": True,
    }
    result = gateway.http.post("/v1/rerank", json=body).json()["results"]
    assert [r["index"] for r in result] == [1]
    assert result[0]["document"]["text"] == "immunity by vaccination"


def test_open_inference_json_and_binary(gateway: Gateway) -> None:
    names = ("sepal_length", "sepal_width", "petal_length", "petal_width")
    inputs = [
        {"name": n, "datatype": "FP32", "shape": [2, 1], "data": [[5.1], [6.9]]} for n in names
    ]
    answer = gateway.http.post("/v2/models/iris/infer", json={"id": "x", "inputs": inputs}).json()
    assert answer["id"] == "x"
    outputs = {o["name"]: o for o in answer["outputs"]}
    assert outputs["label"]["shape"] == [2]
    assert sum(outputs["probabilities"]["data"][:3]) == pytest.approx(1, abs=1e-5)
    raw = np.array([5.1, 6.9], "<f4").tobytes()
    for one in inputs:
        del one["data"]
        one["parameters"] = {"binary_data_size": len(raw)}
    head = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()
    binary = gateway.http.post(
        "/v2/models/iris/infer",
        content=head + raw * 4,
        headers={"inference-header-content-length": str(len(head))},
    )
    size = int(binary.headers["inference-header-content-length"])
    described = json.loads(binary.content[:size])["outputs"]
    assert sum(o["parameters"]["binary_data_size"] for o in described) == len(binary.content) - size
    assert gateway.http.get("/v2/health/ready").status_code == 200
    assert gateway.http.get("/v2/models/nope").status_code == 404
    assert "error" in gateway.http.post("/v2/models/iris/infer", json={"inputs": 3}).json()
