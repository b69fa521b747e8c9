"""Metrics of HTTP requests that the server answers itself; the gateway has its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from forebay_server.observability.histogram import Cell
from forebay_server.observability.rpc_metrics import SECONDS


class HttpMetrics(Collector):
    """forebay_http_direct_duration_seconds. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cells: dict[tuple[str, str], Cell] = {}

    def ended(self, route: str, status: int, seconds: Sequence[float]) -> None:
        """Requests of a route were answered: how long each took."""
        with self._lock:
            cell = self._cells.get((route, str(status)))
            if cell is None:
                cell = self._cells[route, str(status)] = Cell(SECONDS)
            cell.extend(seconds)

    def collect(self) -> Iterator[Metric]:
        """What is known now."""
        durations = HistogramMetricFamily(
            "forebay_http_direct_duration_seconds",
            "Time to the answer of an HTTP request that passes no gateway",
            labels=["route", "status"],
        )
        with self._lock:
            for labels, cell in self._cells.items():
                cell.write(durations, labels)
        yield durations
