"""Whether a run of a model has the machine to itself: ADR 26."""

from __future__ import annotations

import threading
import time

#: About the time between two batches of a busy instance.
BESIDE_S = 0.05


class Occupancy:
    """The runs of one model's instances. A run alone may use all threads; runs beside each other
    use their own few each.

    Under load one run may end as the next begins: none counts as alone for `BESIDE_S` after two last
    ran beside each other, as it would meet the next.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running = 0
        self._beside_until = 0.0

    def begin(self) -> bool:
        """A run begins. True when it is alone; no other is, until it ends."""
        with self._lock:
            self._mark()
            self._running += 1
            return time.monotonic() >= self._beside_until

    def end(self) -> None:
        """A run that began has ended."""
        with self._lock:
            self._running -= 1
            self._mark()

    def _mark(self) -> None:
        if self._running:
            self._beside_until = time.monotonic() + BESIDE_S
