"""Metrics: what is observed is scraped; docs/metrics.md lists exactly what the server has."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

from forebay_server.core.batcher import BatchReport
from forebay_server.core.generation import Tally
from forebay_server.generation.gate import Gate
from forebay_server.observability.metrics import SIZES, Metrics
from prometheus_client.parser import text_string_to_metric_families

DOCS = Path(__file__).parents[3] / "docs" / "metrics.md"


def sample(metrics: Metrics, name: str, **labels: str) -> float | None:
    for family in text_string_to_metric_families(metrics.exposition().decode()):
        for s in family.samples:
            if s.name == name and labels.items() <= s.labels.items():
                return s.value
    return None


def filled() -> Metrics:
    """Metrics with at least one sample each."""
    m = Metrics()
    m.rpc.started(["/s/M", "/s/M"])
    m.rpc.ended("/s/M", "OK", [0.02])
    m.http.ended("/v2/models/{name}/infer", 200, [0.02])
    m.rejected.labels("QUEUE_FULL").inc()
    m.leased.labels("/S/M").inc()
    m.items.labels("m").inc(3)
    m.tokens.labels("m").inc(30)
    m.cache_looked_up("m", 2, 1)
    m.cache_looked_up("m", 1, 0)
    m.bypassed.labels("cache").inc()
    report = BatchReport(
        rows=8, tokens=60, padded_tokens=80, queue_s=0.003, execute_s=0.02, queue_depth=5
    )
    m.batches.observer("m", 2)(report)
    m.watch_models(lambda: [("m", 2, 4096)])
    m.watch_batches(lambda: (1, 4))
    m.watch_follower(lambda: 0.5)
    m.batch_items_ended("completed", 3)
    m.watch_collections(lambda: [("c", dict.fromkeys(SIZES, 1.0))])
    m.index_rebuilds.labels("c", "checksum").inc()
    m.search_stage("dense", 0.002)
    m.documents.labels("ready").inc()
    m.answers.labels("written").inc()
    m.unsupported.labels("no_citation").inc()
    m.generation.first_token("m", 0.1)
    m.generation.between_tokens("m", 0.02, 2)
    m.generation.queued("m", 0.0)
    m.generation.ended("m", Tally(prompt=5, completion=7), "done")
    facts = {"kv_use": 0.25, "running": 2, "waiting": 1, "restarts": 1}
    facts |= {"prefix_queries": 40, "prefix_hits": 16, "num_preempted": 3}
    engine = SimpleNamespace(info=lambda: facts)
    client = SimpleNamespace(gate=Gate(4, 4), engine=engine)
    m.generation.watch(lambda: [("m", "2", client)])
    return m


def test_calls_are_counted_timed_and_given_back() -> None:
    m = filled()
    labels = {"method": "/s/M", "code": "OK"}
    assert sample(m, "forebay_rpc_server_duration_seconds_count", **labels) == 1
    assert sample(m, "forebay_rpc_server_duration_seconds_sum", **labels) == 0.02
    assert sample(m, "forebay_rpc_server_active_requests", method="/s/M") == 1
    bucket = "forebay_rpc_server_duration_seconds_bucket"
    counts = [sample(m, bucket, le=le, **labels) for le in ("0.01", "0.025", "+Inf")]
    assert counts == [0, 1, 1]


def test_batches_are_observed_by_model_and_version() -> None:
    m, labels = filled(), {"model": "m", "version": "2"}
    assert sample(m, "forebay_batch_rows_sum", **labels) == 8
    assert sample(m, "forebay_batch_token_efficiency_sum", **labels) == 0.75
    assert sample(m, "forebay_queue_time_seconds_sum", **labels) == 0.003
    assert sample(m, "forebay_batch_execute_seconds_sum", **labels) == 0.02
    assert sample(m, "forebay_queue_depth", **labels) == 5
    assert sample(m, "forebay_model_memory_bytes", **labels) == 4096


def test_cache_look_ups_are_counted_by_result() -> None:
    m = filled()
    assert sample(m, "forebay_cache_lookups_total", model="m", result="hit") == 3
    assert sample(m, "forebay_cache_lookups_total", model="m", result="miss") == 1


def test_an_engines_own_numbers_are_passed_on() -> None:
    m, labels = filled(), {"model": "m", "version": "2"}
    name = "forebay_generation_engine_requests"
    assert sample(m, name, state="running", **labels) == 2
    assert sample(m, name, state="waiting", **labels) == 1
    name = "forebay_generation_prefix_tokens_total"
    assert sample(m, name, result="queried", **labels) == 40
    assert sample(m, name, result="hit", **labels) == 16
    assert sample(m, "forebay_generation_preempted_total", **labels) == 3
    assert sample(m, "forebay_generation_engine_restarts_total", **labels) == 1


def test_the_process_itself_is_measured() -> None:
    resident = sample(filled(), "process_resident_memory_bytes")
    assert resident is not None
    assert resident > 1 << 20


def test_servers_in_one_process_share_no_registry() -> None:
    filled()
    assert sample(Metrics(), "forebay_items_total", model="m") is None


def test_the_page_lists_every_metric_as_it_is() -> None:
    page = DOCS.read_text().partition("## Gateway")[0]
    listed = {
        (name, kind, tuple(re.findall(r"`(\w+)`", labels)), text)
        for name, kind, labels, text in re.findall(
            r"^\| `(\w+)` \| (\w+) \| (.*?) \| (.*?) \|$", page, re.MULTILINE
        )
    }
    real = set()
    for family in text_string_to_metric_families(filled().exposition().decode()):
        name = family.name + ("_total" if family.type == "counter" else "")
        keys = {k for s in family.samples for k in s.labels} - {"le"}
        real.add((name, family.type, tuple(sorted(keys)), family.documentation))
    assert {(n, k, tuple(sorted(ls)), t) for n, k, ls, t in listed} == real
