"""Calls that the transport answers by itself, like others before them, are told and counted as those are,
and nothing that has changed since is passed over. On the ordinary lane all of it holds without leases."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from forebay.oip import open_inference_pb2 as oip
from forebay.oip import open_inference_pb2_grpc as oip_grpc
from forebay.v1 import (
    key_pb2,
    key_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    tabular_pb2,
    tabular_pb2_grpc,
    usage_pb2,
    usage_pb2_grpc,
)
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import Live, Start
from tests.integration.server_process import StartProcess
from tests.integration.test_access import bearer, make_key

PREDICT = "/forebay.v1.TabularService/Predict"
INFER = "/inference.GRPCInferenceService/ModelInfer"
COLUMNS = ("a", "b", "c")
TABLE = np.random.default_rng(0).uniform(-1, 1, (400, 3)).round(3)
RESOURCE_EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.fixture(scope="session")
def forests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`forest`: two versions of a regressor that differ by 1000, both of trees and nothing else."""
    import pandas as pd
    from forebay_exporters.sklearn_export import export_sklearn
    from sklearn.ensemble import RandomForestRegressor

    root = tmp_path_factory.mktemp("forests")
    rows = pd.DataFrame(TABLE, columns=COLUMNS)
    for version in (1, 2):
        target = TABLE @ [3.0, -2.0, 1.0] + 1000 * (version - 1)
        model = RandomForestRegressor(20, max_depth=6, random_state=0).fit(rows, target)
        export_sklearn(model, rows, root, "forest", version, target=target)
    (root / "forest" / "model.yaml").write_text("version_policy: all\n")
    return root


@pytest.fixture(scope="module")
def server(forests: Path, start: Start) -> Live:
    """Without keys."""
    return start(forests)


@pytest.fixture(scope="module")
def prices(server: Live) -> list[float]:
    """What version 2 says of each row of the table, asked by column: such calls are never leased."""
    request = tabular_pb2.PredictRequest(model="forest")
    for name, column in zip(COLUMNS, TABLE.T, strict=True):
        request.columns.add(name=name, numbers=column.tolist())
    answer = tabular_pb2_grpc.TabularServiceStub(server.channel).Predict(request)
    return [p.value for p in answer.predictions]


@pytest.fixture(scope="module")
def guarded(forests: Path, start: Start) -> Live:
    """A server that asks for keys."""
    return start(forests, auth__required="always")


@pytest.fixture(scope="module")
def admin(guarded: Live) -> str:
    """An admin's key."""
    return guarded.run(guarded.server.keys.create("admin", ("infer", "read", "admin")))[1]


def request_of(*rows: Any, model: str = "forest") -> tabular_pb2.PredictRequest:
    request = tabular_pb2.PredictRequest(model=model)
    for row in rows:
        request.rows.add().update(dict(zip(COLUMNS, row, strict=True)))
    return request


def tensor_of(*rows: Any) -> oip.ModelInferRequest:
    request = oip.ModelInferRequest(model_name="forest")
    values = np.array(rows, np.float32)
    request.inputs.add(name="input", datatype="FP32", shape=values.shape)
    request.raw_input_contents.append(values.tobytes())
    return request


def predict(live: Live, *rows: Any, key: str = "", **kwargs: Any) -> tabular_pb2.PredictResponse:
    metadata = bearer(key) if key else None
    stub = tabular_pb2_grpc.TabularServiceStub(live.channel)
    return stub.Predict(request_of(*rows), metadata=metadata, timeout=30, **kwargs)


def measured(live: Live, name: str, **labels: str) -> float:
    """The sum of a metric's samples with these labels, once the last call has been heard of."""
    time.sleep(0.15)
    text = live.server.metrics.exposition().decode()
    return sum(
        s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
        if s.name == name and labels.items() <= s.labels.items()
    )


def leased(live: Live, method: str = PREDICT) -> float:
    return measured(live, "forebay_rpc_server_leased_total", method=method)


