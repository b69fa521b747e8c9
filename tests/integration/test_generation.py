"""GenerationService through the wire, on the embedded engine, with random weights."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from forebay.v1 import generation_pb2 as pb
from forebay.v1 import generation_pb2_grpc as rpc
from forebay.v1 import token_pb2, token_pb2_grpc, usage_pb2, usage_pb2_grpc

from tests.conftest import Live, Start
from tests.integration.chats import WEATHER, refused, text_of, user
from tests.integration.language_models import random_openvino


@pytest.fixture(scope="module")
def tiny(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Live:
    return start(random_openvino(tmp_path_factory.mktemp("models")))


@pytest.fixture(scope="module")
def stub(tiny: Live) -> rpc.GenerationServiceStub:
    return rpc.GenerationServiceStub(tiny.channel)


def test_a_chat_is_answered_whole(stub: rpc.GenerationServiceStub) -> None:
    answer = stub.Chat(user("Who are you?"))
    assert len(text_of(answer.choices[0])) > 10
    assert answer.choices[0].finish_reason in (pb.FINISH_REASON_STOP, pb.FINISH_REASON_LENGTH)
    assert text_of(stub.Chat(user("Who are you?")).choices[0]) == text_of(answer.choices[0])
    assert text_of(stub.Chat(user("Who am I?")).choices[0]) != text_of(answer.choices[0])
    assert (answer.served_by.model, answer.served_by.version) == ("tiny", 1)
    used = answer.generation_usage
    assert answer.usage.tokens == used.prompt_tokens + used.completion_tokens
    assert used.prompt_tokens > 5 < used.completion_tokens


def test_a_stream_says_the_same_in_typed_deltas(stub: rpc.GenerationServiceStub) -> None:
    request = user("Count to 20", max_tokens=1800, ignore_eos=True)
    whole = stub.Chat(request)
    events = list(stub.ChatStream(pb.ChatStreamRequest(request=request)))
    kinds = [e.WhichOneof("event") for e in events]
    assert kinds[0] == "started" and kinds[-2:] == ["finish", "usage"]
    assert kinds.count("text") > 3, "a stream that comes in one piece is none"
    texts = [e.text for e in events if e.HasField("text")]
    assert "".join(t.text for t in texts) == text_of(whole.choices[0])
    assert events[-1].usage == whole.generation_usage
    assert events[0].started.prompt_tokens == whole.generation_usage.prompt_tokens


def test_max_tokens_ends_an_answer_with_length(stub: rpc.GenerationServiceStub) -> None:
    answer = stub.Chat(user("Count to 20", max_tokens=5))
    assert answer.choices[0].finish_reason == pb.FINISH_REASON_LENGTH
    assert answer.generation_usage.completion_tokens == 5


def test_stop_strings_end_an_answer_before_them(stub: rpc.GenerationServiceStub) -> None:
    whole = text_of(stub.Chat(user("Count to 20", ignore_eos=True)).choices[0])
    stop = whole[20:24]
    answer = stub.Chat(user("Count to 20", ignore_eos=True, stop=[stop, "never"]))
    assert text_of(answer.choices[0]) == whole[: whole.index(stop)]
    assert answer.choices[0].stop_reason == stop
    assert answer.choices[0].finish_reason == pb.FINISH_REASON_STOP


def test_logprobs_are_those_of_the_tokens(stub: rpc.GenerationServiceStub) -> None:
    choice = stub.Chat(user("Hello", logprobs=0)).choices[0]
    assert "".join(t.token for t in choice.logprobs) == text_of(choice)
    assert all(t.logprob <= 0 for t in choice.logprobs)
    assert refused(lambda: stub.Chat(user("Hello", logprobs=5))) == {
        "sampling.logprobs": "is 5; this model's engine gives the likeliest 0 at most"
    }


def test_n_answers_are_numbered_and_seeds_repeat(stub: rpc.GenerationServiceStub) -> None:
    request = user("Repeat: one two three", n=3, temperature=1.5, seed=7)
    first, second = stub.Chat(request), stub.Chat(request)
    assert [c.index for c in first.choices] == [0, 1, 2]
    assert [text_of(c) for c in first.choices] == [text_of(c) for c in second.choices]
    assert len({text_of(c) for c in first.choices}) > 1


def test_a_required_tool_is_called_and_its_arguments_stream(
    stub: rpc.GenerationServiceStub,
) -> None:
    request = user("What is the weather in Paris?", max_tokens=200)
    request.tools.add(name="get_weather", parameters=json.dumps(WEATHER))
    request.tool_choice.mode = pb.TOOL_MODE_REQUIRED
    request.parallel_tool_calls = False
    call = stub.Chat(request).choices[0]
    assert call.finish_reason == pb.FINISH_REASON_TOOL_CALLS
    assert [c.name for c in call.message.tool_calls] == ["get_weather"]
    arguments = call.message.tool_calls[0].arguments
    assert set(json.loads(arguments)) == {"city"}
    pieces = [
        e.tool_call
        for e in stub.ChatStream(pb.ChatStreamRequest(request=request))
        if e.HasField("tool_call")
    ]
    assert pieces[0].name == "get_weather" and pieces[0].id
    assert not any(p.name or p.id for p in pieces[1:])
    assert "".join(p.arguments for p in pieces) == arguments


def test_tools_and_their_choice_are_checked(stub: rpc.GenerationServiceStub) -> None:
    request = user("Hello")
    request.tool_choice.mode = pb.TOOL_MODE_REQUIRED
    assert "tool_choice.mode" in refused(lambda: stub.Chat(request))
    request.tools.add(name="f", parameters="{")
    assert "tools[0].parameters" in refused(lambda: stub.Chat(request))
    request.tools[0].parameters = ""
    request.tool_choice.CopyFrom(pb.ToolChoice(mode=pb.TOOL_MODE_NAMED, name="g"))
    assert refused(lambda: stub.Chat(request)) == {"tool_choice.name": "is 'g'; the tools are f"}


def test_a_prompt_that_is_too_long_is_refused_with_both_numbers(
    stub: rpc.GenerationServiceStub,
) -> None:
    request = user("word " * 3000)
    said = refused(lambda: stub.Chat(request))["messages"]
    assert "2048" in said
    said = refused(lambda: stub.Chat(user("Hello", max_tokens=2048)))["sampling.max_tokens"]
    assert "2048" in said and "together" in said
    stream = pb.ChatStreamRequest(request=request)
    assert "request.messages" in refused(lambda: list(stub.ChatStream(stream)))


def test_the_prompt_of_a_conversation_is_counted(
    tiny: Live, stub: rpc.GenerationServiceStub
) -> None:
    tokens = token_pb2_grpc.TokenServiceStub(tiny.channel)
    request = user("Who are you?", max_tokens=1)
    request.tools.add(name="get_weather", parameters=json.dumps(WEATHER))
    before, _ = usage_tokens(tiny)
    count = tokens.CountChatTokens(token_pb2.CountChatTokensRequest(request=request))
    assert (count.context_length, count.served_by.model) == (2048, "tiny")
    assert usage_tokens(tiny)[0] == before
    assert count.tokens == stub.Chat(request).generation_usage.prompt_tokens
    long = user("word " * 3000)
    long.truncate_prompt = True
    assert (
        tokens.CountChatTokens(token_pb2.CountChatTokensRequest(request=long)).tokens
        > count.context_length
    )
    request.adapter = "law"
    wrong = token_pb2.CountChatTokensRequest(request=request)
    assert "request.adapter" in refused(lambda: tokens.CountChatTokens(wrong))


def test_a_long_conversation_is_cut_when_asked_for(stub: rpc.GenerationServiceStub) -> None:
    request = pb.ChatRequest(
        truncate_prompt=True, sampling=pb.Sampling(temperature=0, max_tokens=32)
    )
    request.messages.add(role=pb.CHAT_ROLE_SYSTEM, content=[pb.ContentPart(text="Be brief.")])
    for _ in range(6):
        request.messages.add(role=pb.CHAT_ROLE_USER, content=[pb.ContentPart(text="word " * 400)])
        request.messages.add(role=pb.CHAT_ROLE_ASSISTANT, content=[pb.ContentPart(text="ok")])
    request.messages.add(role=pb.CHAT_ROLE_USER, content=[pb.ContentPart(text="Who are you?")])
    answer = stub.Chat(request)
    assert answer.dropped_messages > 0 and answer.dropped_messages % 2 == 0
    assert answer.generation_usage.prompt_tokens <= 2048 - 32


def long_talk(turns: int) -> pb.ChatRequest:
    request = pb.ChatRequest(
        truncate_prompt=True, sampling=pb.Sampling(temperature=0, max_tokens=8)
    )
    request.messages.add(role=pb.CHAT_ROLE_SYSTEM, content=[pb.ContentPart(text="Be brief.")])
    for i in range(turns):
        request.messages.add(role=pb.CHAT_ROLE_USER, content=[pb.ContentPart(text=f"Is it {i}?")])
        request.messages.add(role=pb.CHAT_ROLE_ASSISTANT, content=[pb.ContentPart(text="No.")])
    request.messages.add(role=pb.CHAT_ROLE_USER, content=[pb.ContentPart(text="Who are you?")])
    return request


def test_as_many_turns_are_kept_as_fit(stub: rpc.GenerationServiceStub) -> None:
    request = long_talk(300)
    answer = stub.Chat(request)
    dropped = answer.dropped_messages
    assert 0 < dropped < 600 and dropped % 2 == 0
    used = answer.generation_usage.prompt_tokens
    del request.messages[1 : 1 + dropped]
    request.truncate_prompt = False
    assert stub.Chat(request).generation_usage.prompt_tokens == used
    with_one_more = long_talk(300)
    del with_one_more.messages[1 : dropped - 1]
    with_one_more.truncate_prompt = False
    assert "2048" in str(refused(lambda: stub.Chat(with_one_more)))


def test_when_the_last_turn_does_not_fit_it_is_what_is_refused(
    stub: rpc.GenerationServiceStub,
) -> None:
    request = long_talk(50)
    request.messages[-1].content[0].text = "word " * 3000
    alone = pb.ChatRequest(sampling=request.sampling)
    alone.messages.extend([request.messages[0], request.messages[-1]])
    assert refused(lambda: stub.Chat(request)) == refused(lambda: stub.Chat(alone))


def test_a_conversation_of_thousands_is_cut_in_seconds_and_holds_nobody_up(
    stub: rpc.GenerationServiceStub, tiny: Live
) -> None:
    request = long_talk(2000)
    with ThreadPoolExecutor(1) as pool:
        started = time.monotonic()
        cut = pool.submit(stub.Chat, request, timeout=100)
        waits = []
        while not cut.done():
            asked = time.monotonic()
            stub.Chat(user("Hi", max_tokens=1), timeout=100)
            waits.append(time.monotonic() - asked)
        assert cut.result().dropped_messages > 3000
    assert time.monotonic() - started < 30
    assert max(waits) < 2


def test_template_values_that_the_server_gives_are_refused(
    stub: rpc.GenerationServiceStub,
) -> None:
    for name in ("messages", "tools", "documents", "add_generation_prompt", "bos_token"):
        request = user("Hello")
        request.template_values = json.dumps({name: []})
        said = refused(lambda r=request: stub.Chat(r))[f"template_values.{name}"]
        assert "is given by the server" in said
    request.template_values = '{"self": 1, "source": 2, "enable_thinking": false}'
    assert stub.Chat(request).choices


def test_an_empty_prompt_is_refused_by_name(stub: rpc.GenerationServiceStub) -> None:
    request = pb.CompleteRequest(prompts=["a", ""])
    assert "must not be empty" in refused(lambda: stub.Complete(request))["prompts[1]"]


def test_images_and_adapters_that_the_model_lacks_are_refused(
    stub: rpc.GenerationServiceStub,
) -> None:
    request = user("Hello")
    request.messages[0].content.add(image=pb.ImagePart(data=b"\x89PNG123"))
    assert "messages[0].content" in refused(lambda: stub.Chat(request))
    other = user("Hello")
    other.adapter = "law"
    assert refused(lambda: stub.Chat(other)) == {
        "adapter": "is 'law'; this model's adapters are none"
    }
    biased = user("Hello")
    biased.sampling.logit_bias.add(token_id=5, bias=3)
    assert "sampling.logit_bias" in refused(lambda: stub.Chat(biased))


def test_completions_of_several_prompts_and_ids(stub: rpc.GenerationServiceStub) -> None:
    sampling = pb.Sampling(temperature=0, max_tokens=8, n=2, ignore_eos=True)
    request = pb.CompleteRequest(prompts=["The origin", "To be"], sampling=sampling, echo=True)
    answer = stub.Complete(request)
    assert [c.index for c in answer.completions] == [0, 1, 2, 3]
    assert answer.completions[0].text.startswith("The origin")
    assert answer.completions[2].text.startswith("To be")
    assert answer.generation_usage.completion_tokens == 32
    streamed, tokens = ["", "", "", ""], [0, 0, 0, 0]
    for event in stub.CompleteStream(pb.CompleteStreamRequest(request=request)):
        if event.HasField("text"):
            streamed[event.text.index] += event.text.text
            tokens[event.text.index] += event.text.tokens
    assert streamed == [c.text for c in answer.completions]
    assert tokens == [8, 8, 8, 8]
    by_ids = pb.CompleteRequest(token_ids=[{"ids": [5, 6, 7]}], sampling=sampling)
    assert len(stub.Complete(by_ids).completions) == 2
    by_ids.token_ids[0].ids.append(99999)
    assert "99999" in refused(lambda: stub.Complete(by_ids))["token_ids[0].ids"]
    assert refused(lambda: stub.Complete(pb.CompleteRequest()))


def usage_tokens(live: Live) -> tuple[int, int]:
    stub = usage_pb2_grpc.UsageServiceStub(live.channel)
    rows = stub.ListUsage(usage_pb2.ListUsageRequest(model="tiny")).rows
    return sum(r.counters.tokens for r in rows), sum(r.counters.cancelled for r in rows)


def test_a_cancelled_stream_stops_the_work_and_is_counted(
    tiny: Live, stub: rpc.GenerationServiceStub
) -> None:
    before, cancelled = usage_tokens(tiny)
    request = user("Count to 30", max_tokens=1500)
    request.sampling.ignore_eos = True
    call = stub.ChatStream(pb.ChatStreamRequest(request=request))
    seen = 0
    prompt = next(call).started.prompt_tokens
    for event in call:
        seen += event.text.tokens
        if seen > 20:
            break
    call.cancel()
    client = tiny.server.repository.pool.loaded[("tiny", 1)].client
    deadline = time.monotonic() + 10
    while client.gate.running or client.engine.info()["running"]:
        assert time.monotonic() < deadline, "the work goes on without its client"
        time.sleep(0.02)
    after, now_cancelled = usage_tokens(tiny)
    assert now_cancelled == cancelled + 1
    assert prompt + seen <= after - before < prompt + 1500


def test_a_request_id_that_is_given_twice_mixes_nothing_up(
    stub: rpc.GenerationServiceStub,
) -> None:
    """Beside others an answer may become another one in the middle: sums of floats go by what else is
    in the batch, and two tokens may be as likely. Its beginning and its length are its own."""

    def one(i: int) -> tuple[str, int]:
        request = user(f"Count to {i}", max_tokens=150 + 10 * i, ignore_eos=True)
        answer = stub.Chat(request, metadata=(("x-request-id", given(i)),))
        return text_of(answer.choices[0]), answer.generation_usage.completion_tokens

    def given(i: int) -> str:
        return f"own-{i}" if alone else "same"

    alone = True
    expected = [one(i) for i in range(8)]
    alone = False
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(one, range(8), timeout=60))
    assert [n for _, n in got] == [150 + 10 * i for i in range(8)]
    beginnings = [text[:100] for text, _ in expected]
    assert len(set(beginnings)) == 8
    assert [text[:100] for text, _ in got] == beginnings


def test_a_deadline_ends_the_work(tiny: Live, stub: rpc.GenerationServiceStub) -> None:
    request = user("Hello", max_tokens=1900)
    request.sampling.ignore_eos = True
    with pytest.raises(grpc.RpcError) as caught:
        stub.Chat(request, timeout=0.2)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    client = tiny.server.repository.pool.loaded[("tiny", 1)].client
    deadline = time.monotonic() + 10
    while client.engine.info()["running"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_many_streams_at_once_with_half_of_them_cancelled(
    tiny: Live, stub: rpc.GenerationServiceStub
) -> None:
    client = tiny.server.repository.pool.loaded[("tiny", 1)].client

    def one(i: int) -> str:
        request = user(f"Count to {3 + i % 27}", max_tokens=100, ignore_eos=True)
        call = stub.ChatStream(pb.ChatStreamRequest(request=request))
        for n, event in enumerate(call):
            if i % 2 and n == i % 3:
                call.cancel()
                return "cancelled"
            last = event
        return last.WhichOneof("event")

    with ThreadPoolExecutor(60) as pool:
        ends = list(pool.map(one, range(120)))
    assert ends[::2] == ["usage"] * 60
    assert ends[1::2] == ["cancelled"] * 60
    deadline = time.monotonic() + 20
    while left := (client.gate.running, client.gate.waiting, client.engine.info()["running"]):
        if not any(left):
            break
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
