"""All metrics, in one place, with OpenTelemetry-style names. docs/metrics.md lists them.

Histograms, not averages: they can be added up over replicas. Children are looked up once and kept:
a look-up by labels costs as much as the observation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from forebay.errors import QueueFull
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

from forebay_server.observability.batch_metrics import BatchMetrics
from forebay_server.observability.generation_metrics import GenerationMetrics
from forebay_server.observability.http_metrics import HttpMetrics
from forebay_server.observability.rpc_metrics import SECONDS, RpcMetrics

#: No `_created` series: they nearly double the exposition, and Prometheus has no use for them.
disable_created_metrics()


class Metrics:
    """The registry and its metrics. One per server."""

    def __init__(self) -> None:
        r = self.registry = CollectorRegistry()
        self.rpc = RpcMetrics()
        r.register(self.rpc)
        self.http = HttpMetrics()
        r.register(self.http)
        self.rejected = Counter(
            "forebay_rpc_server_rejected",
            "Calls refused before any work",
            ["reason"],
            registry=r,
        )
        self.leased = Counter(
            "forebay_rpc_server_leased",
            "Calls that the transport has answered by itself, like others before them",
            ["method"],
            registry=r,
        )
        self.items = Counter(
            "forebay_items", "Items (texts, rows, pairs) answered", ["model"], registry=r
        )
        self.tokens = Counter("forebay_tokens", "Tokens of answered calls", ["model"], registry=r)
        self.cache = Counter(
            "forebay_cache_lookups",
            "Look-ups in the response cache, by item; by call for language models",
            ["model", "result"],
            registry=r,
        )
        self.batches = BatchMetrics()
        r.register(self.batches)
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
        self.search_stages = Histogram(
            "forebay_search_stage_seconds",
            "Time of a batch of searches in a stage: dense, keyword, or payloads from the database",
            ["stage"],
            buckets=SECONDS,
            registry=r,
        )
        stages = {s: self.search_stages.labels(s).observe for s in ("dense", "keyword", "payload")}
        self.search_stage: Callable[[str, float], None] = lambda stage, s: stages[stage](s)
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
        self.batch_items = Counter(
            "forebay_batch_items",
            "Items of batches that have ended: `completed` or `failed`",
            ["result"],
            registry=r,
        )
        ProcessCollector(registry=r)
        self._lookups: dict[tuple[str, str], Any] = {}

    def cache_looked_up(self, model: str, hits: int, misses: int) -> None:
        """One look-up of several items."""
        for result, count in (("hit", hits), ("miss", misses)):
            if count:
                child = self._lookups.get((model, result))
                if child is None:
                    child = self._lookups[model, result] = self.cache.labels(model, result)
                child.inc(count)

    def refused_at_the_door(self, method: str, count: int) -> None:
        """Calls that the transport refused because too much waits; no stage has seen them."""
        self.rejected.labels(QueueFull.reason).inc(count)
        self.rpc.refused(method, QueueFull.code, count)

    def batch_items_ended(self, result: str, count: int) -> None:
        """Items of batches have ended: `completed` or `failed`."""
        self.batch_items.labels(result).inc(count)

    def watch_batches(self, numbers: Callable[[], tuple[int, int]]) -> None:
        """Report batches that have not ended, and items that run, at each scrape."""
        self.registry.register(_OpenBatches(numbers))

    def watch_models(self, memory: Callable[[], Iterable[tuple[str, int, int]]]) -> None:
        """Report model, version and resident bytes of what is loaded, at each scrape."""
        self.registry.register(_ModelMemory(memory))

    def watch_collections(
        self, sizes: Callable[[], Iterable[tuple[str, Mapping[str, float]]]]
    ) -> None:
        """Report the sizes of every collection, at each scrape."""
        self.registry.register(_CollectionSizes(sizes))

    def watch_follower(self, behind_s: Callable[[], float]) -> None:
        """Report how old what is known of other servers' writes is, at each scrape."""
        Gauge(
            "forebay_collections_behind_seconds",
            "Where servers share a PostgreSQL: seconds since the last moment of which this one has all "
            "that others wrote to collections",
            registry=self.registry,
        ).set_function(behind_s)

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


class _OpenBatches(Collector):
    def __init__(self, numbers: Callable[[], tuple[int, int]]) -> None:
        self._numbers = numbers

    def collect(self) -> Iterable[GaugeMetricFamily]:
        batches, running = self._numbers()
        yield GaugeMetricFamily(
            "forebay_batches_open", "Batches that have not ended", value=batches
        )
        yield GaugeMetricFamily(
            "forebay_batch_items_running", "Items of batches that are being run", value=running
        )


#: A collection's sizes, as CollectionIndex.sizes names them.
SIZES = {
    "points": "Points of a collection",
    "memory_bytes": "Bytes of a collection's indexes in memory",
    "tail_points": "Vectors that wait outside the built index and are compared one by one",
    "dead_ratio": "Share of a collection's index that updates and deletes have left behind",
}


class _CollectionSizes(Collector):
    def __init__(self, sizes: Callable[[], Iterable[tuple[str, Mapping[str, float]]]]) -> None:
        self._sizes = sizes

    def collect(self) -> Iterable[GaugeMetricFamily]:
        families = {
            name: GaugeMetricFamily(f"forebay_collection_{name}", text, labels=["collection"])
            for name, text in SIZES.items()
        }
        for collection, sizes in self._sizes():
            for name, family in families.items():
                family.add_metric([collection], sizes[name])
        yield from families.values()
