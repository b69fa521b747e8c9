"""Responses: by gRPC, and by the real openai client and LangChain through the gateway."""

from __future__ import annotations

import json
import time
from typing import Any

import grpc
import openai
import pytest
from forebay.v1 import generation_pb2, key_pb2, usage_pb2, usage_pb2_grpc
from forebay.v1 import response_pb2 as pb
from forebay.v1 import response_pb2_grpc as rpc
from pydantic import BaseModel, Field

from tests.conftest import Live, Start
from tests.integration.chats import refused
from tests.integration.gateway import Gateway
from tests.integration.language_models import random_openvino

assert key_pb2
TOOL: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather in a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}
CALM: Any = {"temperature": 0, "max_output_tokens": 40}


class Person(BaseModel):
    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=120)


@pytest.fixture(scope="module")
def live(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Live:
    return start(random_openvino(tmp_path_factory.mktemp("models")))


@pytest.fixture(scope="module")
def stub(live: Live) -> rpc.ResponseServiceStub:
    return rpc.ResponseServiceStub(live.channel)


def asks(text: str, **kwargs: Any) -> pb.CreateResponseRequest:
    """A request of one message."""
    request = pb.CreateResponseRequest(**kwargs)
    request.sampling.temperature = 0
    request.sampling.max_tokens = 30
    message = request.input.add().message
    message.role = generation_pb2.CHAT_ROLE_USER
    message.content.add(text=text)
    return request


def said(response: pb.Response) -> str:
    return "".join(p.text for i in response.output for p in i.message.content)


# By gRPC.


def test_a_response_is_answered_stored_and_followed(stub: rpc.ResponseServiceStub) -> None:
    first = stub.CreateResponse(asks("Who are you?", metadata={"a": "b"})).response
    assert said(first) and first.id.startswith("resp_")
    stored = stub.GetResponse(pb.GetResponseRequest(response=first.id)).response
    assert said(stored) == said(first) and stored.request.metadata == {"a": "b"}
    assert stored.expires_at.seconds > time.time() + 86400
    second = stub.CreateResponse(asks("And then?", previous_response=first.id)).response
    alone = stub.CreateResponse(asks("And then?")).response
    # What came before is in the prompt: its tokens are counted, and the answer is another.
    grown = second.generation_usage.prompt_tokens - alone.generation_usage.prompt_tokens
    assert grown > first.generation_usage.completion_tokens
    assert said(second) != said(alone)
    items = stub.ListInputItems(
        pb.ListInputItemsRequest(response=second.id, oldest_first=True)
    ).items
    texts = ["".join(p.text for p in i.message.content) for i in items]
    assert texts == ["Who are you?", said(first), "And then?"]
    assert len({i.id for i in items}) == 3


@pytest.mark.parametrize("oldest_first", [True, False])
def test_pages_of_input_items_while_a_response_before_is_removed(
    stub: rpc.ResponseServiceStub, oldest_first: bool
) -> None:
    first = stub.CreateResponse(asks("One")).response
    second = stub.CreateResponse(asks("Two", previous_response=first.id)).response
    third = stub.CreateResponse(asks("Three", previous_response=second.id)).response
    ask = pb.ListInputItemsRequest(response=third.id, oldest_first=oldest_first, page_size=100)
    whole = [i.id for i in stub.ListInputItems(ask).items]
    assert len(whole) == 5
    seen, ask.page_size = [], 2
    page = stub.ListInputItems(ask)
    seen += [i.id for i in page.items]
    stub.DeleteResponse(pb.DeleteResponseRequest(response=first.id))
    ask.page_size = 1
    while page.next_page_token:
        ask.page_token = page.next_page_token
        page = stub.ListInputItems(ask)
        seen += [i.id for i in page.items]
    # Newest first, the two items of the first response are gone before they are reached.
    assert seen == (whole if oldest_first else whole[:3])


def test_instructions_hold_for_one_response_alone(stub: rpc.ResponseServiceStub) -> None:
    plain = stub.CreateResponse(asks("Hello")).response.generation_usage.prompt_tokens
    told = stub.CreateResponse(asks("Hello", instructions="Be brief, and kind.")).response
    assert told.generation_usage.prompt_tokens > plain
    one = stub.CreateResponse(asks("Hello", instructions="Be brief. " * 20)).response
    follow = stub.CreateResponse(asks("Yes?", previous_response=one.id)).response
    items = stub.ListInputItems(pb.ListInputItemsRequest(response=follow.id)).items
    roles = [i.message.role for i in items]
    assert generation_pb2.CHAT_ROLE_SYSTEM not in roles


def test_a_stream_tells_the_same_in_events(stub: rpc.ResponseServiceStub) -> None:
    whole = stub.CreateResponse(asks("Tell me")).response
    events = list(
        stub.CreateResponseStream(pb.CreateResponseStreamRequest(request=asks("Tell me")))
    )
    kinds = [e.WhichOneof("event") for e in events]
    assert kinds[0] == "created" and kinds[-2:] == ["item_done", "ended"]
    text = "".join(e.item_delta.text for e in events)
    ended = events[-1].ended
    assert text == said(ended) == said(whole)
    assert ended.id == events[0].created.id
    assert ended.generation_usage == whole.generation_usage
    assert said(stub.GetResponse(pb.GetResponseRequest(response=ended.id)).response) == text


def test_what_is_not_stored_cannot_be_read_or_followed(stub: rpc.ResponseServiceStub) -> None:
    response = stub.CreateResponse(asks("Hello", store=False)).response
    for call in (
        lambda: stub.GetResponse(pb.GetResponseRequest(response=response.id)),
        lambda: stub.CreateResponse(asks("More", previous_response=response.id)),
        lambda: stub.DeleteResponse(pb.DeleteResponseRequest(response=response.id)),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            call()
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_a_deleted_response_ends_what_is_built_upon_it(stub: rpc.ResponseServiceStub) -> None:
    first = stub.CreateResponse(asks("One")).response
    second = stub.CreateResponse(asks("Two", previous_response=first.id)).response
    stub.DeleteResponse(pb.DeleteResponseRequest(response=first.id))
    with pytest.raises(grpc.RpcError) as caught:
        stub.CreateResponse(asks("Three", previous_response=second.id))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND and first.id in caught.value.details()


def test_errors_name_the_item(stub: rpc.ResponseServiceStub) -> None:
    bad = asks("Hello")
    bad.input.add().tool_output.call_id = "nobody"
    assert "input[1].tool_output.call_id" in refused(lambda: stub.CreateResponse(bad))
    assert "input" in refused(lambda: stub.CreateResponse(asks("word " * 3000)))
    image = asks("Hello")
    image.input[0].message.content.add(image={"data": b"\x89PNG123"})
    assert "input[0].content" in refused(lambda: stub.CreateResponse(image))
    several = asks("Hello")
    several.sampling.n = 2
    assert "sampling.n" in refused(lambda: stub.CreateResponse(several))
    assert "input" in refused(lambda: stub.CreateResponse(pb.CreateResponseRequest()))
    assert "input[0].item" in refused(
        lambda: stub.CreateResponse(pb.CreateResponseRequest(input=[{}]))
    )
    streamed = pb.CreateResponseStreamRequest(request=asks("word " * 3000))
    assert "request.input" in refused(lambda: list(stub.CreateResponseStream(streamed)))


def test_a_response_in_the_background_is_read_later(stub: rpc.ResponseServiceStub) -> None:
    queued = stub.CreateResponse(asks("Hello", background=True)).response
    assert queued.status == pb.RESPONSE_STATUS_QUEUED
    done = until_ended(stub, queued.id)
    assert done.status in (pb.RESPONSE_STATUS_COMPLETED, pb.RESPONSE_STATUS_INCOMPLETE)
    assert said(done) == said(stub.CreateResponse(asks("Hello")).response)
    long = asks("Hello", background=True)
    long.sampling.max_tokens = 1900
    long.sampling.ignore_eos = True
    running = stub.CreateResponse(long).response
    stopped = stub.CancelResponse(pb.CancelResponseRequest(response=running.id)).response
    assert stopped.status == pb.RESPONSE_STATUS_CANCELLED


def until_ended(stub: rpc.ResponseServiceStub, name: str) -> pb.Response:
    deadline = time.monotonic() + 30
    open_ = (pb.RESPONSE_STATUS_QUEUED, pb.RESPONSE_STATUS_IN_PROGRESS)
    while True:
        found = stub.GetResponse(pb.GetResponseRequest(response=name)).response
        if found.status not in open_:
            return found
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_responses_are_their_keys_own_and_outlive_the_server(
    start: Start, tmp_path_factory: pytest.TempPathFactory
) -> None:
    models = random_openvino(tmp_path_factory.mktemp("models"))
    home = tmp_path_factory.mktemp("home")
    live = start(models, home=home, auth__required="always")
    keys = [live.run(live.server.keys.create(n, ("infer", "read")))[1] for n in ("a", "b")]
    mine, theirs = ([("authorization", f"Bearer {k}")] for k in keys)
    stub = rpc.ResponseServiceStub(live.channel)
    made = stub.CreateResponse(asks("Hello", user="ann"), metadata=mine).response
    later = stub.CreateResponse(asks("Hello", background=True), metadata=mine).response
    with pytest.raises(grpc.RpcError) as caught:
        stub.GetResponse(pb.GetResponseRequest(response=made.id), metadata=theirs)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    rows = usage_pb2_grpc.UsageServiceStub(live.channel).ListUsage(
        usage_pb2.ListUsageRequest(model="tiny", user="ann"), metadata=mine
    )
    used = made.generation_usage
    total = used.prompt_tokens + used.completion_tokens
    assert [r.counters.tokens for r in rows.rows] == [total]
    live.stop()

    again = start(models, home=home, auth__required="always")
    stub = rpc.ResponseServiceStub(again.channel)
    read = stub.GetResponse(pb.GetResponseRequest(response=made.id), metadata=mine).response
    assert said(read) == said(made)
    deadline = time.monotonic() + 30
    while True:
        found = stub.GetResponse(pb.GetResponseRequest(response=later.id), metadata=mine).response
        if found.completed_at.seconds:
            break
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert said(found) == said(made)


# By OpenAI's client.


def test_the_openai_client_creates_reads_and_deletes(client: openai.OpenAI) -> None:
    made = client.responses.create(model="tiny", input="Who are you?", **CALM)
    assert made.output_text and made.status in ("completed", "incomplete")
    assert made.usage is not None
    assert made.usage.total_tokens == made.usage.input_tokens + made.usage.output_tokens
    read = client.responses.retrieve(made.id)
    assert read.output_text == made.output_text
    second = client.responses.create(
        model="tiny", input="More", previous_response_id=made.id, **CALM
    )
    assert second.previous_response_id == made.id
    listed = client.responses.input_items.list(second.id, order="asc")
    assert [i.type for i in listed] == ["message"] * 3
    client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)


def test_the_stream_helper_accumulates_the_response(client: openai.OpenAI) -> None:
    whole = client.responses.create(model="tiny", input="Hello", **CALM)
    asked: Any = {"temperature": 0, "extra_body": {"max_output_tokens": 40}}
    with client.responses.stream(model="tiny", input="Hello", **asked) as stream:
        events = list(stream)
    kinds = [e.type for e in events]
    assert kinds[:3] == ["response.created", "response.in_progress", "response.output_item.added"]
    assert [e.sequence_number for e in events] == list(range(len(events)))
    deltas = [e for e in events if e.type == "response.output_text.delta"]
    assert deltas and deltas[-1].snapshot == whole.output_text
    assert kinds[-1] in ("response.completed", "response.incomplete")
    done = [e for e in events if e.type == "response.output_text.done"]
    assert [d.text for d in done] == [whole.output_text]


def test_the_stream_helper_gives_the_final_response(client: openai.OpenAI) -> None:
    with client.responses.stream(
        model="tiny", input="Answer in JSON: Anna is 31.", text_format=Person, temperature=0
    ) as stream:
        final = stream.get_final_response()
    assert final.status == "completed" and isinstance(final.output_parsed, Person)
    assert client.responses.retrieve(final.id).output_text == final.output_text


def test_structured_output_is_parsed(client: openai.OpenAI) -> None:
    parsed = client.responses.parse(
        model="tiny", input="Answer in JSON: Anna is 31.", text_format=Person, temperature=0
    )
    assert isinstance(parsed.output_parsed, Person)
    assert parsed.text is not None and parsed.text.format is not None
    assert parsed.text.format.type == "json_schema" and parsed.text.format.name == "Person"


def test_a_tool_is_called_and_its_answer_follows(client: openai.OpenAI) -> None:
    ask: Any = {"model": "tiny", "tools": [TOOL], "temperature": 0}
    with client.responses.stream(
        input="What is the weather in Paris?",
        tool_choice="required",
        parallel_tool_calls=False,
        **ask,
    ) as stream:
        kinds = [e.type for e in stream]
        first = stream.get_final_response()
    assert "response.function_call_arguments.delta" in kinds
    assert "response.function_call_arguments.done" in kinds
    call = first.output[-1]
    assert call.type == "function_call" and call.name == "get_weather"
    assert set(json.loads(call.arguments)) == {"city"}
    second = client.responses.create(
        previous_response_id=first.id,
        input=[{"type": "function_call_output", "call_id": call.call_id, "output": "sunny 20"}],
        max_output_tokens=30,
        **ask,
    )
    assert second.output
    kinds = [i.type for i in client.responses.input_items.list(second.id, order="asc")]
    assert kinds == ["message", "function_call", "function_call_output"]
    # The same without stored state: the caller brings all items.
    history: Any = [
        {"role": "user", "content": "What is the weather in Paris?"},
        *[i.model_dump(exclude_none=True, exclude={"parsed_arguments"}) for i in first.output],
        {"type": "function_call_output", "call_id": call.call_id, "output": "sunny 20"},
    ]
    stateless = client.responses.create(input=history, store=False, max_output_tokens=30, **ask)
    assert stateless.output_text == second.output_text


def test_logprobs_are_included_when_asked_for(client: openai.OpenAI) -> None:
    answer = client.responses.create(
        model="tiny", input="Hello", include=["message.output_text.logprobs"], **CALM
    )
    part = answer.output[0].content[0]
    assert part.logprobs and "".join(t.token for t in part.logprobs) == answer.output_text


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"conversation": "conv_1"}, "conversation"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"temperature": 9}, "temperature"),
        ({"max_output_tokens": 99999}, "max_output_tokens"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"input": [{"role": "wizard", "content": "x"}]}, "input[0].role"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"include": ["file_search_call.results"]}, "include[0]"),
        ({"input": "word " * 3000}, "input"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "objekt"}}}},
         "text.format.schema"),
    ],
)  # fmt: skip
def test_errors_name_the_field(client: openai.OpenAI, extra: Any, param: str) -> None:
    for stream in (False, True):
        body = {"model": "tiny", "input": "Hello", **extra, "stream": stream}
        with pytest.raises(openai.BadRequestError) as caught:
            client.post("/responses", body=body, cast_to=object)
        assert caught.value.param == param, caught.value.message


