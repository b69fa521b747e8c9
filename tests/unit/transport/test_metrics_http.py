"""The listener of the metrics, when they cannot be written, and when nobody speaks HTTP."""

from __future__ import annotations

import asyncio

import pytest
from forebay_server.transport.metrics_http import MetricsListener


async def answer(listener: MetricsListener, request: bytes) -> bytes:
    port = await listener.start(0)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    writer.write_eof()
    found = await reader.read()
    writer.close()
    await listener.stop()
    return found


async def test_metrics_that_cannot_be_written_are_an_error_and_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken() -> bytes:
        raise RuntimeError("a collector broke")

    found = await answer(MetricsListener(broken), b"GET /metrics HTTP/1.1\r\n\r\n")
    assert found.startswith(b"HTTP/1.1 500 ")
    assert "a collector broke" in caplog.text


@pytest.mark.parametrize("request_", [b"", b"GET /met", b"x" * 100_000])
async def test_what_is_no_request_is_hung_up_on_in_silence(
    request_: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    assert await answer(MetricsListener(lambda: b""), request_) == b""
    assert not caplog.records


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", b"200"),
        ("127.0.0.1:9090", b"200"),
        ("[::1]:9090", b"200"),
        ("metrics.localhost:9090", b"200"),
        ("rebound.example:9090", b"403"),
        ("localhost.example", b"403"),
        ("[", b"403"),
        ("", b"200"),
    ],
)
async def test_pages_of_sites_that_mean_this_machine_read_nothing(host: str, status: bytes) -> None:
    listener = MetricsListener(lambda: b"secret 1\n")
    request_ = f"GET /metrics HTTP/1.1\r\nAccept: */*\r\nhost: {host}\r\n\r\n".encode()
    found = await answer(listener, request_)
    assert found.split(b" ", 2)[1] == status
    assert (b"secret" in found) == (status == b"200")