def test_answers_are_those_of_the_model(server: Live, prices: list[float], lane: str) -> None:
    calls = [(i, 1 + i % 4) for i in range(390)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda c: predict(server, *TABLE[c[0] : c[0] + c[1]]), calls))
    for (i, n), answer in zip(calls, answers, strict=True):
        assert [p.value for p in answer.predictions] == prices[i : i + n]
        assert not any(p.warnings for p in answer.predictions)
        assert answer.usage.items == n and answer.timing.batch_rows >= n
        assert (answer.served_by.model, answer.served_by.version) == ("forest", 2)
        assert 0 <= answer.timing.compute_ms < 1e4
    assert (leased(server) > 100) == (lane == "fast")


def test_answers_to_tensors_are_those_of_the_model(
    server: Live, prices: list[float], lane: str
) -> None:
    infer = oip_grpc.GRPCInferenceServiceStub(server.channel).ModelInfer
    calls = [(i, 1 + i % 3) for i in range(390)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda c: infer(tensor_of(*TABLE[c[0] : c[0] + c[1]])), calls))
    for (i, n), answer in zip(calls, answers, strict=True):
        (output,), (raw,) = answer.outputs, answer.raw_output_contents
        assert (answer.model_name, answer.model_version) == ("forest", "2")
        assert (output.datatype, list(output.shape)) == ("FP32", [n, 1])
        assert np.frombuffer(raw, np.float32).astype(float).tolist() == prices[i : i + n]
    assert (leased(server, INFER) > 100) == (lane == "fast")


def test_what_is_odd_among_them_is_told(server: Live, prices: list[float]) -> None:
    odd = [
        ((0.0, 0.0, 50.0), "outside the range"),
        ((0.0, 0.0, "x"), grpc.StatusCode.INVALID_ARGUMENT),
        ((0.0, 0.0, None), grpc.StatusCode.INVALID_ARGUMENT),
    ]

    def call(i: int) -> Any:
        if i % 5:
            return predict(server, TABLE[i])
        try:
            return predict(server, odd[i // 5 % 3][0])
        except grpc.RpcError as e:
            return e.code()  # type: ignore[attr-defined]

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(call, range(300)))
    for i, answer in enumerate(answers):
        wanted = odd[i // 5 % 3][1]
        if i % 5:
            assert [p.value for p in answer.predictions] == [prices[i]]
        elif isinstance(wanted, str):
            assert wanted in answer.predictions[0].warnings[0]
        else:
            assert answer == wanted
    many = predict(server, *TABLE[:100])
    assert [p.value for p in many.predictions] == prices[:100]


def test_compressed_calls_are_as_others(server: Live, prices: list[float]) -> None:
    for i in range(20):
        answer = predict(server, TABLE[i], compression=grpc.Compression.Gzip)
        assert answer.predictions[0].value == prices[i]


def test_everyone_hears_of_each_call_once(guarded: Live, admin: str, lane: str) -> None:
    key_id, key = make_key(guarded, admin)
    ended = {"method": PREDICT, "code": "OK"}
    statistics = oip_grpc.GRPCInferenceServiceStub(guarded.channel).ModelStatistics
    ask = oip.ModelStatisticsRequest(name="forest", version="2")

    def counts() -> list[float]:
        calls = measured(guarded, "forebay_rpc_server_duration_seconds_count", **ended)
        model = statistics(ask, metadata=bearer(admin)).model_stats[0]
        return [
            calls,
            measured(guarded, "forebay_items_total", model="forest"),
            model.inference_stats.success.count,
            model.inference_count,
        ]

    before, leased_before = counts(), leased(guarded)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: predict(guarded, *TABLE[i : i + 1 + i % 2], key=key), range(200)))
    assert [n - m for n, m in zip(counts(), before, strict=True)] == [200, 300, 200, 300]
    assert measured(guarded, "forebay_rpc_server_active_requests", method=PREDICT) == 0
    usage = usage_pb2_grpc.UsageServiceStub(guarded.channel).ListUsage
    (row,) = usage(usage_pb2.ListUsageRequest(key_id=key_id), metadata=bearer(admin)).rows
    assert (row.counters.calls, row.counters.items, row.counters.errors) == (200, 300, 0)
    assert (leased(guarded) > leased_before + 50) == (lane == "fast")


