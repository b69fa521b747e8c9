"""Histograms that are observed on the hot path, and written as Prometheus has them at the scrape.

The client library's own cost more a batch than the rest of the bookkeeping together. These have no
lock: whoever owns them has one for all that it observes at once.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from prometheus_client.core import HistogramMetricFamily


class Cell:
    """The observations of one set of labels."""

    __slots__ = ("_bounds", "_counts", "_total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def add(self, value: float, times: int = 1) -> None:
        """One observation, or several alike."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._total += value * times

    def extend(self, values: Sequence[float]) -> None:
        """Several."""
        bounds, counts = self._bounds, self._counts
        for value in values:
            counts[bisect_left(bounds, value)] += 1
        self._total += sum(values)

    def write(self, family: HistogramMetricFamily, labels: Iterable[str]) -> None:
        """Add what has been observed to a family."""
        below, buckets = 0, []
        names = [*(str(float(b)) for b in self._bounds), "+Inf"]
        for name, count in zip(names, self._counts, strict=True):
            below += count
            buckets.append((name, below))
        family.add_metric(list(labels), buckets, self._total)
