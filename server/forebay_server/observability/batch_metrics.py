"""Metrics of batches, by model and version."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from forebay_server.core.batcher import BatchReport
from forebay_server.observability.histogram import Cell
from forebay_server.observability.rpc_metrics import SECONDS

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
RATIO = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_FAMILIES = (
    ("forebay_queue_time_seconds", "Wait of a batch's oldest item in the queue", SECONDS),
    ("forebay_batch_execute_seconds", "Time of a batch in the model", SECONDS),
    ("forebay_batch_rows", "Rows of a batch", ROWS),
    ("forebay_batch_token_efficiency", "Real tokens over padded tokens of a batch", RATIO),
)


class _Version:
    def __init__(self) -> None:
        self.cells = [Cell(bounds) for _, _, bounds in _FAMILIES]
        self.depth = 0


class BatchMetrics(Collector):
    """forebay_queue_time_seconds, forebay_batch_*, forebay_queue_depth. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._versions: dict[tuple[str, str], _Version] = {}

    def observer(self, model: str, version: int) -> Callable[[BatchReport], None]:
        """The observer of one model version's batches."""
        with self._lock:
            own = self._versions.setdefault((model, str(version)), _Version())
        queue, execute, rows, efficiency = own.cells

        def observe(report: BatchReport) -> None:
            with self._lock:
                queue.add(report.queue_s)
                execute.add(report.execute_s)
                rows.add(report.rows)
                if report.padded_tokens:
                    efficiency.add(report.tokens / report.padded_tokens)
                own.depth = report.queue_depth

        return observe

    def collect(self) -> Iterator[Metric]:
        """What is known now."""
        labels = ["model", "version"]
        families = [HistogramMetricFamily(n, text, labels=labels) for n, text, _ in _FAMILIES]
        depth = GaugeMetricFamily(
            "forebay_queue_depth", "Rows waiting after the newest batch", labels=labels
        )
        with self._lock:
            for names, version in self._versions.items():
                for family, cell in zip(families, version.cells, strict=True):
                    cell.write(family, names)
                depth.add_metric(list(names), version.depth)
        yield from families
        yield depth
