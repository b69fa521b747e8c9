"""Collections, points, searches and their answers between the contract's messages and the data plane."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import orjson
from forebay.errors import InvalidArgument, TooLarge
from forebay.twin.v1 import collection_pb2 as twin
from forebay.v1 import collection_pb2 as pb
from forebay.v1 import common_pb2
from google.protobuf.struct_pb2 import Struct
from numpy.typing import NDArray

from forebay_server.core.call import Call
from forebay_server.dataplane.collections import NewPoint
from forebay_server.dataplane.searching import SearchJob, SearchOutcome, SearchSpec
from forebay_server.dataplane.upkeep import OpenCollection
from forebay_server.indexes.collection import CollectionConfig, TextFieldConfig
from forebay_server.indexes.dense import DenseConfig
from forebay_server.indexes.engine import Mode
from forebay_server.indexes.fusion import Fusion
from forebay_server.services.common import served_by, timing
from forebay_server.services.filters import condition, to_dict
from forebay_server.services.model import timestamp
from forebay_server.storage.collections import PointRow, SnapshotRow

_METRICS: dict[int, Any] = {0: "cosine", 1: "cosine", 2: "dot", 3: "l2"}
_KINDS: dict[int, Any] = {0: "hnsw", 1: "flat", 2: "hnsw", 3: "ivf_pq", 4: "qdrant"}
MODES: dict[int, Mode | None] = {0: None, 1: "dense", 2: "keyword", 3: "hybrid"}
_MODE_MESSAGES = {
    "dense": pb.SEARCH_MODE_DENSE,
    "keyword": pb.SEARCH_MODE_KEYWORD,
    "hybrid": pb.SEARCH_MODE_HYBRID,
}
#: Numbers of a vector; the contract's bound.
MAX_DIMENSIONS = 65536


def config_of(m: pb.CollectionConfig) -> CollectionConfig:
    """What a collection shall be, as a request says."""
    i = m.index
    defaults = DenseConfig(0)
    dense = DenseConfig(
        m.dimensions,
        _METRICS[m.metric],
        _KINDS[i.type],
        i.m or defaults.m,
        i.ef_construction or defaults.ef_construction,
        i.ef_search or defaults.ef_search,
        i.lists,
        i.probes or defaults.probes,
        i.code_bytes,
    )
    return CollectionConfig(
        dense,
        tuple(TextFieldConfig(t.path, t.language, t.boost or 1.0) for t in m.text_fields),
        m.k1 if m.HasField("k1") else 1.2,
        m.b if m.HasField("b") else 0.75,
        m.embedding_model,
    )


def collection_message(c: OpenCollection) -> pb.Collection:
    """A collection with its sizes."""
    config = pb.CollectionConfig(
        embedding_model=c.config.embedding_model,
        text_fields=[
            pb.TextField(path=t.path, language=t.language, boost=t.boost)
            for t in c.config.text_fields
        ],
        k1=c.config.k1,
        b=c.config.b,
    )
    d = c.config.dense
    if d is not None:
        config.dimensions = d.dimensions
        config.metric = pb.Metric.Value(f"METRIC_{d.metric.upper()}")  # type: ignore[assignment]
        config.index.CopyFrom(
            pb.IndexConfig(
                type=f"INDEX_TYPE_{d.kind.upper()}",
                m=d.m,
                ef_construction=d.ef_construction,
                ef_search=d.ef_search,
                lists=d.lists,
                probes=d.probes,
                code_bytes=d.code_bytes,
            )
        )
    view = c.index.view()
    return pb.Collection(
        name=c.name,
        config=config,
        points=view.live,
        indexed_points=view.dense.start if view.dense else 0,
        memory_bytes=c.index.nbytes,
        created_at=timestamp(c.row.created_at),
    )


def vector_of(data: bytes, path: str) -> NDArray[np.float32] | None:
    """The vector of a twin's bytes, None when it is empty. Raises InvalidArgument at `path`."""
    if not data:
        return None
    vector = np.frombuffer(data, "<f4")
    if len(vector) > MAX_DIMENSIONS:
        raise TooLarge(path, size=len(vector), limit=MAX_DIMENSIONS, unit="elements")
    finite = np.isfinite(vector)
    if not finite.all():
        at = int(np.argmin(finite))
        raise InvalidArgument.at(f"{path}[{at}]", f"is {vector[at]:g}; allowed is a finite number")
    return vector


def new_points(messages: Sequence[twin.Point], path: str) -> list[NewPoint]:
    """Points to write. Raises InvalidArgument for what is wrong with one."""
    return [new_point(m, f"{path}[{i}]") for i, m in enumerate(messages)]


def new_point(m: twin.Point, path: str) -> NewPoint:
    """A point to write."""
    vector = vector_of(m.vector, f"{path}.vector")
    return NewPoint(m.id, vector, to_dict(m.payload, f"{path}.payload"))


def point_message(row: PointRow, vectors: bool) -> twin.Point:
    """A stored point."""
    out = twin.Point(id=row.point_id)
    out.payload.update(orjson.loads(row.payload))
    if vectors and row.vector is not None:
        out.vector = row.vector
    return out


def search_job(call: Call, request: twin.SearchRequest) -> SearchJob:
    """The search of a call, which it answers when it is done."""
    with_payload = not request.HasField("with_payload") or request.with_payload
    spec = SearchSpec(
        request.collection,
        vector_of(request.vector, "vector"),
        request.text,
        MODES[request.mode],
        request.limit or 10,
        condition(request.filter) if request.HasField("filter") else None,
        fusion(request.fusion) if request.HasField("fusion") else _FUSION,
        request.candidates,
        request.exact,
        request.ef_search,
        request.probes,
        request.score_threshold if request.HasField("score_threshold") else None,
        dict(request.field_boosts),
        with_payload,
        request.with_vectors,
    )
    return SearchJob(call, spec, partial(_answer, call, with_payload, request.with_vectors))


_FUSION = Fusion()


def fusion(m: pb.Fusion) -> Fusion:
    """How to fuse, as a request says."""
    return Fusion(
        "weighted" if m.method == pb.FUSION_METHOD_WEIGHTED else "rrf",
        m.dense_weight if m.HasField("dense_weight") else 1.0,
        m.keyword_weight if m.HasField("keyword_weight") else 1.0,
        m.rank_constant or 60,
    )


def _answer(call: Call, payload: bool, vectors: bool, outcome: SearchOutcome) -> None:
    response = twin.SearchResponse(
        mode=_MODE_MESSAGES[outcome.mode],
        served_by=served_by(call) if outcome.embedded else None,
        usage=common_pb2.Usage(items=1, tokens=call.facts.tokens),
        timing=timing(call),
    )
    add = response.hits.add
    for hit in outcome.hits:
        found, row = hit.found, hit.row
        add(
            id=found.id,
            score=found.score,
            payload=_struct(row) if payload and row is not None else None,
            vector=row.vector if vectors and row is not None else None,
            dense_score=found.dense_score,
            keyword_score=found.keyword_score,
        )
    call.reply(response)


def _struct(row: PointRow) -> bytes:
    """The payload as a serialised Struct: made once for a row that is kept in memory."""
    if row.struct is None:
        message = Struct()
        message.update(orjson.loads(row.payload))
        row.struct = message.SerializeToString()
    return row.struct


def snapshot_message(row: SnapshotRow) -> pb.SnapshotInfo:
    """A snapshot's facts."""
    return pb.SnapshotInfo(
        name=row.name,
        points=row.points,
        size_bytes=row.size_bytes,
        sha256=row.sha256,
        created_at=timestamp(row.created_at),
    )
