"""What one connection may ask for is bounded on both lanes."""

from __future__ import annotations

from pathlib import Path

import grpc
import h2.events
import h2.settings
import pytest
from forebay.v1 import embedding_pb2

from tests.conftest import Live, Start
from tests.integration.test_abuse import Client

#: Answered by the fast lane itself, and passed on to the ordinary one.
PATHS = ["/forebay.v1.EmbeddingService/Embed", "/forebay.v1.ModelService/ListModels"]
LARGE = 40 << 10


@pytest.fixture(scope="module")
def bounded(embedder: Path, start: Start) -> Live:
    return start(embedder, grpc__max_streams=3, grpc__max_header_bytes=LARGE + 1024)


def call(live: Live, path: str, header: int) -> grpc.StatusCode:
    """A call's status, where it has a header of so many bytes."""
    message = (
        embedding_pb2.EmbedRequest(texts=["a"]).SerializeToString() if "Embed" in path else b""
    )
    metadata = (("x-large", "a" * header),)
    with grpc.insecure_channel(live.target) as channel:
        return channel.unary_unary(path).future(message, metadata=metadata, timeout=20).code()


@pytest.mark.parametrize("path", PATHS)
def test_headers_have_the_bound_that_is_set(bounded: Live, path: str) -> None:
    assert call(bounded, path, LARGE) is grpc.StatusCode.OK
    assert call(bounded, path, LARGE + 2048) is not grpc.StatusCode.OK


def test_calls_of_a_connection_have_the_bound_that_is_set(bounded: Live) -> None:
    client = Client(bounded)
    told = client.h2.remote_settings
    next(e for e in client.events() if isinstance(e, h2.events.RemoteSettingsChanged))
    assert told[h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS] == 3
    told[h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS] = 100  # a client that does not care
    told.acknowledge()
    for stream in range(1, 15, 2):
        client.h2.send_headers(stream, client.headers())
    client.flush()
    refused = next(
        e
        for e in client.events()
        if isinstance(e, h2.events.StreamReset | h2.events.ConnectionTerminated)
    )
    assert refused is not None
    client.socket.close()
