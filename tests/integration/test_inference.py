"""Every inference service through the real wire, on the real starter models."""

from __future__ import annotations

import json

import grpc
import numpy as np
import pytest
from forebay.oip import open_inference_pb2 as oip
from forebay.oip import open_inference_pb2_grpc as oip_grpc
from forebay.v1 import (
    classification_pb2,
    classification_pb2_grpc,
    embedding_pb2,
    embedding_pb2_grpc,
    rerank_pb2,
    rerank_pb2_grpc,
    tabular_pb2,
    tabular_pb2_grpc,
    token_pb2,
    token_pb2_grpc,
)
from google.protobuf import json_format
from google.rpc import error_details_pb2, status_pb2

from tests.conftest import Live

ROW = {
    "longitude": -122.23,
    "latitude": 37.88,
    "housing_median_age": 41,
    "total_rooms": 880,
    "total_bedrooms": 129,
    "population": 322,
    "households": 126,
    "median_income": 8.3252,
    "ocean_proximity": "NEAR BAY",
}


def predict_request(*rows: dict, **fields) -> tabular_pb2.PredictRequest:
    return json_format.ParseDict({"rows": list(rows), **fields}, tabular_pb2.PredictRequest())


def violations(error: grpc.RpcError) -> dict[str, str]:
    """Field path -> description of a call's BadRequest detail."""
    for key, value in error.trailing_metadata():
        if key == "grpc-status-details-bin":
            bad = error_details_pb2.BadRequest()
            for detail in status_pb2.Status.FromString(value).details:
                if detail.Unpack(bad):
                    return {v.field: v.description for v in bad.field_violations}
    return {}


def test_predict_gives_a_price_per_row_in_order(live: Live) -> None:
    stub = tabular_pb2_grpc.TabularServiceStub(live.channel)
    rich, poor = ROW, ROW | {"median_income": 1.0, "ocean_proximity": "INLAND"}
    answer = stub.Predict(predict_request(rich, poor, rich))
    values = [p.value for p in answer.predictions]
    assert values[0] == values[2] > values[1] > 10_000
    assert answer.served_by.model == "housing"
    assert answer.usage.items == 3


def test_predict_by_columns_equals_predict_by_rows(live: Live) -> None:
    stub = tabular_pb2_grpc.TabularServiceStub(live.channel)
    request = tabular_pb2.PredictRequest()
    for name, value in ROW.items():
        if isinstance(value, str):
            request.columns.add(name=name, strings=[value, value])
        else:
            request.columns.add(name=name, numbers=[value, value])
    by_columns = stub.Predict(request).predictions
    by_rows = stub.Predict(predict_request(ROW, ROW)).predictions
    assert [p.value for p in by_columns] == [p.value for p in by_rows]


def test_predict_takes_missing_values_where_the_signature_allows(live: Live) -> None:
    stub = tabular_pb2_grpc.TabularServiceStub(live.channel)
    answer = stub.Predict(predict_request(ROW | {"total_bedrooms": None}))
    assert answer.predictions[0].value > 0


def test_predict_names_every_bad_field_with_its_path(live: Live) -> None:
    stub = tabular_pb2_grpc.TabularServiceStub(live.channel)
    bad = ROW | {"longitude": "west", "rooms": 3, "population": None}
    with pytest.raises(grpc.RpcError) as caught:
        stub.Predict(predict_request(ROW, bad))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    found = violations(caught.value)
    assert set(found) == {"rows[1].longitude", "rows[0].rooms", "rows[1].population"} or set(
        found
    ) >= {"rows[1].longitude", "rows[1].population"}
    assert "a number is needed" in found["rows[1].longitude"]


def test_predict_warns_of_values_beyond_training(live: Live) -> None:
    stub = tabular_pb2_grpc.TabularServiceStub(live.channel)
    answer = stub.Predict(predict_request(ROW | {"median_income": 99, "ocean_proximity": "MOON"}))
    text = " ".join(answer.predictions[0].warnings)
    assert "median_income is 99" in text
    assert "MOON" in text


