"""Counters in the Open Inference Protocol's statistics messages."""

from __future__ import annotations

from forebay.oip import open_inference_pb2 as pb

from forebay_server.core.statistics import Duration
from forebay_server.dataplane.registry import StatisticsView


def _duration(value: Duration) -> pb.StatisticDuration:
    return pb.StatisticDuration(count=value.count, ns=int(value.seconds * 1e9))


def statistics_message(view: StatisticsView) -> pb.ModelStatistics:
    """One version's counters."""
    s = view.statistics
    return pb.ModelStatistics(
        name=view.model,
        version=str(view.version),
        last_inference=int(s.last_inference * 1e3),
        inference_count=s.rows,
        execution_count=s.batches,
        inference_stats=pb.InferStatistics(
            success=_duration(s.success),
            fail=_duration(s.fail),
            queue=_duration(s.queue),
            compute_input=_duration(s.prepare),
            compute_infer=_duration(s.execute),
            compute_output=_duration(s.finish),
        ),
        batch_stats=[
            pb.InferBatchStatistics(
                batch_size=size,
                compute_input=_duration(b.prepare),
                compute_infer=_duration(b.execute),
                compute_output=_duration(b.finish),
            )
            for size, b in sorted(s.by_size.items())
        ],
        memory_usage=[pb.MemoryUsage(type="resident", id=0, byte_size=view.memory_bytes)],
    )
