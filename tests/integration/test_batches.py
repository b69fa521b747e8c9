"""Batches: by gRPC, by the real openai client, and over kill -9."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import pytest
from forebay.v1 import batch_pb2 as pb
from forebay.v1 import batch_pb2_grpc as rpc
from forebay.v1 import generation_pb2_grpc, usage_pb2, usage_pb2_grpc
from forebay_server.access.keys import Limits

from tests.conftest import Live, Start, copy_models
from tests.integration.chats import text_of, user
from tests.integration.gateway import Gateway
from tests.integration.language_models import random_openvino

ENDED = (
    pb.BATCH_STATUS_COMPLETED,
    pb.BATCH_STATUS_FAILED,
    pb.BATCH_STATUS_CANCELLED,
    pb.BATCH_STATUS_EXPIRED,
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, starters: Path) -> Path:
    root = copy_models(starters, tmp_path_factory.mktemp("models"), "minilm-int8")
    return random_openvino(root)


@pytest.fixture(scope="module")
def live(start: Start, models: Path) -> Live:
    return start(models)


@pytest.fixture(scope="module")
def stub(live: Live) -> rpc.BatchServiceStub:
    return rpc.BatchServiceStub(live.channel)


def chat(name: str, text: str, **sampling: Any) -> pb.BatchItem:
    return pb.BatchItem(custom_id=name, chat=user(text, **sampling))


def batch(
    stub: rpc.BatchServiceStub, items: list[pb.BatchItem], metadata: Any = None, **header: Any
) -> pb.Batch:
    parts = [pb.CreateBatchRequest(header=pb.BatchHeader(**header))]
    parts += [pb.CreateBatchRequest(item=i) for i in items]
    return stub.CreateBatch(iter(parts), metadata=metadata).batch


def until_ended(
    stub: rpc.BatchServiceStub, name: str, metadata: Any = None, seconds: float = 60
) -> pb.Batch:
    deadline = time.monotonic() + seconds
    while True:
        found = stub.GetBatch(pb.GetBatchRequest(batch=name), metadata=metadata).batch
        if found.status in ENDED:
            return found
        assert time.monotonic() < deadline, found
        time.sleep(0.05)


def results(stub: rpc.BatchServiceStub, name: str, metadata: Any = None) -> list[pb.BatchResult]:
    ask = pb.ReadResultsRequest(batch=name)
    return [r.result for r in stub.ReadResults(ask, metadata=metadata)]


# By gRPC.


def test_typed_items_get_typed_results_in_their_order(
    live: Live, stub: rpc.BatchServiceStub
) -> None:
    items = [chat(f"c{i}", f"Hello {i}", max_tokens=20) for i in range(10)]
    items.append(pb.BatchItem(custom_id="w", note="mine", complete={"prompts": ["To be"]}))
    sampling = items[-1].complete.sampling
    sampling.temperature, sampling.max_tokens, sampling.ignore_eos = 0, 5, True
    items.append(pb.BatchItem(custom_id="e", embed={"model": "minilm-int8", "texts": ["a", "b"]}))
    made = batch(stub, items, metadata=None, endpoint="/x")
    assert made.status == pb.BATCH_STATUS_VALIDATING and made.counts.total == 12
    done = until_ended(stub, made.id)
    assert done.status == pb.BATCH_STATUS_COMPLETED
    assert (done.counts.completed, done.counts.failed) == (12, 0)
    found = results(stub, made.id)
    assert [r.number for r in found] == list(range(12))
    assert [r.custom_id for r in found] == [i.custom_id for i in items]
    alone = generation_pb2_grpc.GenerationServiceStub(live.channel).Chat(items[3].chat)
    assert text_of(found[3].chat.choices[0]) == text_of(alone.choices[0])
    assert found[10].complete.generation_usage.completion_tokens == 5
    assert found[10].complete.completions[0].text and found[10].note == "mine"
    assert len(found[11].embed.embeddings) == 2
    tokens = sum(
        r.chat.generation_usage.prompt_tokens + r.complete.generation_usage.prompt_tokens
        for r in found
    )
    assert done.usage.prompt_tokens == tokens + found[11].embed.usage.tokens


def test_a_bad_item_fails_alone_and_says_why(stub: rpc.BatchServiceStub) -> None:
    items = [
        chat("good", "Hello", max_tokens=5),
        chat("hot", "Hello", temperature=9),
        chat("good", "Hello again"),
        pb.BatchItem(custom_id="nothing"),
        pb.BatchItem(chat=user("Hello")),
        chat("long", "word " * 3000),
        chat("lost", "Hello"),
        pb.BatchItem(custom_id="said", invalid={"code": "INVALID_ARGUMENT", "reason": "BAD"}),
    ]
    items[6].chat.model = "nobody"
    made = batch(stub, items)
    assert made.counts.failed == 5  # what can be told is told at once
    done = until_ended(stub, made.id)
    assert done.status == pb.BATCH_STATUS_COMPLETED
    assert (done.counts.completed, done.counts.failed) == (1, 7)
    errors = {r.number: r.error for r in results(stub, made.id) if r.HasField("error")}
    assert {n: e.field for n, e in errors.items() if e.field} == {
        1: "sampling.temperature",
        2: "custom_id",
        3: "request",
        4: "custom_id",
        5: "messages",
    }
    assert errors[2].reason == "DUPLICATE_CUSTOM_ID"
    assert errors[5].reason == "CONTEXT_LENGTH_EXCEEDED"
    assert errors[6].code == "NOT_FOUND" and errors[7].reason == "BAD"


def test_a_batch_without_items_or_beyond_the_bounds_is_refused(
    stub: rpc.BatchServiceStub,
) -> None:
    for parts in (
        [],
        [pb.CreateBatchRequest(header={})],
        [pb.CreateBatchRequest(item=chat("a", "b"))],
        [pb.CreateBatchRequest(header={"completion_window": {"seconds": 5}})],
    ):
        with pytest.raises(grpc.RpcError) as caught:
            stub.CreateBatch(iter(parts))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    names = [b.id for b in stub.ListBatches(pb.ListBatchesRequest(page_size=1000)).batches]
    assert len(names) == len(set(names))


def test_a_cancelled_batch_keeps_what_it_has(stub: rpc.BatchServiceStub) -> None:
    items = [chat(f"c{i}", f"Hello {i}", max_tokens=400, ignore_eos=True) for i in range(300)]
    made = batch(stub, items)
    while not stub.GetBatch(pb.GetBatchRequest(batch=made.id)).batch.counts.completed:
        time.sleep(0.02)
    asked = stub.CancelBatch(pb.CancelBatchRequest(batch=made.id)).batch
    assert asked.status in (pb.BATCH_STATUS_CANCELLING, pb.BATCH_STATUS_CANCELLED)
    done = until_ended(stub, made.id)
    assert done.status == pb.BATCH_STATUS_CANCELLED
    assert 0 < done.counts.completed < 300
    assert len(results(stub, made.id)) == done.counts.completed
    again = stub.CancelBatch(pb.CancelBatchRequest(batch=made.id)).batch
    assert again.status == pb.BATCH_STATUS_CANCELLED
    stub.DeleteBatch(pb.DeleteBatchRequest(batch=made.id))
    with pytest.raises(grpc.RpcError) as caught:
        stub.GetBatch(pb.GetBatchRequest(batch=made.id))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_a_batch_whose_time_runs_out_fails_what_is_left(
    live: Live, stub: rpc.BatchServiceStub
) -> None:
    items = [chat(f"c{i}", f"Hello {i}", max_tokens=400, ignore_eos=True) for i in range(300)]
    made = batch(stub, items, completion_window={"seconds": 60})
    runner = live.server._deferred._runner
    real = runner.clock
    runner.clock = lambda: real() + 61
    try:
        done = until_ended(stub, made.id)
    finally:
        runner.clock = real
    assert done.status == pb.BATCH_STATUS_EXPIRED
    assert done.counts.completed + done.counts.failed == 300 and done.counts.failed
    failed = [r.error for r in results(stub, made.id) if r.HasField("error")]
    assert {e.reason for e in failed} == {"BATCH_EXPIRED"}


def test_interactive_calls_go_first(start: Start, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A batch fills the engine; a call that comes then waits for none of its hundreds of items."""
    live = start(random_openvino(tmp_path_factory.mktemp("models"), running=4))
    stub = rpc.BatchServiceStub(live.channel)
    chats = generation_pb2_grpc.GenerationServiceStub(live.channel)
    items = [chat(f"c{i}", f"Hello {i}", max_tokens=300, ignore_eos=True) for i in range(200)]
    made = batch(stub, items)
    gate = live.server.repository.pool.loaded[("tiny", 1)].client.gate
    deadline = time.monotonic() + 30
    while gate.background_waiting < 5:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert 0 < gate.background < 4, "a place is left for who comes next"
    before = stub.GetBatch(pb.GetBatchRequest(batch=made.id)).batch.counts.completed
    seen: list[int] = []

    def one(i: int) -> None:
        chats.Chat(user(f"Quick {i}", max_tokens=10), timeout=60)
        seen.append(stub.GetBatch(pb.GetBatchRequest(batch=made.id)).batch.counts.completed)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert len(seen) == 8
    # Eight calls went by while about 200 items waited: only items that ran already, and the few
    # that run beside, have ended meanwhile.
    assert max(seen) - before < 60, f"{max(seen) - before} items went before interactive calls"
    stub.CancelBatch(pb.CancelBatchRequest(batch=made.id))
    until_ended(stub, made.id)


