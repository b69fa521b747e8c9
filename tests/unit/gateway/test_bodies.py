"""Bodies with a content encoding are read at every door, within the same bound."""

from __future__ import annotations

import asyncio
import gzip
import zlib
from typing import Any

import pytest
from forebay.errors import InvalidArgument, TooLarge
from forebay_gateway.upstream import Upstream
from starlette.requests import Request

LIMIT = 1000


def body(data: bytes, encoding: str) -> bytes:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": data}

    headers = [(b"content-encoding", encoding.encode())]
    request = Request({"type": "http", "headers": headers}, receive)
    return asyncio.run(Upstream("none:1", 1, LIMIT, LIMIT).body(request))


def test_packed_bodies_are_unpacked() -> None:
    assert body(gzip.compress(b"{}" * 9), "gzip") == b"{}" * 9
    assert body(zlib.compress(b"{}"), "deflate") == b"{}"
    assert body(b"{}", "identity") == b"{}"


@pytest.mark.parametrize(
    ("data", "encoding", "kind", "said"),
    [
        (b"{}", "br", InvalidArgument, "content-encoding: is 'br'; allowed are gzip, deflate"),
        (b"{}", "gzip", InvalidArgument, "body: is not gzip"),
        (
            gzip.compress(b"{}", mtime=0)[:-9],  # a test's name, which must not depend on the time
            "gzip",
            InvalidArgument,
            "body: is not gzip: it ends too early",
        ),
        (gzip.compress(b" " * (LIMIT + 1), mtime=0), "gzip", TooLarge, "the limit is 1000 bytes"),
    ],
)
def test_what_cannot_be_unpacked_is_said(data: bytes, encoding: str, kind: Any, said: str) -> None:
    with pytest.raises(kind, match=said):
        body(data, encoding)
