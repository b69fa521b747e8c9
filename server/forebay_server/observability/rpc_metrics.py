"""Metrics of calls, observed a batch at a time: one lock covers all calls that ended together."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from forebay_server.observability.histogram import Cell

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class RpcMetrics(Collector):
    """forebay_rpc_server_duration_seconds and forebay_rpc_server_active_requests. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cells: dict[tuple[str, str], Cell] = {}
        self._active: Counter[str] = Counter()

    def started(self, methods: Iterable[str] | Mapping[str, int]) -> None:
        """Calls have arrived, one of each method given, or so many."""
        with self._lock:
            self._active.update(methods)

    def ended(self, method: str, code: str, seconds: Sequence[float]) -> None:
        """Calls of a method have their status: how long each took."""
        with self._lock:
            self._active[method] -= len(seconds)
            self._cell(method, code).extend(seconds)

    def refused(self, method: str, code: str, count: int) -> None:
        """So many calls of a method were refused as they came, in no time."""
        with self._lock:
            self._cell(method, code).add(0.0, count)

    def _cell(self, method: str, code: str) -> Cell:
        cell = self._cells.get((method, code))
        if cell is None:
            cell = self._cells[method, code] = Cell(SECONDS)
        return cell

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
        with self._lock:
            for labels, cell in self._cells.items():
                cell.write(durations, labels)
            for method, n in self._active.items():
                active.add_metric([method], n)
        yield durations
        yield active