def test_each_call_has_its_line_with_its_id_and_trace(
    forests: Path, start_process: StartProcess, lane: str
) -> None:
    server = start_process(
        FOREBAY_MODELS__ROOT=str(forests),
        FOREBAY_OBSERVABILITY__ACCESS_LOG="true",
        FOREBAY_OBSERVABILITY__LOG_FORMAT="json",
        FOREBAY_GRPC__LANE=lane,
    )
    call = tabular_pb2_grpc.TabularServiceStub(server.channel).Predict
    told: dict[str, str | None] = {}
    for i in range(60):
        trace = f"{i + 1:032x}" if i % 3 == 0 else None
        metadata = [("x-request-id", f"mine-{i}")] if i % 2 else []
        if trace:
            metadata.append(("traceparent", f"00-{trace}-{i + 1:016x}-01"))
        _, done = call.with_call(request_of(TABLE[i]), metadata=metadata)
        request_id = dict(done.trailing_metadata())["x-request-id"]
        assert not i % 2 or request_id == f"mine-{i}"
        told[request_id] = trace
    server.process.terminate()
    assert server.process.wait(30) == 0
    lines = [json.loads(x) for x in server.log.read_text().splitlines() if '"method"' in x]
    own = [x for x in lines if x["method"] == PREDICT]
    assert {x["request_id"]: x.get("trace_id") for x in own} == told and len(own) == 60
    assert all(x["model"] == "forest@2" and x["items"] == 1 for x in own)
    assert all(x["code"] == "OK" and x["peer"].startswith("ipv4:127") for x in own)
    assert all(0 < x["ms"] < 1e4 for x in own)


def test_limits_are_neither_overspent_nor_is_anyone_refused_too_early(
    guarded: Live, admin: str, lane: str
) -> None:
    limits = key_pb2.KeyLimits(requests_per_second=0.01, burst=40)
    _, key = make_key(guarded, admin, limits=limits)
    stub = tabular_pb2_grpc.TabularServiceStub(guarded.channel)
    for left in range(39, -1, -1):
        _, call = stub.Predict.with_call(request_of(TABLE[0]), metadata=bearer(key))
        trailers = dict(call.trailing_metadata())
        # A lease knows of other calls what was so a moment ago.
        ahead = int(trailers["x-ratelimit-remaining-requests"]) - left
        assert 0 <= ahead <= (3 if lane == "fast" else 0)
        assert trailers["x-ratelimit-limit-requests"] == "40"
    with pytest.raises(grpc.RpcError) as caught:
        predict(guarded, TABLE[0], key=key)
    assert caught.value.code() is RESOURCE_EXHAUSTED


def test_many_callers_of_a_key_get_what_its_limits_hold_together(guarded: Live, admin: str) -> None:
    limits = key_pb2.KeyLimits(requests_per_second=0.01, burst=300)
    _, key = make_key(guarded, admin, limits=limits)

    def call(i: int) -> bool:
        try:
            predict(guarded, TABLE[i % 400], key=key)
        except grpc.RpcError as e:
            assert e.code() is RESOURCE_EXHAUSTED  # type: ignore[attr-defined]
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(call, range(600))) == 300


def test_tokens_are_taken_by_the_row(guarded: Live, admin: str) -> None:
    limits = key_pb2.KeyLimits(tokens_per_minute=100)
    _, key = make_key(guarded, admin, limits=limits)
    answered = 0
    with pytest.raises(grpc.RpcError) as caught:
        while answered < 400:
            predict(guarded, *TABLE[:4], key=key)
            answered += 4
    assert caught.value.code() is RESOURCE_EXHAUSTED
    assert 100 <= answered <= 112  # some come back meanwhile


