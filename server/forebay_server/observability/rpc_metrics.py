"""Metrics of calls, observed a batch at a time.

The client library's own histogram costs more a call than the rest of the bookkeeping together;
here one lock covers a batch, and the exposition is made at the scrape.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence

from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class _Cell:
    """Durations of one method and code."""

    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts = [0] * (len(SECONDS) + 1)
        self.total = 0.0


class RpcMetrics(Collector):
    """forebay_rpc_server_duration_seconds and forebay_rpc_server_active_requests. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cells: dict[tuple[str, str], _Cell] = {}
        self._active: dict[str, int] = {}

    def started(self, methods: Iterable[str]) -> None:
        """Calls have arrived, one of each method given."""
        with self._lock:
            active = self._active
            for method in methods:
                active[method] = active.get(method, 0) + 1

    def ended(self, method: str, code: str, seconds: Sequence[float]) -> None:
        """Calls of a method have their status: how long each took."""
        with self._lock:
            self._active[method] -= len(seconds)
            cell = self._cells.get((method, code))
            if cell is None:
                cell = self._cells[method, code] = _Cell()
            counts = cell.counts
            for took in seconds:
                counts[bisect_left(SECONDS, took)] += 1
            cell.total += sum(seconds)

    def collect(self) -> Iterator[Metric]:
        """What is known now."""
        durations = HistogramMetricFamily(
            "forebay_rpc_server_duration_seconds",
            "Time from a call's arrival to its status",
            labels=["method", "code"],
        )
        active = GaugeMetricFamily(
            "forebay_rpc_server_active_requests", "Calls in progress", labels=["method"]
        )
        bounds = [*(str(float(s)) for s in SECONDS), "+Inf"]
        with self._lock:
            for labels, cell in self._cells.items():
                below, buckets = 0, []
                for bound, count in zip(bounds, cell.counts, strict=True):
                    below += count
                    buckets.append((bound, below))
                durations.add_metric(labels, buckets, cell.total)
            for method, n in self._active.items():
                active.add_metric([method], n)
        yield durations
        yield active
