"""Batches over kill -9: of the server, and of the engine behind it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from forebay.v1 import batch_pb2 as pb
from forebay.v1 import batch_pb2_grpc as rpc
from forebay.v1 import usage_pb2, usage_pb2_grpc

from tests.conftest import Start
from tests.integration.language_models import random_openvino, random_vllm, vllm_python
from tests.integration.server_process import StartProcess
from tests.integration.test_batches import batch, chat, results, until_ended


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_kill_9_loses_no_item_and_runs_none_twice(
    tmp_path_factory: pytest.TempPathFactory, start_process: StartProcess
) -> None:
    root = str(random_openvino(tmp_path_factory.mktemp("models")))
    total = 120
    items = [chat(f"c{i}", f"Hello {i}", max_tokens=60, ignore_eos=True) for i in range(total)]
    server = start_process(FOREBAY_MODELS__ROOT=root)
    stub = rpc.BatchServiceStub(server.channel)
    made = batch(stub, items)
    kept: dict[int, bytes] = {}
    for target in (15, 45, 75):
        deadline = time.monotonic() + 60
        while stub.GetBatch(pb.GetBatchRequest(batch=made.id)).batch.counts.completed < target:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        kept |= {r.number: r.SerializeToString() for r in results(stub, made.id)}
        server.kill()
        server = start_process(FOREBAY_MODELS__ROOT=root)
        stub = rpc.BatchServiceStub(server.channel)
    done = until_ended(stub, made.id, seconds=120)
    assert done.status == pb.BATCH_STATUS_COMPLETED
    assert (done.counts.completed, done.counts.failed) == (total, 0)
    found = {r.number: r for r in results(stub, made.id)}
    assert sorted(found) == list(range(total))
    # A result that was seen is the result for ever: its item was not run again.
    for number, data in kept.items():
        assert found[number].SerializeToString() == data
    # Charged once each, to the token.
    usage = usage_pb2_grpc.UsageServiceStub(server.channel)
    (row,) = usage.ListUsage(usage_pb2.ListUsageRequest(model="tiny")).rows
    assert (row.counters.calls, row.counters.items) == (total, total)
    tokens = done.usage.prompt_tokens + done.usage.completion_tokens
    assert row.counters.tokens == tokens


@pytest.mark.timeout(600)
@pytest.mark.parametrize("engine", ["openvino", "vllm"])
def test_kill_9_of_the_engine_costs_no_item(start: Start, tmp_path: Path, engine: str) -> None:
    if engine == "vllm":
        set_up = {"generation__vllm_python": vllm_python(), "generation__vllm_cache_gb": 1}
        live = start(random_vllm(tmp_path), **set_up)
    else:
        live = start(random_openvino(tmp_path))
    stub = rpc.BatchServiceStub(live.channel)
    items = [chat(f"c{i}", f"Hello {i}", max_tokens=100, ignore_eos=True) for i in range(64)]
    made = batch(stub, items)
    while not stub.GetBatch(pb.GetBatchRequest(batch=made.id)).batch.counts.completed:
        time.sleep(0.02)
    process = live.server.repository.pool.loaded[("tiny", 1)].client.engine
    os.kill(process.info()["pid"], signal.SIGKILL)
    done = until_ended(stub, made.id, seconds=300)
    assert (done.counts.completed, done.counts.failed) == (64, 0)