class Hammer:
    """Calls without a pause, and what each was told, in the order of their beginnings."""

    def __init__(self, live: Live, key: str = "") -> None:
        self.told: list[tuple[float, Any]] = []
        self._live, self._key = live, key
        self._ending = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(4)]

    def __enter__(self) -> Hammer:
        for thread in self._threads:
            thread.start()
        time.sleep(0.3)
        return self

    def __exit__(self, *_: object) -> None:
        time.sleep(0.3)
        self._ending.set()
        for thread in self._threads:
            thread.join()

    def since(self, when: float) -> set[Any]:
        """What calls were told that began after this."""
        found = {told for began, told in self.told if began > when}
        assert found
        return found

    def _run(self) -> None:
        while not self._ending.is_set():
            began = time.monotonic()
            try:
                answer = predict(self._live, TABLE[0], key=self._key)
                self.told.append((began, answer.served_by.version))
            except grpc.RpcError as e:
                self.told.append((began, e.code()))  # type: ignore[attr-defined]


def test_a_key_is_revoked_at_once(guarded: Live, admin: str) -> None:
    key_id, key = make_key(guarded, admin)
    with Hammer(guarded, key) as hammer:
        revoke = key_pb2_grpc.KeyServiceStub(guarded.channel).RevokeKey
        revoke(key_pb2.RevokeKeyRequest(id=key_id), metadata=bearer(admin))
        revoked = time.monotonic()
    assert hammer.since(revoked) == {grpc.StatusCode.UNAUTHENTICATED}
    assert {told for began, told in hammer.told if began < revoked - 1} <= {2}


def test_who_may_not_use_a_model_is_not_answered_for_another_who_may(
    guarded: Live, admin: str
) -> None:
    _, other = make_key(guarded, admin, models=["elsewhere"])
    for i in range(20):
        assert predict(guarded, TABLE[i], key=admin).predictions
        with pytest.raises(grpc.RpcError) as caught:
            predict(guarded, TABLE[i], key=other)
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        with pytest.raises(grpc.RpcError) as caught:
            predict(guarded, TABLE[i])
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_new_limits_hold_at_once(guarded: Live, admin: str) -> None:
    key_id, key = make_key(guarded, admin)
    with Hammer(guarded, key) as hammer:
        keys = key_pb2_grpc.KeyServiceStub(guarded.channel)
        limits = key_pb2.KeyLimits(requests_per_second=0.001, burst=1)
        asked = key_pb2.SetLimitsRequest(id=key_id, limits=limits)
        keys.SetLimits(asked, metadata=bearer(admin))
        limited = time.monotonic()
    after = [told for began, told in hammer.told if began > limited]
    assert after.count(2) <= 1 and RESOURCE_EXHAUSTED in after


def test_names_lead_elsewhere_at_once(guarded: Live, admin: str) -> None:
    models = model_pb2_grpc.ModelServiceStub(guarded.channel)
    as_admin = {"metadata": bearer(admin)}
    with Hammer(guarded, admin) as hammer:
        models.Promote(model_pb2.PromoteRequest(model="forest", version=1), **as_admin)
        promoted = time.monotonic()
    assert hammer.since(promoted) == {1} and hammer.told[0][1] == 2
    with Hammer(guarded, admin) as hammer:
        models.Promote(model_pb2.PromoteRequest(model="forest", version=2), **as_admin)
        promoted = time.monotonic()
    assert hammer.since(promoted) == {2}
    with Hammer(guarded, admin) as hammer:
        split = model_pb2.SetTrafficRequest(
            model="forest", shares=[model_pb2.TrafficShare(version=1, weight=100)]
        )
        models.SetTraffic(split, **as_admin)
        shared = time.monotonic()
    assert hammer.since(shared) == {1}
    models.SetTraffic(model_pb2.SetTrafficRequest(model="forest"), **as_admin)


