"""What must hold when things break: kill -9, overload, deadlines, cancellation, poison, restarts."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
import httpx
import numpy as np
import pytest
from forebay.settings import Settings, load_settings
from forebay.v1 import embedding_pb2, embedding_pb2_grpc, model_pb2, model_pb2_grpc
from forebay_server.app import Server

from tests.conftest import Live, Start, copy_models


def deterministic(root: Path, starters: Path, name: str, yaml: str) -> Path:
    """A model folder on the deterministic engine, with MiniLM's tokenizer."""
    folder = root / name / "1"
    folder.mkdir(parents=True)
    manifest = json.loads((starters / "minilm" / "1" / "manifest.json").read_text())
    manifest["files"] = {}
    manifest["embedding"]["dimensions"] = 8
    (folder / "manifest.json").write_text(json.dumps(manifest))
    os.link(starters / "minilm" / "1" / "tokenizer.json", folder / "tokenizer.json")
    (root / name / "model.yaml").write_text("engine: deterministic\n" + yaml)
    return root


def stub_of(live: Live) -> embedding_pb2_grpc.EmbeddingServiceStub:
    return embedding_pb2_grpc.EmbeddingServiceStub(live.channel)


def word_id(starters: Path, word: str) -> int:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(starters / "minilm" / "1" / "tokenizer.json"))
    return tokenizer.encode(word, add_special_tokens=False).ids[0]


def test_a_poisoned_text_fails_alone_and_is_refused_afterwards(
    starters: Path, start: Start, tmp_path: Path
) -> None:
    poison = word_id(starters, "poison")
    yaml = f"engine_options: {{fail_on: {poison}, base_s: 0.05}}\n"
    live = start(deterministic(tmp_path / "m", starters, "det", yaml))
    stub = stub_of(live)
    texts = [f"good {i}" for i in range(20)]
    texts[7] = "poison"
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        calls = [
            pool.submit(stub.Embed, embedding_pb2.EmbedRequest(model="det", texts=[t]))
            for t in texts
        ]
        results = []
        for call in calls:
            try:
                results.append(len(call.result().embeddings))
            except grpc.RpcError as e:
                results.append(e.code())
    assert results.count(1) == 19
    assert results[7] is grpc.StatusCode.INTERNAL
    with pytest.raises(grpc.RpcError) as caught:
        stub.Embed(embedding_pb2.EmbedRequest(model="det", texts=["ok", "poison"]))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "texts[1]" in caught.value.details()


def test_overload_is_refused_at_once_and_recovers(
    starters: Path, start: Start, tmp_path: Path
) -> None:
    yaml = "engine_options: {base_s: 0.3}\nbatching: {max_queue_size: 4, max_batch_size: 2}\n"
    live = start(deterministic(tmp_path / "m", starters, "det", yaml))
    stub = stub_of(live)
    request = embedding_pb2.EmbedRequest(model="det", texts=["x"])
    futures = [stub.Embed.future(request) for _ in range(30)]
    codes = [f.code() for f in futures]
    assert codes.count(grpc.StatusCode.OK) >= 4
    refused = [f for f in futures if f.code() is grpc.StatusCode.RESOURCE_EXHAUSTED]
    assert len(refused) >= 15
    assert any(k == "grpc-status-details-bin" for k, _ in refused[0].trailing_metadata())
    assert len(stub.Embed(request).embeddings) == 1


