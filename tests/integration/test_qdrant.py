"""Collections in Qdrant through gRPC: the client's local mode, as no server's binary is at hand here.
With FOREBAY_TEST_QDRANT set to the URL of a server, the same against that."""

from __future__ import annotations

import os
from pathlib import Path

import grpc
import numpy as np
import pytest
from forebay.settings import load_settings
from forebay.v1 import collection_pb2 as pb
from forebay.v1 import collection_pb2_grpc
from forebay_server.retrieval import backends
from google.protobuf import json_format

from tests.conftest import Start
from tests.integration.test_collections import create, ids, point

URL = os.environ.get("FOREBAY_TEST_QDRANT", "local")
CONFIG = {"dimensions": 16, "metric": "METRIC_COSINE", "index": {"type": "INDEX_TYPE_QDRANT"}}


@pytest.mark.filterwarnings("ignore:Local mode")
def test_a_collection_lives_in_qdrant_and_survives_a_restart(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forebay_server.indexes.dense.BUILD_AT", 500)
    models = tmp_path / "models"
    models.mkdir()
    vectors = np.random.default_rng(0).normal(size=(1200, 16)).astype(np.float32)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    queries = unit[:20] + 0.01

    def check(stub) -> None:
        for q in queries:
            order = [f"p{i}" for i in np.argsort(-(unit @ q), kind="stable") if i % 5]
            found = ids(stub.Search(pb.SearchRequest(collection="far", vector=q.tolist())))
            assert found == order[:10]
            search = pb.SearchRequest(collection="far", vector=q.tolist(), limit=20)
            json_format.ParseDict({"range": {"key": "n", "lt": 300}}, search.filter)
            assert ids(stub.Search(search)) == [i for i in order if int(i[1:]) < 300][:20]

    settings = {"retrieval__qdrant": URL, "retrieval__qdrant_prefix": f"test{os.getpid()}"}
    live = start(models, home=tmp_path / "home", **settings)
    stub = collection_pb2_grpc.CollectionServiceStub(live.channel)
    assert create(stub, "far", **CONFIG).config.index.type == pb.INDEX_TYPE_QDRANT
    points = [point(f"p{i}", v.tolist(), n=i) for i, v in enumerate(vectors)]
    stub.UpsertPoints(pb.UpsertPointsRequest(collection="far", points=points))
    request = pb.GetCollectionRequest(collection="far")
    while not stub.GetCollection(request).collection.indexed_points:
        pass
    dead = [f"p{i}" for i in range(0, 1200, 5)]
    assert stub.DeletePoints(pb.DeletePointsRequest(collection="far", ids=dead)).deleted == 240
    check(stub)
    live.stop()
    live = start(models, home=tmp_path / "home", **settings)
    stub = collection_pb2_grpc.CollectionServiceStub(live.channel)
    assert stub.GetCollection(request).collection.indexed_points
    check(stub)
    assert stub.DeleteCollection(pb.DeleteCollectionRequest(collection="far")).points == 960
    live.stop()
    live = start(models, home=tmp_path / "other")
    stub = collection_pb2_grpc.CollectionServiceStub(live.channel)
    with pytest.raises(grpc.RpcError) as caught:
        create(stub, "far", **CONFIG)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "retrieval.qdrant" in str(caught.value.details())
    live.stop()


def test_servers_of_one_database_keep_their_points_apart(tmp_path: Path) -> None:
    def prefix(home: str, shared: bool) -> str:
        values = {"home": tmp_path / home, "retrieval.qdrant": "local"}
        made = backends(load_settings(values, environ={}).settings, shared)
        assert made.qdrant is not None
        made.close()
        return made.qdrant.prefix

    assert prefix("a", False) == "forebay"
    a, b = prefix("a", True), prefix("b", True)
    assert a != b and {a[:8], b[:8]} == {"forebay-"}
    assert prefix("a", True) == a
