"""Metrics of language models."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from forebay_server.core.generation import Tally

#: To the first token: from a cached prompt to a long queue.
FIRST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)


class GenerationMetrics:
    """Observes generations; the data plane's Meter."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._first = Histogram(
            "forebay_generation_first_token_seconds",
            "Time from a call's arrival to its first token",
            ["model"],
            buckets=FIRST,
            registry=registry,
        )
        self._between = Histogram(
            "forebay_generation_inter_token_seconds",
            "Time per token between two deltas of an answer",
            ["model"],
            buckets=BETWEEN,
            registry=registry,
        )
        self._queue = Histogram(
            "forebay_generation_queue_seconds",
            "Wait for a turn in the fair queue",
            ["model"],
            buckets=(0.0, *FIRST),
            registry=registry,
        )
        self._tokens = Counter(
            "forebay_generation_tokens",
            "Tokens in (prompt, of which cached) and out (completion, of which reasoning)",
            ["model", "kind"],
            registry=registry,
        )
        self._ended = Counter(
            "forebay_generation_ended",
            "Generations by their end: done, cached, aborted, or the error's reason",
            ["model", "reason"],
            registry=registry,
        )
        self._children: dict[tuple[Any, ...], Any] = {}

    def _child(self, metric: Any, *labels: str) -> Any:
        key = (id(metric), *labels)
        child = self._children.get(key)
        if child is None:
            child = self._children[key] = metric.labels(*labels)
        return child

    def first_token(self, model: str, seconds: float) -> None:
        """A call has its first token."""
        self._child(self._first, model).observe(seconds)

    def between_tokens(self, model: str, seconds: float, tokens: int) -> None:
        """A later delta with so many tokens."""
        self._child(self._between, model).observe(seconds / tokens)

    def queued(self, model: str, seconds: float) -> None:
        """A request has its turn."""
        self._child(self._queue, model).observe(seconds)

    def ended(self, model: str, tally: Tally, reason: str) -> None:
        """A generation has ended."""
        self._child(self._ended, model, reason).inc()
        for kind in ("prompt", "completion", "cached", "reasoning"):
            count = getattr(tally, kind)
            if count:
                self._child(self._tokens, model, kind).inc(count)

    def watch(self, clients: Callable[[], Iterable[tuple[str, str, Any]]]) -> None:
        """Report what runs and waits in each loaded model, at each scrape."""
        self._registry.register(_Loaded(clients))


class _Loaded(Collector):
    """Gauges of loaded language models: model, version, client."""

    def __init__(self, clients: Callable[[], Iterable[tuple[str, str, Any]]]) -> None:
        self._clients = clients

    def collect(self) -> Iterable[Metric]:
        labels = ["model", "version"]
        running = GaugeMetricFamily(
            "forebay_generation_running", "Answers that are being generated", labels=labels
        )
        waiting = GaugeMetricFamily(
            "forebay_generation_waiting",
            "Requests in the fair queue, without those of batches",
            labels=labels,
        )
        use = GaugeMetricFamily(
            "forebay_generation_kv_use_ratio", "Share of the key-value cache in use", labels=labels
        )
        engine = GaugeMetricFamily(
            "forebay_generation_engine_requests",
            "Requests in the engine, by its own count: running or waiting",
            labels=[*labels, "state"],
        )
        prefix = CounterMetricFamily(
            "forebay_generation_prefix_tokens",
            "Prompt tokens looked up in the engine's prefix cache: queried, of which hit",
            labels=[*labels, "result"],
        )
        preempted = CounterMetricFamily(
            "forebay_generation_preempted",
            "Requests that the engine put back for want of key-value cache",
            labels=labels,
        )
        restarts = CounterMetricFamily(
            "forebay_generation_engine_restarts",
            "Engines that died and were started anew",
            labels=labels,
        )
        for model, version, client in self._clients():
            running.add_metric([model, version], client.gate.running)
            waiting.add_metric([model, version], client.gate.waiting)
            info = client.engine.info()
            if "kv_use" in info:
                use.add_metric([model, version], info["kv_use"])
            for state in ("running", "waiting"):
                if state in info:
                    engine.add_metric([model, version, state], info[state])
            if "prefix_queries" in info:
                prefix.add_metric([model, version, "queried"], info["prefix_queries"])
                prefix.add_metric([model, version, "hit"], info["prefix_hits"])
            if "num_preempted" in info:
                preempted.add_metric([model, version], info["num_preempted"])
            if "restarts" in info:
                restarts.add_metric([model, version], info["restarts"])
        yield from (running, waiting, use, engine, prefix, preempted, restarts)
