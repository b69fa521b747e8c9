"""CollectionService: vectors with payloads, searched by vector, by words, by both."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import orjson
from forebay.constraints import Validator
from forebay.errors import InvalidArgument
from forebay.v1 import collection_pb2 as pb
from forebay.v1 import common_pb2
from google.protobuf import json_format

from forebay_server.core.call import Call
from forebay_server.dataplane.collections import (
    HIDDEN,
    Collections,
    NewPoint,
    OpenCollection,
    Written,
)
from forebay_server.dataplane.embedding import child_of
from forebay_server.dataplane.models import jobs_of
from forebay_server.dataplane.searching import SearchJob, SearchOutcome, SearchPipeline, SearchSpec
from forebay_server.dataplane.snapshots import Snapshots
from forebay_server.indexes.collection import CollectionConfig, TextFieldConfig
from forebay_server.indexes.dense import DenseConfig
from forebay_server.indexes.engine import Mode
from forebay_server.indexes.fusion import Fusion
from forebay_server.services.base import Service
from forebay_server.services.common import served_by, timing, usage
from forebay_server.services.filters import condition, to_dict
from forebay_server.services.model import timestamp
from forebay_server.services.paging import offset, page, page_size, token
from forebay_server.storage.collections import PointRow, SnapshotRow

_METRICS: dict[int, Any] = {0: "cosine", 1: "cosine", 2: "dot", 3: "l2"}
_KINDS: dict[int, Any] = {0: "hnsw", 1: "flat", 2: "hnsw", 3: "ivf_pq"}
MODES: dict[int, Mode | None] = {0: None, 1: "dense", 2: "keyword", 3: "hybrid"}
_MODE_MESSAGES = {
    "dense": pb.SEARCH_MODE_DENSE,
    "keyword": pb.SEARCH_MODE_KEYWORD,
    "hybrid": pb.SEARCH_MODE_HYBRID,
}
#: Points of an NDJSON upload that are written together.
NDJSON_POINTS = 1000
#: Bytes of one line of an NDJSON upload.
MAX_LINE = 4 << 20


class CollectionService(Service):
    """See protos/forebay/v1/collection.proto."""

    name = "forebay.v1.CollectionService"

    def __init__(
        self,
        collections: Collections,
        searches: SearchPipeline,
        snapshots: Snapshots,
        validator: Validator,
    ) -> None:
        self._collections = collections
        self._searches = searches
        self._snapshots = snapshots
        self._validator = validator

    async def create_collection(self, call: Call) -> pb.CreateCollectionResponse:
        """CreateCollection."""
        request = cast(pb.CreateCollectionRequest, call.request)
        made = await self._collections.create(call, request.collection, _config(request.config))
        return pb.CreateCollectionResponse(collection=_collection(made))

    async def get_collection(self, call: Call) -> pb.GetCollectionResponse:
        """GetCollection."""
        request = cast(pb.GetCollectionRequest, call.request)
        found = self._collections.get(request.collection)
        return pb.GetCollectionResponse(collection=_collection(found))

    async def list_collections(self, call: Call) -> pb.ListCollectionsResponse:
        """ListCollections."""
        request = cast(pb.ListCollectionsRequest, call.request)
        size = page_size(request.page_size, 100)
        chosen, following = page(self._collections.visible(), request.page_token, size)
        return pb.ListCollectionsResponse(
            collections=[_collection(c) for c in chosen], next_page_token=following
        )

    async def delete_collection(self, call: Call) -> pb.DeleteCollectionResponse:
        """DeleteCollection."""
        request = cast(pb.DeleteCollectionRequest, call.request)
        if request.collection.startswith(HIDDEN):
            raise InvalidArgument.at("collection", "belongs to a knowledge base; delete that")
        return pb.DeleteCollectionResponse(
            points=await self._collections.delete(request.collection)
        )

    async def upsert_points(self, call: Call) -> pb.UpsertPointsResponse:
        """UpsertPoints."""
        request = cast(pb.UpsertPointsRequest, call.request)
        points = await asyncio.to_thread(_points, request.points, "points")
        written = await self._collections.upsert(call, request.collection, points)
        total = _Total(call)
        total.add(written)
        return cast(pb.UpsertPointsResponse, total.message(pb.UpsertPointsResponse))

    async def upsert_stream(
        self, call: Call, requests: AsyncIterator[pb.UpsertStreamRequest]
    ) -> pb.UpsertStreamResponse:
        """UpsertStream."""
        first = await anext(requests, None)
        if first is None or first.WhichOneof("part") != "header":
            raise InvalidArgument.at("header", "must be the first message of the stream")
        name = first.header.collection
        self._collections.get(name)
        total = _Total(call)
        lines = _Lines(self._validator)
        async for request in requests:
            part = request.WhichOneof("part")
            if part == "points":
                points = await asyncio.to_thread(_points, request.points.points, "points.points")
                total.add(await self._collections.upsert(call, name, points, "points.points"))
            elif part == "chunk":
                for points in lines.feed(request.chunk.path, request.chunk.data):
                    total.add(await self._collections.upsert(call, name, points, lines.where))
            else:
                raise InvalidArgument.at("header", "may only be the first message")
        for points in lines.end():
            total.add(await self._collections.upsert(call, name, points, lines.where))
        return cast(pb.UpsertStreamResponse, total.message(pb.UpsertStreamResponse))

    async def get_points(self, call: Call) -> pb.GetPointsResponse:
        """GetPoints."""
        request = cast(pb.GetPointsRequest, call.request)
        following = ""
        if request.ids:
            rows = await self._collections.points(request.collection, request.ids)
        else:
            size = page_size(request.page_size, 100)
            start = offset(request.page_token)
            rows = await self._collections.page(request.collection, start, size)
            following = token(rows[-1].label + 1) if len(rows) == size else ""
        return pb.GetPointsResponse(
            points=[_point(r, request.with_vectors) for r in rows], next_page_token=following
        )

    async def delete_points(self, call: Call) -> pb.DeletePointsResponse:
        """DeletePoints."""
        request = cast(pb.DeletePointsRequest, call.request)
        by_filter = request.HasField("filter")
        if by_filter == bool(request.ids):
            raise InvalidArgument.at("ids", "exactly one of ids and filter must be given")
        chosen = condition(request.filter) if by_filter else None
        deleted = await self._collections.remove(request.collection, list(request.ids), chosen)
        return pb.DeletePointsResponse(deleted=deleted)

    def search(self, calls: Sequence[Call]) -> None:
        """Search."""
        make = lambda c: _job(c, cast(pb.SearchRequest, c.request))  # noqa: E731
        self._searches.run(jobs_of(calls, make))

    async def search_stream(self, call: Call) -> AsyncIterator[pb.SearchStreamResponse]:
        """SearchStream."""
        request = cast(pb.SearchStreamRequest, call.request)
        loop = asyncio.get_running_loop()
        ended: asyncio.Queue[tuple[int, Call]] = asyncio.Queue()
        children: list[Call] = []
        for i, one in enumerate(request.requests):

            def on_end(child: Call, place: int = i) -> None:
                loop.call_soon_threadsafe(ended.put_nowait, (place, child))

            child = child_of(call, on_end)
            child.request = one
            children.append(child)
        try:
            await asyncio.to_thread(self.search, children)
            for _ in children:
                place, child = await ended.get()
                if child.error is not None:
                    raise _placed(child.error, place)
                call.facts.items += child.facts.items
                call.facts.tokens += child.facts.tokens
                yield pb.SearchStreamResponse(
                    index=place, response=pb.SearchResponse.FromString(child.payload)
                )
        finally:
            for child in children:
                child.cancel()

    async def snapshot(self, call: Call) -> pb.SnapshotResponse:
        """Snapshot."""
        request = cast(pb.SnapshotRequest, call.request)
        return pb.SnapshotResponse(snapshot=_info(await self._snapshots.make(request.collection)))

    async def list_snapshots(self, call: Call) -> pb.ListSnapshotsResponse:
        """ListSnapshots."""
        request = cast(pb.ListSnapshotsRequest, call.request)
        rows = await self._snapshots.all(request.collection)
        return pb.ListSnapshotsResponse(snapshots=[_info(r) for r in rows])

    async def restore_snapshot(self, call: Call) -> pb.RestoreSnapshotResponse:
        """RestoreSnapshot."""
        request = cast(pb.RestoreSnapshotRequest, call.request)
        made = await self._snapshots.restore(
            call, request.collection, request.snapshot, request.target
        )
        return pb.RestoreSnapshotResponse(collection=_collection(made))


class _Total:
    """What several upserts of one call did."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._inserted = self._updated = 0
        self._embedded = False

    def add(self, written: Written) -> None:
        """Count one more."""
        self._inserted += written.inserted
        self._updated += written.updated
        facts = self._call.facts
        facts.items += written.inserted + written.updated
        if written.embedded is not None:
            self._embedded = True
            facts.model, facts.version = written.embedded.model, written.embedded.version
            facts.tokens += written.embedded.tokens
            facts.truncated += written.embedded.truncated

    def message(self, kind: Any) -> Any:
        """The answer."""
        return kind(
            inserted=self._inserted,
            updated=self._updated,
            served_by=served_by(self._call) if self._embedded else None,
            usage=usage(self._call),
        )


