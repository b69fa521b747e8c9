"""Language models whose callers leave or flood, and whose process is killed; each test has its own server."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from forebay.v1 import generation_pb2 as pb
from forebay.v1 import generation_pb2_grpc as rpc
from forebay.v1 import usage_pb2, usage_pb2_grpc

from tests.conftest import Start
from tests.integration.chats import text_of, user
from tests.integration.language_models import random_openvino


def test_who_leaves_while_it_waits_is_charged_nothing(
    start: Start, tmp_path_factory: pytest.TempPathFactory
) -> None:
    live = start(random_openvino(tmp_path_factory.mktemp("models"), running=1))
    stub = rpc.GenerationServiceStub(live.channel)
    usage = usage_pb2_grpc.UsageServiceStub(live.channel)
    long = user("Count to 30", max_tokens=1500)
    long.sampling.ignore_eos = True
    first = stub.ChatStream(pb.ChatStreamRequest(request=long))
    next(e for e in first if e.text.tokens)
    client = live.server.repository.pool.loaded[("tiny", 1)].client
    waiting = user("Hello", n=2)
    waiting.user = "left"
    call = stub.Chat.future(waiting)
    prompts = pb.CompleteRequest(prompts=["a", "b"], user="left")
    stream = stub.CompleteStream(pb.CompleteStreamRequest(request=prompts))
    deadline = time.monotonic() + 10
    while client.gate.waiting < 3:
        assert time.monotonic() < deadline and first.is_active()
        time.sleep(0.01)
    call.cancel()
    stream.cancel()
    waiting.user = "late"
    with pytest.raises(grpc.RpcError) as caught:
        stub.Chat(waiting, timeout=0.3)
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    rows: list[Any] = []
    while sum(r.counters.calls for r in rows) < 3:
        assert time.monotonic() < deadline and first.is_active()
        found = usage.ListUsage(usage_pb2.ListUsageRequest(model="tiny")).rows
        rows = [r for r in found if r.user]
    first.cancel()
    for row in rows:
        c = row.counters
        assert (c.items, c.tokens, c.cost, c.engine_ms) == (0, 0, 0, 0), row


def test_kill_9_is_a_clean_error_and_the_next_call_succeeds(
    start: Start, tmp_path_factory: pytest.TempPathFactory
) -> None:
    live = start(random_openvino(tmp_path_factory.mktemp("killed")))
    stub = rpc.GenerationServiceStub(live.channel)
    engine = live.server.repository.pool.loaded[("tiny", 1)].client.engine
    request = user("Count to 30", max_tokens=1900, ignore_eos=True)
    call = stub.ChatStream(pb.ChatStreamRequest(request=request))
    next(call)
    pid = engine.info()["pid"]
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert text_of(stub.Chat(user("Who are you?"), timeout=60).choices[0])
    assert engine.info()["pid"] != pid


def test_one_keys_flood_does_not_starve_another(
    start: Start, tmp_path_factory: pytest.TempPathFactory
) -> None:
    live = start(
        random_openvino(tmp_path_factory.mktemp("fair"), running=2), auth__required="always"
    )
    keys = [live.run(live.server.keys.create(n, ("infer",)))[1] for n in ("flood", "lone")]
    stub = rpc.GenerationServiceStub(live.channel)
    request = user("Count to 30", max_tokens=150, ignore_eos=True)
    order: list[str] = []
    lock = threading.Lock()

    def one(name: str, key: str) -> None:
        stub.Chat(request, metadata=[("authorization", f"Bearer {key}")], timeout=100)
        with lock:
            order.append(name)

    with ThreadPoolExecutor(64) as pool:
        flood = [pool.submit(one, "flood", keys[0]) for _ in range(60)]
        client = live.server.repository.pool.loaded[("tiny", 1)].client
        while client.gate.waiting < 30:
            assert len(order) < 30, "they came too slowly"
            time.sleep(0.01)
        lone = pool.submit(one, "lone", keys[1])
        lone.result(60)
        ahead = order.index("lone")
        for f in flood:
            f.result(100)
    done_before = ahead
    assert done_before < 40, f"{done_before} calls of the flood went first"
