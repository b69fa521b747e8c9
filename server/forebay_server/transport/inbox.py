"""Where calls of the ordinary lane wait to cross to the services, as batches.

Ingest threads take all calls that wait, whatever their method. A lone call costs one thread hop;
under load the list grows by itself, and tokenising, limits and logs run per batch.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict

from forebay.settings import GrpcSettings

from forebay_server.core.call import Call
from forebay_server.transport.dispatch import Dispatcher

#: Calls that one ingest thread takes at once. Bounds the wait of the first of them.
MAX_TAKE = 256


class Inbox:
    """Calls with their unparsed messages, and the threads that take them.

    Its bounds are those of the fast lane: calls that wait, bytes of messages of calls that have not
    ended, and how long a call may wait before no more are taken.
    """

    def __init__(self, dispatcher: Dispatcher, settings: GrpcSettings) -> None:
        self._dispatcher = dispatcher
        self._settings = settings
        self._waiting: OrderedDict[Call, None] = OrderedDict()
        self._bytes = 0
        self._ready = threading.Condition(threading.Lock())
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"ingest-{i}", daemon=True)
            for i in range(settings.ingest_threads)
        ]
        for thread in self._threads:
            thread.start()

    def put(self, call: Call) -> bool:
        """Hand a call over; `leave` must follow. False when too much waits. Never blocks."""
        size = len(call.message)
        with self._ready:
            if self._full(size):
                return False
            self._bytes += size
            self._waiting[call] = None
            if len(self._waiting) == 1:
                self._ready.notify()
        return True

    def leave(self, call: Call, size: int) -> None:
        """A call that was put, with a message of so many bytes, has ended, or nobody waits for it."""
        with self._ready:
            self._waiting.pop(call, None)
            self._bytes -= size

    def close(self) -> None:
        """Let the threads end once nothing waits."""
        with self._ready:
            self._closed = True
            self._ready.notify_all()
        for thread in self._threads:
            thread.join(timeout=5)

    def _full(self, size: int) -> bool:
        s, first = self._settings, next(iter(self._waiting), None)
        return (
            len(self._waiting) >= s.max_waiting_calls
            or self._bytes + size > s.max_waiting_bytes
            or (first is not None and time.monotonic() - first.started > s.max_waiting_s)
        )

    def _take(self) -> list[Call]:
        with self._ready:
            while not self._waiting and not self._closed:
                self._ready.wait()
            count = min(MAX_TAKE, len(self._waiting))
            taken = [self._waiting.popitem(last=False)[0] for _ in range(count)]
            if self._waiting:
                self._ready.notify()
            return taken

    def _run(self) -> None:
        while taken := self._take():
            self._dispatcher.serve(taken)