class _Lines:
    """Points of NDJSON files that come in pieces."""

    def __init__(self, validator: Validator) -> None:
        self._validator = validator
        self._rest = b""
        self._path = ""
        self._line = 0
        self._points: list[NewPoint] = []
        self.where = "files"

    def feed(self, path: str, data: bytes) -> list[list[NewPoint]]:
        """Full groups of points after one more piece."""
        out: list[list[NewPoint]] = []
        if path != self._path:
            self._take(self._rest, out)
            self._path, self._line, self._rest = path, 0, b""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._take(line, out)
        if len(self._rest) > MAX_LINE:
            where = f"{self._path}:{self._line + 1}"
            raise InvalidArgument.at(where, f"is a line of more than {MAX_LINE} bytes")
        return out

    def end(self) -> list[list[NewPoint]]:
        """What is left."""
        out: list[list[NewPoint]] = []
        self._take(self._rest, out)
        self._rest = b""
        if self._points:
            out.append(self._points)
            self._points = []
        return out

    def _take(self, line: bytes, out: list[list[NewPoint]]) -> None:
        self._line += 1
        if not line.strip():
            return
        where = self.where = f"{self._path}:{self._line}"
        message = pb.Point()
        try:
            json_format.ParseDict(orjson.loads(line), message)
            self._validator.check(message)
        except (orjson.JSONDecodeError, json_format.ParseError, AttributeError) as e:
            raise InvalidArgument.at(where, f"is no point: {e}"[:300]) from None
        except InvalidArgument as e:
            raise InvalidArgument.at(where, e.message) from None
        self._points.append(_new_point(message, where))
        if len(self._points) >= NDJSON_POINTS:
            out.append(self._points)
            self._points = []


