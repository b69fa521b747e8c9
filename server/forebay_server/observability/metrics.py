"""All metrics, in one place, with OpenTelemetry-style names. docs/metrics.md lists them.

Histograms, not averages: they can be added up over replicas. Children are looked up once and kept:
a look-up by labels costs as much as the observation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from forebay_server.core.batcher import BatchReport
from forebay_server.observability.generation_metrics import GenerationMetrics
from forebay_server.observability.rpc_metrics import SECONDS, RpcMetrics

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
#: No `_created` series: they nearly double the exposition, and Prometheus has no use for them.
disable_created_metrics()

RATIO = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


class Metrics:
    """The registry and its metrics. One per server."""

    def __init__(self) -> None:
        r = self.registry = CollectorRegistry()
        self.rpc = RpcMetrics()
        r.register(self.rpc)
        self.rejected = Counter(
            "forebay_rpc_server_rejected",
            "Calls refused before any work",
            ["reason"],
            registry=r,
        )
        self.items = Counter(
            "forebay_items", "Items (texts, rows, pairs) answered", ["model"], registry=r
        )
        self.tokens = Counter("forebay_tokens", "Tokens of answered calls", ["model"], registry=r)
        self.cache = Counter(
            "forebay_cache_lookups",
            "Look-ups in the response cache",
            ["model", "result"],
            registry=r,
        )
        self.queue_time = Histogram(
            "forebay_queue_time_seconds",
            "Wait of a batch's oldest item in the queue",
            ["model", "version"],
            buckets=SECONDS,
            registry=r,
        )
        self.execute_time = Histogram(
            "forebay_batch_execute_seconds",
            "Time of a batch in the model",
            ["model", "version"],
            buckets=SECONDS,
            registry=r,
        )
        self.batch_rows = Histogram(
            "forebay_batch_rows", "Rows of a batch", ["model", "version"], buckets=ROWS, registry=r
        )
        self.token_efficiency = Histogram(
            "forebay_batch_token_efficiency",
            "Real tokens over padded tokens of a batch",
            ["model", "version"],
            buckets=RATIO,
            registry=r,
        )
        self.queue_depth = Gauge(
            "forebay_queue_depth",
            "Rows waiting after the newest batch",
            ["model", "version"],
            registry=r,
        )
        self.bypassed = Counter(
            "forebay_shared_state_bypassed",
            "Decisions and look-ups made without Redis because it was away",
            ["part"],
            registry=r,
        )
        self.index_rebuilds = Counter(
            "forebay_collection_index_rebuilds",
            "Indexes built anew from the database because theirs was damaged",
            ["collection", "reason"],
            registry=r,
        )
        self.generation = GenerationMetrics(r)
        self.documents = Counter(
            "forebay_documents_ingested",
            "Documents whose ingest has ended",
            ["status"],
            registry=r,
        )
        self.answers = Counter(
            "forebay_knowledge_answers",
            "Answers from knowledge bases, by how they came to be",
            ["method"],
            registry=r,
        )
        self.unsupported = Counter(
            "forebay_knowledge_unsupported",
            "Pieces of written answers that no source supports",
            ["reason"],
            registry=r,
        )
        ProcessCollector(registry=r)
        self._lookups: dict[tuple[str, str], Any] = {}

    def batch_observer(self, model: str, version: int) -> Callable[[BatchReport], None]:
        """The observer of one model version's batches."""
        labels = (model, str(version))
        queue, execute = self.queue_time.labels(*labels), self.execute_time.labels(*labels)
        rows, depth = self.batch_rows.labels(*labels), self.queue_depth.labels(*labels)
        efficiency = self.token_efficiency.labels(*labels)

        def observe(report: BatchReport) -> None:
            queue.observe(report.queue_s)
            execute.observe(report.execute_s)
            rows.observe(report.rows)
            depth.set(report.queue_depth)
            if report.padded_tokens:
                efficiency.observe(report.tokens / report.padded_tokens)

        return observe

    def cache_looked_up(self, model: str, hits: int, misses: int) -> None:
        """One look-up of several items."""
        for result, count in (("hit", hits), ("miss", misses)):
            if count:
                child = self._lookups.get((model, result))
                if child is None:
                    child = self._lookups[model, result] = self.cache.labels(model, result)
                child.inc(count)

    def watch_models(self, memory: Callable[[], Iterable[tuple[str, int, int]]]) -> None:
        """Report model, version and resident bytes of what is loaded, at each scrape."""
        self.registry.register(_ModelMemory(memory))

    def watch_collections(self, sizes: Callable[[], Iterable[tuple[str, int, int]]]) -> None:
        """Report points and bytes in memory of every collection, at each scrape."""
        self.registry.register(_CollectionSizes(sizes))

    def exposition(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self.registry)


class _ModelMemory(Collector):
    def __init__(self, memory: Callable[[], Iterable[tuple[str, int, int]]]) -> None:
        self._memory = memory

    def collect(self) -> Iterable[GaugeMetricFamily]:
        family = GaugeMetricFamily(
            "forebay_model_memory_bytes",
            "Resident bytes of a loaded version",
            labels=["model", "version"],
        )
        for model, version, size in self._memory():
            family.add_metric([model, str(version)], size)
        yield family


class _CollectionSizes(Collector):
    def __init__(self, sizes: Callable[[], Iterable[tuple[str, int, int]]]) -> None:
        self._sizes = sizes

    def collect(self) -> Iterable[GaugeMetricFamily]:
        points = GaugeMetricFamily(
            "forebay_collection_points", "Points of a collection", labels=["collection"]
        )
        memory = GaugeMetricFamily(
            "forebay_collection_memory_bytes",
            "Bytes of a collection's indexes in memory",
            labels=["collection"],
        )
        for name, count, size in self._sizes():
            points.add_metric([name], count)
            memory.add_metric([name], size)
        yield points
        yield memory