def test_a_background_response_is_polled_and_cancelled(client: openai.OpenAI) -> None:
    made = client.responses.create(model="tiny", input="Hello", background=True, **CALM)
    assert made.status == "queued"
    deadline = time.monotonic() + 30
    while made.status in ("queued", "in_progress"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
        made = client.responses.retrieve(made.id)
    assert (
        made.output_text == client.responses.create(model="tiny", input="Hello", **CALM).output_text
    )
    with pytest.raises(openai.BadRequestError):
        client.responses.cancel(client.responses.create(model="tiny", input="Hi", **CALM).id)


def test_langchain_by_the_responses_door(gateway: Gateway) -> None:
    from langchain_openai import ChatOpenAI

    kwargs: Any = {"base_url": f"{gateway.url}/v1", "api_key": "none", "max_retries": 0}
    kwargs |= {"model": "tiny", "temperature": 0, "use_responses_api": True}
    model = ChatOpenAI(**kwargs, max_completion_tokens=40)
    answer = model.invoke("Who are you?")
    assert answer.text
    assert "".join(str(c.text) for c in model.stream("Who are you?")) == answer.text
    tooled = ChatOpenAI(**kwargs).bind_tools(
        [TOOL], tool_choice="required", parallel_tool_calls=False
    )
    called = tooled.invoke("What is the weather in Paris?")
    assert called.tool_calls[0]["name"] == "get_weather"


def test_a_queued_stream_has_heartbeats(
    start: Start, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While others have the engine, each door says that it lives."""
    from forebay_gateway.openai import generation

    monkeypatch.setattr(generation, "HEARTBEAT_S", 0.05)
    live = start(random_openvino(tmp_path_factory.mktemp("busy"), running=1))
    door = Gateway(live)
    live.run(live.server.repository.resolver.resolve("tiny", ("generation",), ""))
    gate = live.server.repository.pool.loaded[("tiny", 1)].client.gate
    held = gate.enter("other", 1, 1)
    live.run(held.__aenter__())
    ask = {"model": "tiny", "stream": True}
    bodies = {
        "/v1/chat/completions": {**ask, "messages": [{"role": "user", "content": "Hello"}]},
        "/v1/completions": {**ask, "prompt": "Hello"},
        "/v1/responses": {**ask, "input": "Hello"},
        "/v1/messages": {
            **ask, "max_tokens": 5, "messages": [{"role": "user", "content": "Hello"}]
        },
    }  # fmt: skip
    try:
        for path, body in bodies.items():
            with door.http.stream("POST", path, json=body) as stream:
                assert stream.status_code == 200
                lines = stream.iter_lines()
                beat = "event: ping" if path == "/v1/messages" else ": heartbeat"
                assert any(line == beat for line, _ in zip(lines, range(40), strict=False)), path
    finally:
        live.run(held.__aexit__(None, None, None))
        door.stop()