def test_a_full_queue_refuses_its_own_calls_and_every_refusal_is_counted(
    starters: Path, start: Start, tmp_path: Path, lane: str
) -> None:
    models = tmp_path / "m"
    yaml = "engine_options: {base_s: 0.05}\nbatching: {max_batch_size: 1}\n"
    deterministic(models, starters, "slow", yaml)
    deterministic(models, starters, "quick", "engine_options: {base_s: 0.0}\n")
    live = start(models)
    stub = stub_of(live)
    slow = embedding_pb2.EmbedRequest(model="slow", texts=["x"])
    quick = embedding_pb2.EmbedRequest(model="quick", texts=["x"])
    for _ in range(3):
        stub.Embed(slow)  # its speed becomes known
    hurried, other, patient = [], [], []
    for _ in range(100):  # twenty a batch: far more than it can answer within their time
        hurried += [stub.Embed.future(slow, timeout=0.5) for _ in range(4)]
        other.append(stub.Embed.future(quick, timeout=5))
        if len(patient) < 10:
            patient.append(stub.Embed.future(slow, timeout=60))
        time.sleep(0.01)
    codes = [f.code() for f in hurried]
    refused = [f for f in hurried if f.code() is grpc.StatusCode.RESOURCE_EXHAUSTED]
    assert len(refused) > 200
    for call in refused:
        details = dict(call.trailing_metadata())["grpc-status-details-bin"]
        assert b"google.rpc.RetryInfo" in details and b"QUEUE_FULL" in details
    assert codes.count(grpc.StatusCode.OK) >= 5, "the queue does not run empty meanwhile"
    assert {f.code() for f in other} == {grpc.StatusCode.OK}
    assert {f.code() for f in patient} == {grpc.StatusCode.OK}, "they have the time"
    assert len(stub.Embed(slow, timeout=5).embeddings) == 1
    time.sleep(0.6)  # the transport's own refusals are counted twice a second
    stub.Embed(quick)
    line = 'forebay_rpc_server_rejected_total{reason="QUEUE_FULL"} '
    exposed = live.server.metrics.exposition().decode()
    counted = float(exposed.split(line)[1].split()[0])
    late = codes.count(
        grpc.StatusCode.DEADLINE_EXCEEDED
    )  # a refusal may come after its caller left
    assert len(refused) <= counted <= len(refused) + late
    statistics = model_pb2_grpc.ModelServiceStub(live.channel).GetStatistics(
        model_pb2.GetStatisticsRequest(model="slow")
    )
    seen = statistics.versions[0].rejected  # by the queue itself
    assert seen == counted if lane == "ordinary" else seen < counted / 2


def test_a_deadline_in_the_queue_is_honoured_without_work(
    starters: Path, start: Start, tmp_path: Path
) -> None:
    yaml = "engine_options: {base_s: 0.5}\nbatching: {max_batch_size: 1}\n"
    live = start(deterministic(tmp_path / "m", starters, "det", yaml))
    stub = stub_of(live)
    request = embedding_pb2.EmbedRequest(model="det", texts=["x"])
    busy = stub.Embed.future(request)
    time.sleep(0.1)
    with pytest.raises(grpc.RpcError) as caught:
        stub.Embed(request, timeout=0.1)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    busy.result()
    time.sleep(0.7)
    stats = model_pb2_grpc.ModelServiceStub(live.channel).GetStatistics(
        model_pb2.GetStatisticsRequest(model="det")
    )
    assert stats.versions[0].rows == 1


def test_cancelled_calls_leave_the_queue(starters: Path, start: Start, tmp_path: Path) -> None:
    yaml = "engine_options: {base_s: 0.4}\nbatching: {max_batch_size: 1}\n"
    live = start(deterministic(tmp_path / "m", starters, "det", yaml))
    stub = stub_of(live)
    request = embedding_pb2.EmbedRequest(model="det", texts=["x"])
    first = stub.Embed.future(request)
    time.sleep(0.1)
    waiting = [stub.Embed.future(request) for _ in range(10)]
    time.sleep(0.1)
    for call in waiting:
        call.cancel()
    first.result()
    started = time.monotonic()
    stub.Embed(request)
    assert time.monotonic() - started < 1.5  # not behind ten cancelled batches of 0.4 s


def test_kill_9_of_an_engine_process_loses_only_its_running_calls(
    starters: Path, start: Start, tmp_path: Path
) -> None:
    models = copy_models(starters, tmp_path / "m", "minilm", "iris")
    (models / "minilm" / "model.yaml").unlink()
    (models / "minilm" / "model.yaml").write_text(
        "default_for: [embedding]\nexecution: {isolation: process}\n"
    )
    live = start(models)
    stub = stub_of(live)
    before = stub.Embed(embedding_pb2.EmbedRequest(texts=["same"])).embeddings[0].values
    engine = live.server.repository.pool.loaded[("minilm", 1)].client.engines[0]
    pid = engine.info()["pid"]
    assert pid != os.getpid()
    long = embedding_pb2.EmbedRequest(texts=["word " * 250] * 64)
    running = stub.Embed.future(long)
    time.sleep(0.3)
    os.kill(pid, signal.SIGKILL)
    assert running.code() is grpc.StatusCode.UNAVAILABLE
    after = stub.Embed(embedding_pb2.EmbedRequest(texts=["same"]), timeout=30)
    assert np.allclose(before, after.embeddings[0].values, atol=1e-6)
    assert engine.info()["pid"] not in (0, pid)