def test_usage_and_budgets_are_charged_once_and_batches_are_their_keys_own(
    start: Start, models: Path
) -> None:
    live = start(models, auth__required="always")

    def key(limits: Limits | None = None) -> Any:
        made = live.run(live.server.keys.create("k", ("infer", "read"), limits=limits))
        return made[0].id, [("authorization", f"Bearer {made[1]}")]

    stub = rpc.BatchServiceStub(live.channel)
    usage = usage_pb2_grpc.UsageServiceStub(live.channel)
    _, mine = key()
    _, other = key()
    items = [chat(f"c{i}", f"Hello {i}", max_tokens=10) for i in range(20)]
    for item in items:
        item.chat.user = "ann"
    made = batch(stub, items, mine)
    done = until_ended(stub, made.id, mine)
    tokens = done.usage.prompt_tokens + done.usage.completion_tokens
    ask = usage_pb2.ListUsageRequest(model="tiny", user="ann")
    (row,) = usage.ListUsage(ask, metadata=mine).rows
    assert (row.counters.calls, row.counters.items) == (20, 20)
    assert row.counters.tokens == tokens
    for call in (
        lambda: stub.GetBatch(pb.GetBatchRequest(batch=made.id), metadata=other),
        lambda: list(stub.ReadResults(pb.ReadResultsRequest(batch=made.id), metadata=other)),
        lambda: stub.CancelBatch(pb.CancelBatchRequest(batch=made.id), metadata=other),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            call()
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert not stub.ListBatches(pb.ListBatchesRequest(), metadata=other).batches

    _, bound = key(Limits(budget_tokens=tokens // 2, budget_period="total"))
    spent = until_ended(stub, batch(stub, items, bound).id, bound)
    assert spent.counts.completed and spent.counts.failed
    errors = {r.error.reason for r in results(stub, spent.id, bound) if r.HasField("error")}
    assert errors == {"BUDGET_SPENT"}
    now = usage.GetBudget(usage_pb2.GetBudgetRequest(), metadata=bound)
    assert now.spent_tokens == spent.usage.prompt_tokens + spent.usage.completion_tokens
    assert now.spent_tokens <= tokens // 2 and now.reserved_tokens == 0

    _, small = key(Limits(budget_tokens=1, budget_period="total"))
    texts = [pb.BatchItem(custom_id="e", embed={"model": "minilm-int8", "texts": ["a"]})]
    assert until_ended(stub, batch(stub, texts, small).id, small).counts.completed == 1
    (refused,) = results(stub, until_ended(stub, batch(stub, texts, small).id, small).id, small)
    assert refused.error.reason == "BUDGET_SPENT"

    gone_id, gone = key()
    long = [chat(f"c{i}", f"Hi {i}", max_tokens=400, ignore_eos=True) for i in range(300)]
    lost = batch(stub, long, gone)
    live.run(live.server.keys.revoke(gone_id))
    deadline = time.monotonic() + 60
    while True:
        found = live.run(live.server._deferred._runner.store.get(gone_id, lost.id))
        if found.status == "failed":
            break
        assert time.monotonic() < deadline, found.status
        time.sleep(0.1)
    assert found.completed + found.failed == 300


# By OpenAI's client.


def line(name: str, body: dict[str, Any], url: str = "/v1/chat/completions", **more: Any) -> bytes:
    value = {"custom_id": name, "method": "POST", "url": url, "body": body, **more}
    return json.dumps(value).encode()


def asked(text: str, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 12, **more}


def run(client: openai.OpenAI, lines: list[bytes], endpoint: Any) -> Any:
    file = client.files.create(file=("in.jsonl", b"\n".join(lines)), purpose="batch")
    made = client.batches.create(
        input_file_id=file.id,
        endpoint=endpoint,
        completion_window="24h",
        metadata={"for": "test"},
    )
    assert made.status in ("validating", "in_progress") and made.input_file_id == file.id
    deadline = time.monotonic() + 60
    while made.status not in ("completed", "failed", "expired", "cancelled"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
        made = client.batches.retrieve(made.id)
    return made


def rows(client: openai.OpenAI, file: str | None) -> dict[str, Any]:
    assert file is not None
    text = client.files.content(file).text
    return {r["custom_id"]: r for r in map(json.loads, text.splitlines())}


def test_openai_batches_of_chats_with_bad_lines(client: openai.OpenAI) -> None:
    lines = [line(f"c{i}", asked(f"Hello {i}")) for i in range(8)]
    lines += [
        b"{oops",
        line("audio", asked("Hello", modalities=["audio"])),
        line("hot", asked("Hello", temperature=9)),
        line("elsewhere", asked("Hello"), url="/v1/embeddings"),
        line("c0", asked("Again")),
        line("streamed", asked("Hello", stream=True)),
    ]
    done = run(client, lines, "/v1/chat/completions")
    assert done.status == "completed" and done.metadata == {"for": "test"}
    counts = done.request_counts
    assert (counts.total, counts.completed, counts.failed) == (14, 8, 6)
    good = rows(client, done.output_file_id)
    whole = client.chat.completions.create(**asked("Hello 3"))
    body = good["c3"]["response"]["body"]
    assert good["c3"]["response"]["status_code"] == 200 and good["c3"]["error"] is None
    assert body["choices"][0]["message"]["content"] == whole.choices[0].message.content
    assert openai.types.chat.ChatCompletion.model_validate(body).usage == whole.usage
    bad = rows(client, done.error_file_id)
    params = {
        name: r["response"]["body"]["error"]["param"] for name, r in bad.items() if r["response"]
    }
    assert params == {
        None: "line 9",
        "audio": "modalities",
        "hot": "temperature",
        "elsewhere": "url",
        "c0": "custom_id",
        "streamed": "stream",
    }
    assert {r["response"]["status_code"] for r in bad.values()} == {400}
    facts = client.files.retrieve(done.output_file_id)
    assert facts.purpose == "batch_output"
    assert facts.bytes == len(client.files.content(done.output_file_id).content)
    assert done.id in [b.id for b in client.batches.list(limit=3)]


def test_openai_batches_of_embeddings_and_completions(client: openai.OpenAI) -> None:
    body = {"model": "minilm-int8", "input": ["a", "b"]}
    url = "/v1/embeddings"
    lines = [line("f", body, url), line("b", {**body, "encoding_format": "base64"}, url)]
    done = run(client, lines, url)
    good = rows(client, done.output_file_id)
    floats = [d["embedding"] for d in good["f"]["response"]["body"]["data"]]
    assert len(floats) == 2 and len(floats[0]) == 384
    assert isinstance(good["b"]["response"]["body"]["data"][0]["embedding"], str)
    url = "/v1/completions"
    done = run(client, [line("t", {"model": "tiny", "prompt": "To be"}, url)], url)
    body = rows(client, done.output_file_id)["t"]["response"]["body"]
    assert body["object"] == "text_completion" and body["choices"][0]["finish_reason"]
    assert done.error_file_id is None


def test_a_line_that_is_refused_names_the_field_that_its_door_names(
    client: openai.OpenAI,
) -> None:
    embed: dict[str, Any] = {"model": "minilm-int8"}
    complete: dict[str, Any] = {"model": "tiny"}
    named = {"type": "function", "function": {"name": "g"}}
    tool = {"type": "function", "function": {"name": "f"}}
    odd = {"type": "object", "properties": {"a": {"type": "integer", "multipleOf": 5}}}
    strict = {"type": "function", "function": {"name": "f", "strict": True, "parameters": odd}}
    for url, bodies in {
        "/v1/embeddings": {
            "input[1]": {**embed, "input": [[5], [999999]]},
            "input": {**embed, "input": [999999]},
            "dimensions": {**embed, "input": "a", "dimensions": 7},
        },
        "/v1/completions": {
            "prompt[1]": {**complete, "prompt": ["a", ""]},
            "prompt": {**complete, "prompt": ""},
            "max_tokens": {**complete, "prompt": "a", "max_tokens": 99999},
        },
        "/v1/chat/completions": {
            "max_tokens": asked("a", max_tokens=99999),
            "max_completion_tokens": asked("a", max_tokens=None, max_completion_tokens=99999),
            "structured_outputs.regex": asked("a", structured_outputs={"regex": "["}),
            "tools[0].function.parameters": asked("a", tools=[strict]),
            "tool_choice.function.name": asked("a", tools=[tool], tool_choice=named),
        },
    }.items():
        done = run(client, [line(name, body, url) for name, body in bodies.items()], url)
        bad = rows(client, done.error_file_id)
        for name, body in bodies.items():
            error = bad[name]["response"]["body"]["error"]
            with pytest.raises(openai.BadRequestError) as caught:
                client.post(url.removeprefix("/v1"), body=body, cast_to=object)
            assert error["param"] == caught.value.param == name
            told: Any = caught.value.body
            assert error["message"] == told["message"]


def test_openai_errors_name_the_field(client: openai.OpenAI, gateway: Gateway) -> None:
    file = client.files.create(file=("e.jsonl", b"\n"), purpose="batch")
    good: Any = {"input_file_id": file.id, "endpoint": "/v1/embeddings"}
    for extra, param in (
        ({"endpoint": "/v1/moderations", "completion_window": "24h"}, "endpoint"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"completion_window": "24h", "color": "red"}, "color"),
        ({"completion_window": "24h"}, "input_file_id"),  # the file has no lines
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.post("/batches", body={**good, **extra}, cast_to=object)
        assert caught.value.param == param, caught.value.message
    post = gateway.http.post
    for form, param in (
        ({"purpose": "batch", "shape": "round"}, "shape"),
        ({"purpose": "fun"}, "purpose"),
        ({}, "purpose"),
    ):
        answer = post("/v1/files", files={"file": ("a", b"a")}, data=form)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == param
    assert post("/v1/files", data={"purpose": "batch"}).status_code == 400


def test_usage_is_a_table_by_key_user_model_and_day(
    client: openai.OpenAI, gateway: Gateway
) -> None:
    import csv
    import io

    client.chat.completions.create(**asked("Hello", user="=ann"))
    client.chat.completions.create(**asked("Hello", user="=ann"))
    answer: httpx.Response = gateway.http.get("/api/v1/usage:export", params={"user": "=ann"})
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    (row,) = csv.DictReader(io.StringIO(answer.text))
    assert (row["user"], row["model"], row["calls"]) == ("'=ann", "tiny", "2")
    assert row["day"] == time.strftime("%Y-%m-%d", time.gmtime()) and int(row["tokens"]) > 10
    everything = gateway.http.get("/api/v1/usage:export").text
    assert everything.splitlines()[0] == answer.text.splitlines()[0]
    wrong = gateway.http.get("/api/v1/usage:export", params={"from_day": "yesterday"})
    assert wrong.status_code == 400
