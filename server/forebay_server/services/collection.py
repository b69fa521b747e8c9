"""CollectionService: vectors with payloads, searched by vector, by words, by both."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any, cast

from forebay.constraints import Validator
from forebay.errors import InvalidArgument
from forebay.twin.v1 import collection_pb2 as twin
from forebay.v1 import collection_pb2 as pb

from forebay_server.core.call import Call
from forebay_server.dataplane.collections import HIDDEN, Collections, Written
from forebay_server.dataplane.models import jobs_of
from forebay_server.dataplane.parts import child_of
from forebay_server.dataplane.searching import SearchJob, SearchPipeline
from forebay_server.dataplane.snapshots import Snapshots
from forebay_server.services.base import Service
from forebay_server.services.collection_messages import (
    collection_message,
    config_of,
    new_points,
    point_message,
    search_job,
    snapshot_message,
)
from forebay_server.services.common import served_by, usage
from forebay_server.services.filters import condition
from forebay_server.services.paging import Page
from forebay_server.services.point_lines import PointLines


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
        made = await self._collections.create(call, request.collection, config_of(request.config))
        return pb.CreateCollectionResponse(collection=collection_message(made))

    async def get_collection(self, call: Call) -> pb.GetCollectionResponse:
        """GetCollection."""
        request = cast(pb.GetCollectionRequest, call.request)
        found = await self._collections.known(request.collection)
        return pb.GetCollectionResponse(collection=collection_message(found))

    async def list_collections(self, call: Call) -> pb.ListCollectionsResponse:
        """ListCollections."""
        request = cast(pb.ListCollectionsRequest, call.request)
        page = Page(request, 100, str)
        chosen, following = page.of(self._collections.visible(), lambda c: (c.name,))
        return pb.ListCollectionsResponse(
            collections=[collection_message(c) for c in chosen], next_page_token=following
        )

    async def delete_collection(self, call: Call) -> pb.DeleteCollectionResponse:
        """DeleteCollection."""
        request = cast(pb.DeleteCollectionRequest, call.request)
        _check_own(request.collection, "collection", "delete that")
        return pb.DeleteCollectionResponse(
            points=await self._collections.delete(request.collection)
        )

    async def upsert_points(self, call: Call) -> pb.UpsertPointsResponse:
        """UpsertPoints."""
        request = cast(twin.UpsertPointsRequest, call.request)
        _check_own(request.collection, "collection", "upload documents to that")
        points = await asyncio.to_thread(new_points, request.points, "points")
        written = await self._collections.upsert(call, request.collection, points)
        total = _Total(call)
        total.add(written)
        return cast(pb.UpsertPointsResponse, total.message(pb.UpsertPointsResponse))

    async def upsert_stream(
        self, call: Call, requests: AsyncIterator[twin.UpsertStreamRequest]
    ) -> pb.UpsertStreamResponse:
        """UpsertStream."""
        first = await anext(requests, None)
        if first is None or first.WhichOneof("part") != "header":
            raise InvalidArgument.at("header", "must be the first message of the stream")
        name = first.header.collection
        _check_own(name, "header.collection", "upload documents to that")
        await self._collections.known(name)
        total = _Total(call)
        lines = PointLines(self._validator)
        async for request in requests:
            part = request.WhichOneof("part")
            if part == "points":
                points = await asyncio.to_thread(new_points, request.points.points, "points.points")
                total.add(await self._collections.upsert(call, name, points, "points.points"))
            elif part == "chunk":
                for group in lines.feed(request.chunk.path, request.chunk.data):
                    total.add(await self._collections.upsert(call, name, *group))
            else:
                raise InvalidArgument.at("header", "may only be the first message")
        for group in lines.end():
            total.add(await self._collections.upsert(call, name, *group))
        return cast(pb.UpsertStreamResponse, total.message(pb.UpsertStreamResponse))

    async def get_points(self, call: Call) -> twin.GetPointsResponse:
        """GetPoints."""
        request = cast(pb.GetPointsRequest, call.request)
        following = ""
        if request.ids:
            rows = await self._collections.points(request.collection, request.ids)
        else:
            page = Page(request, 100, int)
            label = page.behind[0] + 1 if page.behind else 0
            found = await self._collections.page(request.collection, label, page.size + 1)
            rows, following = page.cut(found, lambda r: (r.label,))
        return twin.GetPointsResponse(
            points=[point_message(r, request.with_vectors) for r in rows], next_page_token=following
        )

    async def delete_points(self, call: Call) -> pb.DeletePointsResponse:
        """DeletePoints."""
        request = cast(pb.DeletePointsRequest, call.request)
        _check_own(request.collection, "collection", "delete documents of that")
        by_filter = request.HasField("filter")
        if by_filter == bool(request.ids):
            raise InvalidArgument.at("ids", "exactly one of ids and filter must be given")
        chosen = condition(request.filter) if by_filter else None
        deleted = await self._collections.remove(request.collection, list(request.ids), chosen)
        return pb.DeletePointsResponse(deleted=deleted)

    def search(self, calls: Sequence[Call]) -> None:
        """Search."""

        def make(call: Call) -> SearchJob:
            return search_job(call, cast(twin.SearchRequest, call.request))

        self._searches.run(jobs_of(calls, make))

    async def search_stream(self, call: Call) -> AsyncIterator[pb.SearchStreamResponse]:
        """SearchStream."""
        request = cast(twin.SearchStreamRequest, call.request)
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
        return pb.SnapshotResponse(
            snapshot=snapshot_message(await self._snapshots.make(request.collection))
        )

    async def list_snapshots(self, call: Call) -> pb.ListSnapshotsResponse:
        """ListSnapshots."""
        request = cast(pb.ListSnapshotsRequest, call.request)
        rows = await self._snapshots.all(request.collection)
        return pb.ListSnapshotsResponse(snapshots=[snapshot_message(r) for r in rows])

    async def restore_snapshot(self, call: Call) -> pb.RestoreSnapshotResponse:
        """RestoreSnapshot."""
        request = cast(pb.RestoreSnapshotRequest, call.request)
        made = await self._snapshots.restore(
            call, request.collection, request.snapshot, request.target
        )
        return pb.RestoreSnapshotResponse(collection=collection_message(made))


def _check_own(name: str, path: str, instead: str) -> None:
    """Raise InvalidArgument for the chunks of a knowledge base: points of another form among them
    would break its searches, and its documents would say what is not so."""
    if name.startswith(HIDDEN):
        raise InvalidArgument.at(path, f"belongs to a knowledge base; {instead}")


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


def _placed(error: Any, place: int) -> Any:
    if isinstance(error, InvalidArgument):
        return InvalidArgument.at(f"requests[{place}]", error.message)
    return error
