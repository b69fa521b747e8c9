"""Pages of every list while rows come and go: none that stays is repeated or lost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest
from forebay.v1 import (
    batch_pb2,
    batch_pb2_grpc,
    collection_pb2,
    collection_pb2_grpc,
    file_pb2,
    file_pb2_grpc,
    key_pb2,
    key_pb2_grpc,
    knowledge_pb2,
    knowledge_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    usage_pb2,
    usage_pb2_grpc,
)

from tests.conftest import Live, Start, copy_models
from tests.integration.test_batches import batch, until_ended
from tests.integration.test_files import upload


@pytest.fixture(scope="module")
def live(start: Start, starters: Path, tmp_path_factory: pytest.TempPathFactory) -> Live:
    models = copy_models(starters, tmp_path_factory.mktemp("models"), "iris", "minilm-int8")
    return start(models, auth__required="never")


class Listed(NamedTuple):
    """One list. `make` gives the names of n new rows; `page` names and the token of a page."""

    make: Callable[[int], list[str]]
    remove: Callable[[str], Any] | None
    page: Callable[[int, str], tuple[list[str], str]]


def files(live: Live, oldest_first: bool) -> Listed:
    stub = file_pb2_grpc.FileServiceStub(live.channel)

    def page(size: int, token: str) -> tuple[list[str], str]:
        ask = file_pb2.ListFilesRequest(page_size=size, page_token=token, oldest_first=oldest_first)
        found = stub.ListFiles(ask)
        return [f.id for f in found.files], found.next_page_token

    return Listed(
        lambda n: [upload(stub, b"x").id for _ in range(n)],
        lambda name: stub.DeleteFile(file_pb2.DeleteFileRequest(file=name)),
        page,
    )


def batches(live: Live) -> Listed:
    stub = batch_pb2_grpc.BatchServiceStub(live.channel)
    item = batch_pb2.BatchItem(custom_id="a", invalid={"code": "INVALID_ARGUMENT"})

    def remove(name: str) -> None:
        until_ended(stub, name)  # one that runs is not removed
        stub.DeleteBatch(batch_pb2.DeleteBatchRequest(batch=name))

    def page(size: int, token: str) -> tuple[list[str], str]:
        found = stub.ListBatches(batch_pb2.ListBatchesRequest(page_size=size, page_token=token))
        return [b.id for b in found.batches], found.next_page_token

    return Listed(lambda n: [batch(stub, [item]).id for _ in range(n)], remove, page)


def keys(live: Live) -> Listed:
    stub = key_pb2_grpc.KeyServiceStub(live.channel)

    def page(size: int, token: str) -> tuple[list[str], str]:
        found = stub.ListKeys(key_pb2.ListKeysRequest(page_size=size, page_token=token))
        return [k.id for k in found.keys], found.next_page_token

    return Listed(
        lambda n: [stub.CreateKey(key_pb2.CreateKeyRequest(name="k")).key.id for _ in range(n)],
        lambda name: stub.RevokeKey(key_pb2.RevokeKeyRequest(id=name)),
        page,
    )


def collections(live: Live) -> Listed:
    stub = collection_pb2_grpc.CollectionServiceStub(live.channel)

    def make(n: int) -> list[str]:
        names = [f"c{time.time_ns()}" for _ in range(n)]
        for name in names:
            ask = collection_pb2.CreateCollectionRequest(collection=name)
            ask.config.dimensions = 2
            stub.CreateCollection(ask)
        return names

    def page(size: int, token: str) -> tuple[list[str], str]:
        ask = collection_pb2.ListCollectionsRequest(page_size=size, page_token=token)
        found = stub.ListCollections(ask)
        return [c.name for c in found.collections], found.next_page_token

    return Listed(
        make,
        lambda name: stub.DeleteCollection(collection_pb2.DeleteCollectionRequest(collection=name)),
        page,
    )


def points(live: Live) -> Listed:
    stub = collection_pb2_grpc.CollectionServiceStub(live.channel)
    (collection,) = collections(live).make(1)

    def make(n: int) -> list[str]:
        ask = collection_pb2.UpsertPointsRequest(collection=collection)
        for _ in range(n):
            ask.points.add(id=f"p{time.time_ns()}", vector=[1, 2])
        stub.UpsertPoints(ask)
        return [p.id for p in ask.points]

    def page(size: int, token: str) -> tuple[list[str], str]:
        ask = collection_pb2.GetPointsRequest(
            collection=collection, page_size=size, page_token=token
        )
        found = stub.GetPoints(ask)
        return [p.id for p in found.points], found.next_page_token

    def remove(name: str) -> None:
        stub.DeletePoints(collection_pb2.DeletePointsRequest(collection=collection, ids=[name]))

    return Listed(make, remove, page)


def bases(live: Live) -> Listed:
    stub = knowledge_pb2_grpc.KnowledgeServiceStub(live.channel)

    def make(n: int) -> list[str]:
        names = [f"b{time.time_ns()}" for _ in range(n)]
        for name in names:
            ask = knowledge_pb2.CreateKnowledgeBaseRequest(knowledge_base=name)
            ask.config.embedding_model = "minilm-int8"
            stub.CreateKnowledgeBase(ask)
        return names

    def page(size: int, token: str) -> tuple[list[str], str]:
        ask = knowledge_pb2.ListKnowledgeBasesRequest(page_size=size, page_token=token)
        found = stub.ListKnowledgeBases(ask)
        return [b.name for b in found.knowledge_bases], found.next_page_token

    def remove(name: str) -> None:
        stub.DeleteKnowledgeBase(knowledge_pb2.DeleteKnowledgeBaseRequest(knowledge_base=name))

    return Listed(make, remove, page)


def documents(live: Live) -> Listed:
    stub = knowledge_pb2_grpc.KnowledgeServiceStub(live.channel)
    (base,) = bases(live).make(1)

    def make(n: int) -> list[str]:
        asks = [
            knowledge_pb2.IngestTextRequest(knowledge_base=base, name="d", text=f"{time.time_ns()}")
            for _ in range(n)
        ]
        return [stub.IngestText(a).document.id for a in asks]

    def page(size: int, token: str) -> tuple[list[str], str]:
        ask = knowledge_pb2.ListDocumentsRequest(
            knowledge_base=base, page_size=size, page_token=token
        )
        found = stub.ListDocuments(ask)
        return [d.id for d in found.documents], found.next_page_token

    def remove(name: str) -> None:
        ask = knowledge_pb2.DeleteDocumentRequest(knowledge_base=base, document=name)
        stub.DeleteDocument(ask)

    return Listed(make, remove, page)


def usage(live: Live) -> Listed:
    """Rows are never removed, and new ones come first here. Users are as long as they may be: their
    names stand in the token."""
    stub = usage_pb2_grpc.UsageServiceStub(live.channel)

    def make(n: int) -> list[str]:
        users = [f"{10**19 - time.time_ns()}".ljust(256, "𝄞") for _ in range(n)]
        for user in users:
            live.server.ledger.record({("", "m" * 128, 1, user): (1, 2, 10, 1, 0, 0, 0.5)})
        return users

    def page(size: int, token: str) -> tuple[list[str], str]:
        ask = usage_pb2.ListUsageRequest(page_size=size, page_token=token, model="m" * 128)
        found = stub.ListUsage(ask)
        return [r.user for r in found.rows], found.next_page_token

    return Listed(make, None, page)


LISTS: dict[str, Callable[[Live], Listed]] = {
    "files": lambda live: files(live, False),
    "oldest files": lambda live: files(live, True),
    "batches": batches,
    "keys": keys,
    "collections": collections,
    "points": points,
    "knowledge bases": bases,
    "documents": documents,
    "usage": usage,
}


@pytest.fixture(params=LISTS)
def listed(request: pytest.FixtureRequest, live: Live) -> Iterator[Listed]:
    yield LISTS[request.param](live)


def test_rows_come_and_go_between_two_pages(listed: Listed) -> None:
    made = listed.make(6)
    whole, token = listed.page(100, "")
    assert set(made) <= set(whole) and not token
    seen, token = listed.page(3, "")
    assert seen == whole[:3]
    if listed.remove is not None:
        listed.remove(whole[0])  # everything behind it moves up by one
        listed.remove(whole[2])  # the row that the token names
    page, token = listed.page(1, token)
    assert page == whole[3:4]
    seen += page
    new = listed.make(2)  # at the top or at the end, as the list is sorted
    while token:
        page, token = listed.page(2, token)
        seen += page
    assert len(seen) == len(set(seen))
    assert [name for name in seen if name not in new] == whole


def test_tokens_of_another_list_are_refused(live: Live) -> None:
    names = list(LISTS)
    for name in names:
        made = LISTS[name](live)
        made.make(2)
        _, token = made.page(1, "")
        assert token
        other = LISTS[names[names.index(name) - 1]](live)
        for wrong in (token, "b2Zmc2V0OjE=", "?", token[:-2]):
            with pytest.raises(grpc.RpcError) as caught:
                other.page(1, wrong)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert (caught.value.details() or "").startswith("page_token")
    models = model_pb2_grpc.ModelServiceStub(live.channel)
    first = models.ListModels(model_pb2.ListModelsRequest(page_size=1))
    ask = model_pb2.ListModelsRequest(page_size=5, page_token=first.next_page_token)
    assert [m.name for m in (*first.models, *models.ListModels(ask).models)] == [
        "iris",
        "minilm-int8",
    ]


def test_a_token_goes_on_where_after_began(live: Live) -> None:
    """The token of a list that began behind a row was counted from the top."""
    made = batches(live).make(5)[::-1]
    stub = batch_pb2_grpc.BatchServiceStub(live.channel)
    for both in (True, False):
        ask = batch_pb2.ListBatchesRequest(page_size=2, after=made[0])
        first = stub.ListBatches(ask)
        assert [b.id for b in first.batches] == made[1:3]
        ask = batch_pb2.ListBatchesRequest(page_size=2, page_token=first.next_page_token)
        if both:
            ask.after = made[0]
        assert [b.id for b in stub.ListBatches(ask).batches] == made[3:5]
