"""What the batcher costs: microseconds an item for submit, cut and completion, without a model.

python -m benchmarks.batcher_overhead [--items 20000] [--deadlines] [--profile]
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import threading
import time

import numpy as np
from forebay_server.core.batcher import BatchingEngineClient
from forebay_server.core.completion import RequestCompletion
from forebay_server.core.interfaces import BatchPolicy, EngineRequest, EngineSpec, Item, TokenInput
from forebay_server.core.queue import RequestQueue
from forebay_server.engines.deterministic import DeterministicEngine


def client() -> BatchingEngineClient:
    """A batcher on an engine that answers at once."""
    options = {"answer": "echo"}
    engine = DeterministicEngine(
        EngineSpec("zero", 1, "deterministic", "", "tokens", options=options)
    )
    engine.load()
    return BatchingEngineClient([engine])


def in_flight(callers: int, items: int, deadlines: bool) -> tuple[float, float]:
    """Keep `callers` single-item requests in flight. Gives seconds an item, and the median latency."""
    served = client()
    one = Item(TokenInput(np.arange(20)), 20)
    done = threading.Semaphore(0)
    took: list[float] = []
    clock = time.perf_counter

    def submit() -> None:
        deadline = time.monotonic() + 30 if deadlines else None
        at = clock()
        (completion,) = served.submit([EngineRequest([one], deadline=deadline)])
        completion.add_done_callback(lambda _: (took.append(clock() - at), done.release()))

    for _ in range(callers):
        submit()
    before = clock()
    for _ in range(items):
        done.acquire()
        submit()
    spent = clock() - before
    for _ in range(callers):
        done.acquire()
    served.close()
    return spent / items, statistics.median(took)


def queue_alone(waiting: int, items: int) -> float:
    """Seconds an item for push and cut of mixed lengths, with so many waiting all the time."""
    queue = RequestQueue(BatchPolicy(max_queue_size=10**9))
    lengths = np.random.default_rng(0).integers(5, 257, 4096).tolist()
    ready = [Item(TokenInput(np.zeros(1, np.int64)), n) for n in lengths]
    requests = [
        RequestCompletion(EngineRequest([ready[i % 4096]]), 0.0) for i in range(items + waiting)
    ]
    for completion in requests[:waiting]:
        queue.push(completion)
    at, before = waiting, time.perf_counter()
    while at < len(requests):
        cut = queue.cut(0.0)
        assert cut is not None
        for completion in requests[at : at + len(cut.entries)]:
            queue.push(completion)
        at += len(cut.entries)
    return (time.perf_counter() - before) / items


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--deadlines", action="store_true", help="each request has one, 30 s away")
    parser.add_argument("--profile", action="store_true", help="profile the queue alone")
    args = parser.parse_args()
    if args.profile:
        profile = cProfile.Profile()
        profile.runcall(queue_alone, 1000, args.items)
        pstats.Stats(profile).sort_stats("tottime").print_stats(15)
        return
    print("| in flight | us an item | median latency, us |\n|---|---|---|")
    for callers in (1, 64):
        spent, latency = in_flight(callers, args.items, args.deadlines)
        print(f"| {callers} | {spent * 1e6:.1f} | {latency * 1e6:.0f} |")
    print("\n| waiting | queue alone: push and cut, us an item |\n|---|---|")
    for waiting in (1, 64, 1000, 10_000):
        print(f"| {waiting} | {queue_alone(waiting, args.items) * 1e6:.1f} |")


if __name__ == "__main__":
    main()
