"""Where calls of the ordinary lane wait to cross to the services, as batches.

Ingest threads take all calls that wait, whatever their method. A lone call costs one thread hop;
under load the list grows by itself, and tokenising, limits and logs run per batch.
"""

from __future__ import annotations

import threading

from forebay_server.core.call import Call
from forebay_server.transport.dispatch import Dispatcher

#: Calls that one ingest thread takes at once. Bounds the wait of the first of them.
MAX_TAKE = 256


class Inbox:
    """Calls with their unparsed messages, and the threads that take them."""

    def __init__(self, dispatcher: Dispatcher, threads: int = 1) -> None:
        self._dispatcher = dispatcher
        self._waiting: list[Call] = []
        self._ready = threading.Condition(threading.Lock())
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"ingest-{i}", daemon=True)
            for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def put(self, call: Call) -> None:
        """Hand a call over. Never blocks."""
        with self._ready:
            self._waiting.append(call)
            if len(self._waiting) == 1:
                self._ready.notify()

    def close(self) -> None:
        """Let the threads end once nothing waits."""
        with self._ready:
            self._closed = True
            self._ready.notify_all()
        for thread in self._threads:
            thread.join(timeout=5)

    def _take(self) -> list[Call]:
        with self._ready:
            while not self._waiting and not self._closed:
                self._ready.wait()
            taken = self._waiting[:MAX_TAKE]
            del self._waiting[:MAX_TAKE]
            if self._waiting:
                self._ready.notify()
            return taken

    def _run(self) -> None:
        while taken := self._take():
            self._dispatcher.serve(taken)
