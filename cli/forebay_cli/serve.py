"""`forebay serve`: the gRPC server's process, from signals to exit status."""

from __future__ import annotations

import asyncio
import logging
import signal
from typing import TYPE_CHECKING

from forebay.errors import ForebayError
from forebay.settings import Settings, SettingsError
from forebay.tls import tls_files

from forebay_cli.settings import has_fast_lane
from forebay_cli.supervised import listen

if TYPE_CHECKING:
    from forebay_server.transport.http_port import HttpPort

log = logging.getLogger("forebay.server")


def http_port(settings: Settings) -> HttpPort | None:
    """The HTTP port, where the server is to have it."""
    from forebay_server.transport.http_port import HttpPort

    http = settings.http
    if not http.gateway:
        return None
    from forebay_gateway import direct

    return HttpPort(
        host=http.host,
        port=http.port,
        gateway=http.gateway,
        routes=direct.routes(),
        forwarded=direct.HEADERS,
        returned=direct.returned,
        aside=direct.ASIDE,
        max_body_bytes=http.max_body_bytes,
        timeout_s=http.timeout_s,
        idle_timeout_s=http.idle_timeout_s,
        tls=tls_files("http", http),
    )


def check_tls(settings: Settings) -> None:
    """Look at the files of TLS before all that takes seconds. Without the extension, what they hold is looked at
    when the port is opened.

    Raises:
        SettingsError: they cannot be read, or are not what they should be.
    """
    ports = [("grpc", settings.grpc), ("http", settings.http)]
    for section, port in ports if settings.http.gateway else ports[:1]:
        files = tls_files(section, port)
        if files is None:
            continue
        pem = files.read()
        if has_fast_lane(settings):
            import forebay_native

            try:
                forebay_native.check_tls(*pem, http=section == "http")
            except ValueError as e:
                raise SettingsError(str(e)) from None


def run(settings: Settings, supervised: bool = False) -> int:
    """Serve until SIGTERM, SIGINT or SIGHUP, then drain. A second SIGTERM or SIGINT ends at once.

    SIGHUP is left ignored where it is (`nohup`). A terminal that closes may send it twice.

    Args:
        supervised: drain when the supervisor is gone, too.
    """
    from forebay_server.core.allocator import bound_arenas

    bound_arenas()  # before what follows starts threads
    from forebay_server.observability.logs import configure

    o = settings.observability
    writer = configure(o.log_format, o.log_level, o.access_log)
    try:
        check_tls(settings)
    except SettingsError as e:
        log.error("%s", e)
        writer.stop()
        return 1
    import uvloop
    from forebay_server.app import Server
    from forebay_server.storage.database import SchemaError

    async def main() -> int:
        loop = asyncio.get_running_loop()
        stop = asyncio.Event()
        # How each is answered while the server drains.
        ends = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.SIG_DFL}
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            ends[signal.SIGHUP] = signal.SIG_IGN
        for number in ends:
            loop.add_signal_handler(number, stop.set)
        server = Server(settings, http_port(settings))
        if supervised:
            listen(
                lambda: asyncio.run_coroutine_threadsafe(server.leave(), loop),
                lambda: loop.call_soon_threadsafe(stop.set),
            )
        starting = asyncio.create_task(server.start())
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            try:
                await starting
            except (OSError, SettingsError, SchemaError, ForebayError) as e:
                log.error("%s", e)
                return 1
            await stopping
        for number, then in ends.items():
            loop.remove_signal_handler(number)
            signal.signal(number, then)
        if starting.done():
            await server.stop()
        else:
            starting.cancel()
            await asyncio.wait({starting})  # it listens already, and has calls to answer
        return 0

    try:
        return uvloop.run(main())
    finally:
        writer.stop()