def test_classifier_on_rows_gives_probabilities_that_sum_to_one(live: Live) -> None:
    stub = tabular_pb2_grpc.TabularServiceStub(live.channel)
    row = {"sepal_length": 5.1, "sepal_width": 3.5, "petal_length": 1.4, "petal_width": 0.2}
    answer = stub.Predict(predict_request(row, model="iris"))
    one = answer.predictions[0]
    assert one.label == "setosa" == one.probabilities[0].label
    assert sum(p.score for p in one.probabilities) == pytest.approx(1, abs=1e-5)


def test_signature_shows_features_and_quality(live: Live) -> None:
    stub = tabular_pb2_grpc.TabularServiceStub(live.channel)
    answer = stub.GetSignature(tabular_pb2.GetSignatureRequest(model="housing"))
    features = {f.name: f for f in answer.features}
    assert features["total_bedrooms"].nullable
    assert not features["longitude"].nullable
    assert "INLAND" in features["ocean_proximity"].categories
    assert answer.metrics["r2"] > 0.7


def test_sentiment_of_clear_sentences(live: Live) -> None:
    stub = classification_pb2_grpc.ClassificationServiceStub(live.channel)
    answer = stub.Classify(
        classification_pb2.ClassifyRequest(
            texts=["A wonderful, moving film.", "Dull, badly acted and far too long."], top_k=1
        )
    )
    assert [r.labels[0].label for r in answer.results] == ["positive", "negative"]
    assert all(len(r.labels) == 1 for r in answer.results)


def test_classify_threshold_and_scores(live: Live) -> None:
    stub = classification_pb2_grpc.ClassificationServiceStub(live.channel)
    request = classification_pb2.ClassifyRequest(texts=["A wonderful film."])
    full = stub.Classify(request).results[0].labels
    assert sum(x.score for x in full) == pytest.approx(1, abs=1e-4)
    assert [x.score for x in full] == sorted((x.score for x in full), reverse=True)
    request.threshold = 0.5
    assert [x.label for x in stub.Classify(request).results[0].labels] == [full[0].label]


def test_response_cache_answers_the_second_call(live: Live) -> None:
    stub = classification_pb2_grpc.ClassificationServiceStub(live.channel)
    request = classification_pb2.ClassifyRequest(texts=["cached once", "cached twice"])
    first = stub.Classify(request)
    second = stub.Classify(request)
    assert first.usage.cached == 0
    assert second.usage.cached == 2
    assert second.results == first.results


def test_embeddings_are_unit_vectors_and_near_for_near_meanings(live: Live) -> None:
    stub = embedding_pb2_grpc.EmbeddingServiceStub(live.channel)
    texts = ["A man is eating food.", "Someone has a meal.", "The stock market fell."]
    answer = stub.Embed(embedding_pb2.EmbedRequest(texts=texts))
    m = np.array([e.values for e in answer.embeddings])
    assert m.shape == (3, 384)
    assert np.linalg.norm(m, axis=1) == pytest.approx(1, abs=1e-5)
    assert m[0] @ m[1] > m[0] @ m[2] + 0.2


def test_many_texts_come_back_in_order_whatever_batch_they_rode_in(live: Live) -> None:
    stub = embedding_pb2_grpc.EmbeddingServiceStub(live.channel)
    texts = [f"number {i} " + "word " * (i * 7 % 60) for i in range(150)]
    together = stub.Embed(embedding_pb2.EmbedRequest(texts=texts))
    assert len(together.embeddings) == 150
    for i in (0, 13, 77, 149):
        alone = stub.Embed(embedding_pb2.EmbedRequest(texts=[texts[i]])).embeddings[0].values
        assert np.dot(alone, together.embeddings[i].values) > 0.9999


def test_token_ids_give_the_same_vector_as_the_text(live: Live) -> None:
    text = "Dynamic batching fills the turbines."
    tokens = token_pb2_grpc.TokenServiceStub(live.channel).Tokenize(
        token_pb2.TokenizeRequest(texts=[text])
    )
    stub = embedding_pb2_grpc.EmbeddingServiceStub(live.channel)
    request = embedding_pb2.EmbedRequest()
    request.token_ids.add(ids=[t.id for t in tokens.results[0].tokens])
    by_ids = stub.Embed(request).embeddings[0].values
    by_text = stub.Embed(embedding_pb2.EmbedRequest(texts=[text])).embeddings[0].values
    assert np.allclose(by_ids, by_text, atol=1e-5)


