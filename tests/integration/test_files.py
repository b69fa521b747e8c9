"""Callers' files: by gRPC, by REST, and by the real openai client."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import grpc
import openai
import pytest
from forebay.v1 import file_pb2, file_pb2_grpc
from forebay_server.storage.tables import files

from tests.conftest import Live, Start, copy_models
from tests.integration.gateway import Gateway


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, starters: Path) -> Path:
    return copy_models(starters, tmp_path_factory.mktemp("models"), "iris")


@pytest.fixture(scope="module")
def live(start: Start, models: Path) -> Live:
    return start(models)


def upload(
    stub: file_pb2_grpc.FileServiceStub, data: bytes, metadata: Any = None, **header: Any
) -> file_pb2.File:
    parts = [file_pb2.UploadFileRequest(header=header)]
    parts += [
        file_pb2.UploadFileRequest(chunk={"path": "f.bin", "data": data[i : i + 1000]})
        for i in range(0, len(data), 1000)
    ]
    return stub.UploadFile(iter(parts), metadata=metadata).file


def test_files_are_stored_whole_seen_by_their_key_and_bounded(start: Start, models: Path) -> None:
    import hashlib

    live = start(
        models, auth__required="always", files__max_file_bytes=5000, files__max_bytes_per_key=8000
    )
    stub = file_pb2_grpc.FileServiceStub(live.channel)
    keys = [live.run(live.server.keys.create(n, ("infer", "read")))[1] for n in ("a", "b")]
    mine, theirs = ([("authorization", f"Bearer {k}")] for k in keys)
    data = os.urandom(4500)
    made = upload(stub, data, mine, purpose="batch", expires_after={"seconds": 3600})
    assert made.sha256 == hashlib.sha256(data).hexdigest() and made.size_bytes == 4500
    assert made.expires_at.seconds - made.created_at.seconds == 3600
    ask = file_pb2.DownloadFileRequest(file=made.id)
    assert b"".join(p.data for p in stub.DownloadFile(ask, metadata=mine)) == data
    for call in (
        lambda: list(stub.DownloadFile(ask, metadata=theirs)),
        lambda: stub.GetFile(file_pb2.GetFileRequest(file=made.id), metadata=theirs),
        lambda: stub.DeleteFile(file_pb2.DeleteFileRequest(file=made.id), metadata=theirs),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            call()
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    for size in (5001, 4000):  # one too large by itself, one for the key
        with pytest.raises(grpc.RpcError) as caught:
            upload(stub, os.urandom(size), mine)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "the limit is" in caught.value.details()
    folder = live.settings.home / "files"
    assert [p.name for p in folder.iterdir()] == [made.id], "refused uploads leave nothing"
    library = live.server._deferred._files
    real = library._clock
    library._clock = lambda: real() + 3601
    try:
        assert not stub.ListFiles(file_pb2.ListFilesRequest(), metadata=mine).files
        live.run(library.sweep())
    finally:
        library._clock = real
    assert not list(folder.iterdir())
    assert upload(stub, b"again", mine).id != made.id


def test_rest_gives_the_bytes_of_files(gateway: Gateway) -> None:
    data = b"<script>1</script>" * 100_000
    made = gateway.http.post(
        "/api/v1/files", files={"files": ("x.html", data)}, data={"purpose": "user_data"}
    ).json()["file"]
    got = gateway.http.get(f"/api/v1/files/{made['id']}/content")
    assert got.content == data and got.headers["content-type"] == "application/octet-stream"
    assert got.headers["x-content-type-options"] == "nosniff"
    assert gateway.http.delete(f"/api/v1/files/{made['id']}").status_code == 200
    assert gateway.http.get(f"/api/v1/files/{made['id']}/content").status_code == 404


def test_a_page_says_whether_more_follow(live: Live, gateway: Gateway) -> None:
    stub = file_pb2_grpc.FileServiceStub(live.channel)
    made = [upload(stub, b"x", purpose="vision").id for _ in range(5)]
    ask = file_pb2.ListFilesRequest(purpose="vision", oldest_first=True, page_size=2, after=made[0])
    seen = []
    while True:
        page = stub.ListFiles(ask)
        seen.append([f.id for f in page.files])
        if not page.next_page_token:
            break
        ask.page_token = page.next_page_token
    assert seen == [made[1:3], made[3:5]]

    def listed(**query: Any) -> tuple[int, bool]:
        params = {"purpose": "vision", "order": "asc", **query}
        found = gateway.http.get("/v1/files", params=params).json()
        return len(found["data"]), found["has_more"]

    assert listed(limit=5) == (5, False) and listed(limit=4) == (4, True)
    assert listed(limit=2, after=made[0]) == (2, True)
    assert listed(limit=2, after=made[2]) == (2, False)
    # The largest page is full with 10,000: facts suffice, their bytes are not asked for.
    library = live.server._deferred._files

    async def many() -> None:
        async with library.store._database.begin() as db:
            row = (await db.execute(files.select().where(files.c.id == made[0]))).one()._asdict()
            rows = [{**row, "id": f"file_{i:032x}", "created_at": 1.0 + i} for i in range(9_996)]
            await db.execute(files.insert(), rows)

    live.run(many())
    assert listed() == (10_000, True)
    assert listed(after=f"file_{0:032x}") == (10_000, False)


def test_openai_files(client: openai.OpenAI) -> None:
    made = client.files.create(file=("a.jsonl", b"{}\n"), purpose="batch")
    assert made.filename == "a.jsonl" and made.bytes == 3
    assert client.files.retrieve(made.id).id == made.id
    assert client.files.content(made.id).content == b"{}\n"
    others = [client.files.create(file=(f"{i}.txt", b"x"), purpose="user_data") for i in range(5)]
    listed = [f.id for f in client.files.list(purpose="user_data", limit=2)]
    assert listed[:5] == [f.id for f in reversed(others)], "pages follow one another"
    assert client.files.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(made.id)
    with pytest.raises(openai.NotFoundError):
        client.batches.create(
            input_file_id=made.id, endpoint="/v1/embeddings", completion_window="24h"
        )