def test_a_shadow_gets_its_copies_at_once(guarded: Live, admin: str) -> None:
    models = model_pb2_grpc.ModelServiceStub(guarded.channel)
    as_admin = {"metadata": bearer(admin)}

    def rows_of_1() -> int:
        found = models.GetStatistics(model_pb2.GetStatisticsRequest(model="forest"), **as_admin)
        return next(v.rows for v in found.versions if v.version == 1)

    with Hammer(guarded, admin) as hammer:
        before = rows_of_1()
        shadow = model_pb2.Shadow(version=1, fraction=1.0)
        models.SetTraffic(model_pb2.SetTrafficRequest(model="forest", shadow=shadow), **as_admin)
        shadowed = time.monotonic()
    models.SetTraffic(model_pb2.SetTrafficRequest(model="forest"), **as_admin)
    copies = len([1 for began, _ in hammer.told if began > shadowed])
    deadline = time.monotonic() + 10
    while rows_of_1() < before + copies:
        assert time.monotonic() < deadline, (rows_of_1(), before, copies)
        time.sleep(0.05)


def test_an_unloaded_model_answers_nothing_until_it_is_loaded(
    forests: Path, start: Start, lane: str
) -> None:
    live = start(forests)
    models = model_pb2_grpc.ModelServiceStub(live.channel)
    for i in range(10):
        predict(live, TABLE[i])
    models.UnloadModel(model_pb2.UnloadModelRequest(model="forest"))
    assert not live.server.repository.pool.loaded
    assert predict(live, TABLE[0]).served_by.version == 2  # a call loads it
    assert live.server.repository.pool.loaded
    assert (leased(live) > 0) == (lane == "fast")


def test_calls_of_too_many_rows_are_refused_as_ever(forests: Path, start: Start) -> None:
    live = start(forests, grpc__max_items_per_call=3)
    for i in range(20):
        predict(live, *TABLE[i : i + 1 + i % 3])
    with pytest.raises(grpc.RpcError) as caught:
        predict(live, *TABLE[:4])
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "3" in str(caught.value.details())


def test_what_the_journal_does_not_take_is_counted_later(
    forests: Path, start: Start, lane: str
) -> None:
    if lane == "ordinary":
        pytest.skip("the ordinary lane writes no journal of its own")
    live = start(forests)
    for i in range(5):
        predict(live, TABLE[i])
    before = leased(live)
    assert before
    with ThreadPoolExecutor(4) as pool:
        done = pool.map(lambda i: predict(live, TABLE[i]), range(200))
        # A disk that is full, for the transport alone: what it cannot write the ledger has.
        lane_of_live = live.server.lanes._fast
        assert lane_of_live is not None
        lane_of_live._server.set_journal(Path("/dev/full"))
        assert len(list(done)) == 200
    usage = usage_pb2_grpc.UsageServiceStub(live.channel).GetUsage
    total = usage(usage_pb2.GetUsageRequest()).total
    assert (total.calls, total.items) == (205, 205)
    live.run(live.server.ledger.flush())  # a new file
    for i in range(50):
        predict(live, TABLE[i])
    assert leased(live) > before
    assert usage(usage_pb2.GetUsageRequest()).total.calls == 255


def test_a_killed_server_has_counted_all_that_it_answered(
    forests: Path, start_process: StartProcess, lane: str
) -> None:
    environ = {"FOREBAY_MODELS__ROOT": str(forests), "FOREBAY_GRPC__LANE": lane}
    server = start_process(**environ)
    call = tabular_pb2_grpc.TabularServiceStub(server.channel).Predict
    answered = [0] * 8

    def caller(me: int) -> None:
        while True:
            try:
                call(request_of(TABLE[me]), timeout=10)
            except grpc.RpcError:
                return
            answered[me] += 1

    threads = [threading.Thread(target=caller, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(1.5)
    server.kill()
    for thread in threads:
        thread.join()
    again = start_process(**environ)
    usage = usage_pb2_grpc.UsageServiceStub(again.channel).GetUsage
    total = usage(usage_pb2.GetUsageRequest()).total
    assert sum(answered) > 100
    assert sum(answered) <= total.calls <= sum(answered) + len(threads)