def test_truncation_is_said_or_refused(live: Live) -> None:
    stub = embedding_pb2_grpc.EmbeddingServiceStub(live.channel)
    long = "turbine " * 1000
    one = stub.Embed(embedding_pb2.EmbedRequest(texts=[long])).embeddings[0]
    assert one.truncated
    assert one.original_tokens > 1000
    assert one.tokens == 256
    with pytest.raises(grpc.RpcError) as caught:
        stub.Embed(embedding_pb2.EmbedRequest(texts=["ok", long], truncation=3))
    found = violations(caught.value)
    assert "256" in found["texts[1]"]


def test_dimensions_that_the_model_was_not_made_for_are_refused(live: Live) -> None:
    stub = embedding_pb2_grpc.EmbeddingServiceStub(live.channel)
    with pytest.raises(grpc.RpcError) as caught:
        stub.Embed(embedding_pb2.EmbedRequest(texts=["a"], dimensions=100))
    assert "384" in violations(caught.value)["dimensions"]


def test_rerank_with_an_embedding_model(live: Live) -> None:
    stub = rerank_pb2_grpc.RerankServiceStub(live.channel)
    answer = stub.Rerank(
        rerank_pb2.RerankRequest(
            model="minilm",
            query="How do vaccines work?",
            documents=["Cars need oil.", "Vaccines train the immune system.", "It rains."],
            top_n=2,
            return_documents=True,
        )
    )
    assert next(r.index for r in answer.results) == 1
    assert len(answer.results) == 2
    assert answer.results[0].document == "Vaccines train the immune system."


def test_tokens_have_offsets_into_the_text(live: Live) -> None:
    stub = token_pb2_grpc.TokenServiceStub(live.channel)
    text = "Grüße aus Köln"
    result = stub.Tokenize(token_pb2.TokenizeRequest(texts=[text])).results[0]
    words = [text[t.start : t.end] for t in result.tokens if not t.special]
    assert words[0].startswith("Gr")
    count = stub.CountTokens(token_pb2.CountTokensRequest(texts=[text]))
    assert count.counts == [len(result.tokens)]
    back = stub.Detokenize(
        token_pb2.DetokenizeRequest(token_ids=[{"ids": [t.id for t in result.tokens]}])
    )
    assert "aus" in back.texts[0]


def test_streams_answer_each_request_in_order(live: Live) -> None:
    stub = embedding_pb2_grpc.EmbeddingServiceStub(live.channel)
    texts = [f"stream {i}" for i in range(100)]
    requests = (
        embedding_pb2.EmbedStreamRequest(request=embedding_pb2.EmbedRequest(texts=[t]))
        for t in texts
    )
    got = [r.response.embeddings[0].values for r in stub.EmbedStream(requests)]
    assert len(got) == 100
    alone = stub.Embed(embedding_pb2.EmbedRequest(texts=[texts[42]])).embeddings[0].values
    assert np.dot(alone, got[42]) > 0.9999


def test_stream_gives_earlier_answers_before_its_error(live: Live) -> None:
    stub = tabular_pb2_grpc.TabularServiceStub(live.channel)
    requests = iter(
        [
            tabular_pb2.PredictStreamRequest(request=predict_request(ROW)),
            tabular_pb2.PredictStreamRequest(request=predict_request({"longitude": "x"})),
        ]
    )
    got = []
    with pytest.raises(grpc.RpcError) as caught:
        for answer in stub.PredictStream(requests):
            got.append(answer)  # noqa: PERF402 - list() would lose them at the error
    assert len(got) == 1
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_wrong_task_names_the_models_that_fit(live: Live) -> None:
    stub = embedding_pb2_grpc.EmbeddingServiceStub(live.channel)
    with pytest.raises(grpc.RpcError) as caught:
        stub.Embed(embedding_pb2.EmbedRequest(model="housing", texts=["a"]))
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "minilm" in caught.value.details()


