"""Clients that leave before an upstream's first message."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from tests.integration.gateway import Gateway

BODY = b'{"model":"m","messages":[{"role":"user","content":"a"}],"stream":true,"max_tokens":5}'


class Slow(grpc.GenericRpcHandler):
    """Streams whose first message does not come while the caller is there."""

    def __init__(self) -> None:
        self.begun, self.left = threading.Event(), threading.Event()

    def service(self, handler_call_details: Any) -> Any:
        return grpc.unary_stream_rpc_method_handler(self._wait)

    def _wait(self, message: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        context.add_callback(self.left.set)
        self.begun.set()
        self.left.wait(60)
        yield b""


@pytest.mark.parametrize(
    ("verb", "path", "body"),
    [
        ("GET", "/api/v1/models:watch", b""),
        ("POST", "/v1/chat/completions", BODY),
        ("POST", "/v1/messages", BODY),
    ],
)
def test_who_leaves_before_the_first_message_ends_the_call(
    verb: str, path: str, body: bytes
) -> None:
    """The call ran on until its first message: a language model's until it had read the prompt."""
    slow = Slow()
    server = grpc.server(ThreadPoolExecutor(2), handlers=[slow])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    gateway = Gateway(f"127.0.0.1:{port}")
    try:
        with socket.create_connection(("127.0.0.1", gateway.port)) as raw:
            head = f"{verb} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            raw.sendall(head.encode() + body)
            assert slow.begun.wait(20)
            assert not slow.left.is_set()
        assert slow.left.wait(20)
    finally:
        gateway.stop()
        server.stop(0)
