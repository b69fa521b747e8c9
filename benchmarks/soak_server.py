"""`forebay serve` that also writes down, every few seconds, what it holds: for the soak.

python -m benchmarks.soak_server SAMPLES.ndjson
"""

from __future__ import annotations

import asyncio
import gc
import json
import signal
import sys
import threading
import time
from pathlib import Path

EVERY_S = 5.0


def main() -> None:
    """Serve until SIGTERM."""
    import uvloop
    from forebay.settings import load_settings
    from forebay_cli import huge_pages
    from forebay_server.core.allocator import bound_arenas

    huge_pages.ensure()
    bound_arenas()
    from forebay_cli.serve import http_port
    from forebay_server.app import Server
    from forebay_server.observability.logs import configure

    settings = load_settings().settings
    o = settings.observability
    listener = configure(o.log_format, o.log_level, o.access_log)
    out = Path(sys.argv[1]).open("w")  # noqa: SIM115 - closed below

    async def serve() -> None:
        server = Server(settings, http_port(settings))
        await server.start()
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        begin = time.monotonic()
        while not stop.is_set():
            sample = {
                "at_s": time.monotonic() - begin,
                "tasks": len(asyncio.all_tasks()),
                "threads": threading.active_count(),
                "objects": len(gc.get_objects()),
                "http_port": server.lanes.http_port,
                **server.lanes.stats(),
            }
            out.write(json.dumps(sample) + "\n")
            out.flush()
            try:
                await asyncio.wait_for(stop.wait(), EVERY_S)
            except TimeoutError:
                pass  # time for the next sample
        await server.stop()

    try:
        uvloop.run(serve())
    finally:
        listener.stop()
        out.close()


if __name__ == "__main__":
    main()