def serve(home: Path, models: Path, port: int, *names: str) -> subprocess.Popen[bytes]:
    """A server in a process of its own, that has loaded all models, or those of these names."""
    env = {
        **os.environ,
        "FOREBAY_HOME": str(home),
        "FOREBAY_GRPC_PORT": str(port),
        "FOREBAY_MODELS__ROOT": str(models),
        "FOREBAY_OBSERVABILITY__LOG_LEVEL": "ERROR",
    }
    process = subprocess.Popen([sys.executable, "-m", "forebay_cli", "serve"], env=env)
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        deadline = time.monotonic() + 30
        stub = model_pb2_grpc.ModelServiceStub(channel)
        while True:
            try:
                found = stub.ListModels(model_pb2.ListModelsRequest(), timeout=1).models
                asked = [m for m in found if not names or m.name in names]
                if asked and all(v.state == 3 for m in asked for v in m.versions):
                    return process
            except grpc.RpcError:
                pass  # it does not listen yet
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)


def free_port() -> int:
    from forebay_cli.up import free_port as find

    return find()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.usefixtures("hang_ups")
def test_a_signal_under_load_ends_after_every_accepted_call(
    starters: Path, tmp_path: Path, number: signal.Signals
) -> None:
    # 50 batches of 50 ms: however fast the machine, most calls still wait at the signal.
    yaml = "engine_options: {base_s: 0.05}\nbatching: {max_batch_size: 4}\n"
    models = deterministic(tmp_path / "m", starters, "det", yaml)
    port = free_port()
    process = serve(tmp_path / "home", models, port)
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = embedding_pb2_grpc.EmbeddingServiceStub(channel)
        request = embedding_pb2.EmbedRequest(model="det", texts=["some words to embed " * 8])
        futures = [stub.Embed.future(request) for _ in range(200)]
        while not any(f.done() for f in futures):
            time.sleep(0.01)
        time.sleep(0.4)  # all are accepted, most of them wait in the queue
        done_before = sum(f.done() for f in futures)
        process.send_signal(number)
        if number == signal.SIGHUP:  # a terminal that closes may send it twice
            time.sleep(0.3)
            process.send_signal(number)
        codes = [f.code() for f in futures]
    assert done_before < 200
    assert codes == [grpc.StatusCode.OK] * 200
    assert process.wait(20) == 0


def test_a_signal_before_all_models_are_loaded_ends_after_every_accepted_call(
    starters: Path, tmp_path: Path
) -> None:
    yaml = "engine_options: {base_s: 0.25}\nbatching: {max_batch_size: 1}\n"
    models = deterministic(tmp_path / "m", starters, "det", yaml)
    copy_models(starters, models, "minilm")  # it is loaded after `det`, and takes longer
    port = free_port()
    process = serve(tmp_path / "home", models, port, "det")
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = embedding_pb2_grpc.EmbeddingServiceStub(channel)
        request = embedding_pb2.EmbedRequest(model="det", texts=["a"])
        futures = [stub.Embed.future(request) for _ in range(10)]
        while not any(f.done() for f in futures):
            time.sleep(0.01)
        process.terminate()
        codes = [f.code() for f in futures]
    assert codes == [grpc.StatusCode.OK] * 10
    assert process.wait(20) == 0