def test_unknown_model_names_the_nearest(live: Live) -> None:
    stub = embedding_pb2_grpc.EmbeddingServiceStub(live.channel)
    with pytest.raises(grpc.RpcError) as caught:
        stub.Embed(embedding_pb2.EmbedRequest(model="minilmm", texts=["a"]))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert "minilm" in caught.value.details()


@pytest.mark.parametrize(
    ("request_", "path"),
    [
        (embedding_pb2.EmbedRequest(), "texts"),
        (embedding_pb2.EmbedRequest(texts=["a"], dimensions=0), "dimensions"),
        (embedding_pb2.EmbedRequest(texts=["a"], truncation=9), "truncation"),
        (embedding_pb2.EmbedRequest(texts=["a"], prompt_name="nope"), "prompt_name"),
    ],
)
def test_embed_refuses_bad_requests_by_path(live: Live, request_, path: str) -> None:
    stub = embedding_pb2_grpc.EmbeddingServiceStub(live.channel)
    with pytest.raises(grpc.RpcError) as caught:
        stub.Embed(request_)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert path in violations(caught.value)


def test_bytes_that_are_no_message_are_invalid_argument(live: Live) -> None:
    call = live.channel.unary_unary("/forebay.v1.EmbeddingService/Embed")
    with pytest.raises(grpc.RpcError) as caught:
        call(b"\xff\xff\xff")
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_model_infer_on_tensors_equals_predict(live: Live) -> None:
    stub = oip_grpc.GRPCInferenceServiceStub(live.channel)
    request = oip.ModelInferRequest(model_name="iris", id="7")
    values = {"sepal_length": 6.3, "sepal_width": 3.3, "petal_length": 6.0, "petal_width": 2.5}
    for name, value in values.items():
        tensor = request.inputs.add(name=name, datatype="FP32", shape=[1, 1])
        tensor.contents.fp32_contents.append(value)
    answer = stub.ModelInfer(request)
    assert answer.id == "7"
    label = answer.raw_output_contents[0]
    assert label[4:] == b"virginica"
    plain = tabular_pb2_grpc.TabularServiceStub(live.channel).Predict(
        predict_request(values, model="iris")
    )
    scores = np.frombuffer(answer.raw_output_contents[1], np.float32)
    assert max(scores) == pytest.approx(plain.predictions[0].probabilities[0].score, abs=1e-6)


def test_model_infer_refuses_wrong_shapes_and_names(live: Live) -> None:
    stub = oip_grpc.GRPCInferenceServiceStub(live.channel)
    request = oip.ModelInferRequest(model_name="iris")
    request.inputs.add(name="sepal_length", datatype="FP32", shape=[-1, 1])
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(request)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "inputs[0].shape" in violations(caught.value)


def test_statistics_count_what_was_asked(live: Live) -> None:
    stub = oip_grpc.GRPCInferenceServiceStub(live.channel)
    before = stub.ModelStatistics(oip.ModelStatisticsRequest(name="iris")).model_stats[0]
    test_classifier_on_rows_gives_probabilities_that_sum_to_one(live)
    after = stub.ModelStatistics(oip.ModelStatisticsRequest(name="iris")).model_stats[0]
    assert after.inference_count == before.inference_count + 1
    assert after.inference_stats.success.count == before.inference_stats.success.count + 1


def test_stream_infer_answers_an_error_in_its_place(live: Live) -> None:
    stub = oip_grpc.GRPCInferenceServiceStub(live.channel)
    good = oip.ModelInferRequest(model_name="minilm")
    good.inputs.add(name="text", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"hi")
    bad = oip.ModelInferRequest(model_name="nope")
    answers = list(stub.ModelStreamInfer(iter([good, bad, good])))
    assert [bool(a.error_message) for a in answers] == [False, True, False]


def test_manifest_and_served_quality_agree(starters, live: Live) -> None:
    manifest = json.loads((starters / "housing" / "1" / "manifest.json").read_text())
    assert manifest["parity"]["task_metric"]["exported"] == pytest.approx(
        manifest["metrics"]["r2"], abs=0.002
    )