def _config(m: pb.CollectionConfig) -> CollectionConfig:
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


def _collection(c: OpenCollection) -> pb.Collection:
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


def _points(messages: Sequence[pb.Point], path: str) -> list[NewPoint]:
    return [_new_point(m, f"{path}[{i}]") for i, m in enumerate(messages)]


def _new_point(m: pb.Point, path: str) -> NewPoint:
    vector = np.array(m.vector, np.float32) if m.vector else None
    return NewPoint(m.id, vector, to_dict(m.payload, f"{path}.payload"))


def _point(row: PointRow, vectors: bool) -> pb.Point:
    out = pb.Point(id=row.point_id)
    out.payload.update(orjson.loads(row.payload))
    if vectors and row.vector is not None:
        out.vector.extend(np.frombuffer(row.vector, "<f4").tolist())
    return out


def _job(call: Call, request: pb.SearchRequest) -> SearchJob:
    with_payload = not request.HasField("with_payload") or request.with_payload
    spec = SearchSpec(
        request.collection,
        np.array(request.vector, np.float32) if request.vector else None,
        request.text,
        MODES[request.mode],
        request.limit or 10,
        condition(request.filter) if request.HasField("filter") else None,
        fusion(request.fusion),
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


def fusion(m: pb.Fusion) -> Fusion:
    """How to fuse, as a request says."""
    return Fusion(
        "weighted" if m.method == pb.FUSION_METHOD_WEIGHTED else "rrf",
        m.dense_weight if m.HasField("dense_weight") else 1.0,
        m.keyword_weight if m.HasField("keyword_weight") else 1.0,
        m.rank_constant or 60,
    )


def _answer(call: Call, payload: bool, vectors: bool, outcome: SearchOutcome) -> None:
    response = pb.SearchResponse(
        mode=_MODE_MESSAGES[outcome.mode],
        served_by=served_by(call) if outcome.embedded else None,
        usage=common_pb2.Usage(items=1, tokens=call.facts.tokens),
        timing=timing(call),
    )
    for hit in outcome.hits:
        found = hit.found
        message = response.hits.add(
            id=found.id,
            score=found.score,
            dense_score=found.dense_score,
            keyword_score=found.keyword_score,
        )
        if hit.row is None:
            continue
        if payload:
            message.payload.update(orjson.loads(hit.row.payload))
        if vectors and hit.row.vector is not None:
            message.vector.extend(np.frombuffer(hit.row.vector, "<f4").tolist())
    call.reply(response)


def _placed(error: Any, place: int) -> Any:
    if isinstance(error, InvalidArgument):
        return InvalidArgument.at(f"requests[{place}]", error.message)
    return error


def _info(row: SnapshotRow) -> pb.SnapshotInfo:
    return pb.SnapshotInfo(
        name=row.name,
        points=row.points,
        size_bytes=row.size_bytes,
        sha256=row.sha256,
        created_at=timestamp(row.created_at),
    )