def test_a_start_that_is_cut_off_leaves_nothing_open(tmp_path: Path) -> None:
    """Wherever: the port is free, no thread is left, and the home can be used again."""

    async def cut(settings: Settings, after_s: float) -> bool:
        """Whether it had not been ready by then."""
        server = Server(settings)
        starting = asyncio.create_task(server.start())
        if (await asyncio.wait({starting}, timeout=after_s))[0]:
            await server.stop()
            return False
        starting.cancel()
        await asyncio.wait({starting}, timeout=20)
        assert starting.cancelled()
        return True

    async def cuts(settings: Settings) -> float:
        def threads() -> set[str]:
            """All but those of the loop's own pool, and grpc.aio's, which stay."""
            names = {t.name for t in threading.enumerate()}
            return {n for n in names if not n.startswith("asyncio_") and "_poll_wrapper" not in n}

        before = threads()
        after_s = 0.001
        while await cut(settings, after_s):
            with socket.create_server(("127.0.0.1", settings.grpc.port)):
                pass
            deadline = time.monotonic() + 10
            while threads() - before:
                assert time.monotonic() < deadline, threads() - before
                await asyncio.sleep(0.01)
            after_s *= 1.2
        return after_s

    (tmp_path / "m").mkdir()
    values = {"home": tmp_path / "home", "models.root": tmp_path / "m", "grpc.port": free_port()}
    settings = load_settings(values, environ={}).settings
    assert asyncio.run(cuts(settings)) > 0.01


@pytest.mark.usefixtures("hang_ups")
def test_sighup_ends_a_gateway_after_its_requests(
    starters: Path, start: Start, tmp_path: Path
) -> None:
    yaml = "engine_options: {base_s: 0.5}\nbatching: {max_batch_size: 1}\n"
    live = start(deterministic(tmp_path / "m", starters, "det", yaml))
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "forebay_cli", "gateway", "--http-port", str(port)]
    env = os.environ | {"FOREBAY_HOME": str(tmp_path / "home")}
    with (
        subprocess.Popen([*command, "--upstream", live.target], env=env) as gateway,
        concurrent.futures.ThreadPoolExecutor() as pool,
    ):
        try:
            deadline = time.monotonic() + 30
            while True:
                try:
                    assert httpx.get(f"{url}/readyz").status_code == 200
                    break
                except httpx.ConnectError:  # it does not listen yet
                    assert time.monotonic() < deadline
                    time.sleep(0.1)
            body = {"model": "det", "input": "a"}
            waiting = [pool.submit(httpx.post, f"{url}/v1/embeddings", json=body) for _ in range(4)]
            done, _ = concurrent.futures.wait(
                waiting, return_when=concurrent.futures.FIRST_COMPLETED
            )
            assert len(done) < 4
            gateway.send_signal(signal.SIGHUP)
            assert [w.result().status_code for w in waiting] == [200] * 4
            assert gateway.wait(30) == -signal.SIGTERM
        finally:
            gateway.kill()


@pytest.mark.usefixtures("hang_ups")
def test_a_server_under_nohup_stays(starters: Path, tmp_path: Path) -> None:
    port = free_port()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # what `nohup` does
    process = serve(tmp_path / "home", copy_models(starters, tmp_path / "m", "iris"), port)
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.terminate()
    assert process.wait(20) == 0


def test_kill_9_and_restart_keep_keys_usage_aliases_and_splits(
    starters: Path, tmp_path: Path
) -> None:
    from forebay.v1 import key_pb2, key_pb2_grpc, usage_pb2, usage_pb2_grpc

    models = copy_models(starters, tmp_path / "m", "minilm")
    home, port = tmp_path / "home", free_port()
    process = serve(home, models, port)
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        key = key_pb2_grpc.KeyServiceStub(channel).CreateKey(key_pb2.CreateKeyRequest(name="k"))
        registry = model_pb2_grpc.ModelServiceStub(channel)
        registry.SetAlias(model_pb2.SetAliasRequest(model="minilm", alias="canary", version=1))
        registry.SetTraffic(
            model_pb2.SetTrafficRequest(model="minilm", shares=[{"version": 1, "weight": 5}])
        )
        metadata = [("authorization", f"Bearer {key.secret}")]
        stub = embedding_pb2_grpc.EmbeddingServiceStub(channel)
        for _ in range(25):
            stub.Embed(embedding_pb2.EmbedRequest(texts=["a"]), metadata=metadata)
    process.kill()
    process.wait()
    process = serve(home, models, port)
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            usage = usage_pb2_grpc.UsageServiceStub(channel).GetUsage(
                usage_pb2.GetUsageRequest(), metadata=metadata
            )
            assert usage.total.calls == 25
            model = model_pb2_grpc.ModelServiceStub(channel).GetModel(
                model_pb2.GetModelRequest(model="minilm"), metadata=metadata
            )
            assert dict(model.model.aliases) == {"canary": 1}
            assert model.model.traffic[0].weight == 5
    finally:
        process.terminate()
        process.wait(20)
