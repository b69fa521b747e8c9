"""What is refused because too much waits: alike on both lanes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import grpc
from forebay.v1 import embedding_pb2 as em
from google.rpc import error_details_pb2, status_pb2

from tests.conftest import Start

EMBED = "/forebay.v1.EmbeddingService/Embed"
ROOM = 1 << 20


def test_what_would_be_too_much_is_refused(embedder: Path, start: Start) -> None:
    live = start(embedder, grpc__max_waiting_bytes=ROOM)
    ask = live.channel.unary_unary(EMBED)
    large = em.EmbedRequest(texts=["x" * ROOM]).SerializeToString()
    done = ask.future(large, timeout=20, metadata=(("x-request-id", "one"),))
    assert done.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert done.details() == "too many calls wait; try again soon"
    trailers: dict[str, Any] = dict(done.trailing_metadata())
    assert trailers["x-request-id"] == "one"
    status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    assert status.details[0].Unpack(info) and status.details[1].Unpack(retry)
    assert info.reason == "QUEUE_FULL"
    assert retry.retry_delay.ToMilliseconds() == 100
    small = em.EmbedRequest(texts=["a"]).SerializeToString()
    for _ in range(3):
        assert len(em.EmbedResponse.FromString(ask(small, timeout=20)).embeddings) == 1
    registry, labels = live.server.metrics.registry, {"reason": "QUEUE_FULL"}
    deadline = time.monotonic() + 10
    while registry.get_sample_value("forebay_rpc_server_rejected_total", labels) != 1:
        assert time.monotonic() < deadline
        time.sleep(0.05)
