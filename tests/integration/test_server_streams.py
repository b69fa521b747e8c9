"""Server streams on both lanes: order, slow readers, callers that leave, deadlines, the end."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from forebay.v1 import file_pb2, file_pb2_grpc, model_pb2, model_pb2_grpc

from tests.conftest import Live, Start, copy_models

PIECE = 64 << 10
WATCH = "/forebay.v1.ModelService/WatchModels"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, starters: Path) -> Path:
    return copy_models(starters, tmp_path_factory.mktemp("models"), "iris")


@pytest.fixture(scope="module")
def live(start: Start, models: Path) -> Live:
    return start(models)


@pytest.fixture(scope="module")
def large(live: Live) -> tuple[str, str, int]:
    """A file of 48 MiB: its id, hash and size."""
    data = os.urandom(PIECE)
    pieces = 768

    def parts() -> Iterator[file_pb2.UploadFileRequest]:
        yield file_pb2.UploadFileRequest(header={"purpose": "user_data"})
        for i in range(pieces):
            yield file_pb2.UploadFileRequest(
                chunk={"path": "large", "data": i.to_bytes(8, "big") + data[8:]}
            )

    made = file_pb2_grpc.FileServiceStub(live.channel).UploadFile(parts(), timeout=60)
    return made.file.id, made.file.sha256, made.file.size_bytes


def how_far(live: Live, file: str) -> int | None:
    """How much of a file the server has read; None when it is not open."""
    folder = live.settings.home
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
            if target.startswith(str(folder)) and target.endswith(file):
                info = Path(f"/proc/self/fdinfo/{fd}").read_text()
                return int(info.split("pos:")[1].split()[0])
        except OSError:
            continue
    return None


def calls(live: Live, method: str, code: str) -> float:
    """Calls of a method that ended so."""
    name = "forebay_rpc_server_duration_seconds_count"
    labels = {"method": method, "code": code}
    return live.server.metrics.registry.get_sample_value(name, labels) or 0.0


def until(true: Any, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_slow_reader_gets_all_and_the_server_does_not_run_ahead(
    live: Live, large: tuple[str, str, int]
) -> None:
    file, sha256, size = large
    request = file_pb2.DownloadFileRequest(file=file)
    with grpc.insecure_channel(live.target) as channel:
        stream = file_pb2_grpc.FileServiceStub(channel).DownloadFile(request, timeout=60)
        seen = hashlib.sha256()
        got = 0
        for i, piece in enumerate(stream):
            if i == 0:
                time.sleep(1.0)  # windows fill
                ahead = how_far(live, file)
                assert ahead is not None and ahead < size / 2
            seen.update(piece.data)
            got += len(piece.data)
    assert (got, seen.hexdigest()) == (size, sha256)


def test_a_caller_that_leaves_a_stream_that_waits_ends_it(
    live: Live, large: tuple[str, str, int]
) -> None:
    file, _, _ = large
    method = "/forebay.v1.FileService/DownloadFile"
    before = calls(live, method, "CANCELLED")
    channel = grpc.insecure_channel(live.target)
    streams = [
        file_pb2_grpc.FileServiceStub(channel).DownloadFile(file_pb2.DownloadFileRequest(file=file))
        for _ in range(4)
    ]
    for stream in streams:
        next(stream)
    until(lambda: how_far(live, file) is not None)
    for stream in streams[:2]:
        stream.cancel()
    until(lambda: calls(live, method, "CANCELLED") == before + 2)
    channel.close()  # the others go with their connection
    until(lambda: calls(live, method, "CANCELLED") == before + 4)
    assert how_far(live, file) is None, "what they held is closed"


def test_a_stream_keeps_its_deadline(live: Live) -> None:
    started = time.monotonic()
    stream = model_pb2_grpc.ModelServiceStub(live.channel).WatchModels(
        model_pb2.WatchModelsRequest(), timeout=0.5
    )
    with pytest.raises(grpc.RpcError) as caught:
        for _ in stream:
            pass
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert 0.4 < time.monotonic() - started < 2
    until(lambda: calls(live, WATCH, "DEADLINE_EXCEEDED") == 1)


def test_errors_before_and_at_the_first_message_are_told(live: Live) -> None:
    stub = file_pb2_grpc.FileServiceStub(live.channel)
    for request, code in (
        (file_pb2.DownloadFileRequest(), "INVALID_ARGUMENT"),
        (file_pb2.DownloadFileRequest(file="file-none"), "NOT_FOUND"),
    ):
        stream = stub.DownloadFile(request, timeout=10, metadata=(("x-request-id", "mine"),))
        with pytest.raises(grpc.RpcError) as caught:
            next(stream)
        assert caught.value.code().name == code
        trailers: dict[Any, Any] = dict(caught.value.trailing_metadata())
        assert trailers["x-request-id"] == "mine"
        assert b"google.rpc.ErrorInfo" in trailers["grpc-status-details-bin"]


def test_many_streams_at_once_are_whole(live: Live, large: tuple[str, str, int]) -> None:
    file, sha256, _ = large
    wrong: list[str] = []

    def read() -> None:
        seen = hashlib.sha256()
        request = file_pb2.DownloadFileRequest(file=file)
        for piece in file_pb2_grpc.FileServiceStub(live.channel).DownloadFile(request, timeout=60):
            seen.update(piece.data)
        if seen.hexdigest() != sha256:
            wrong.append(seen.hexdigest())

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_open_streams_hear_that_the_server_ends(start: Start, models: Path) -> None:
    live = start(models, grpc__drain_s=0.3)
    with grpc.insecure_channel(live.target) as channel:
        stream = model_pb2_grpc.ModelServiceStub(channel).WatchModels(
            model_pb2.WatchModelsRequest()
        )
        next(stream)
        started = time.monotonic()
        stopping = threading.Thread(target=live.stop)
        stopping.start()
        with pytest.raises(grpc.RpcError) as caught:
            for _ in stream:
                pass
        assert caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        assert time.monotonic() - started < 5
        stopping.join()
