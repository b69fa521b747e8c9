"""Budgets under callers that really are concurrent, through the wire: of equal calls exactly as many
are let in as the budget covers, whoever comes first, and the ledger has each token once."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from forebay.v1 import generation_pb2 as pb
from forebay.v1 import generation_pb2_grpc as rpc
from forebay_server.access.keys import Limits

from tests.conftest import Live, Start
from tests.integration.chats import user
from tests.integration.language_models import random_openvino

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
CALLERS = 40


@pytest.fixture(scope="module")
def tiny(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Live:
    return start(random_openvino(tmp_path_factory.mktemp("models")), auth__required="always")


def key(live: Live, limits: Limits) -> tuple[str, list[tuple[str, str]]]:
    """A new key's id, and the metadata of its calls."""
    record, secret = live.run(live.server.keys.create("k", ("infer", "read"), limits=limits))
    return record.id, [("authorization", f"Bearer {secret}")]


@pytest.mark.parametrize("seed", range(5))
def test_equal_concurrent_calls_get_in_exactly_as_often_as_the_budget_covers(
    tiny: Live, seed: int
) -> None:
    rng = random.Random(seed)
    stub = rpc.GenerationServiceStub(tiny.channel)
    length = rng.randint(1, 24)
    request = user("Hello", max_tokens=length, ignore_eos=True)
    _, plain = key(tiny, Limits())
    used = stub.Chat(request, metadata=plain).generation_usage
    cost = used.prompt_tokens + length
    assert used.completion_tokens == length
    covered = rng.randint(1, 12)
    limits = Limits(budget_tokens=covered * cost + rng.randint(0, cost - 1), budget_period="day")
    number, mine = key(tiny, limits)

    def one(i: int) -> int:
        """Tokens that a call took; 0 when it was refused."""
        try:
            if i % 2:
                found = stub.Chat(request, metadata=mine).generation_usage
            else:
                events = list(stub.ChatStream(pb.ChatStreamRequest(request=request), metadata=mine))
                found = events[-1].usage
        except grpc.RpcError as e:
            assert e.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            return 0
        return found.prompt_tokens + found.completion_tokens

    with ThreadPoolExecutor(CALLERS) as pool:
        took = [t for t in pool.map(one, range(CALLERS)) if t]
    assert took == [cost] * covered
    standing = tiny.run(tiny.server.budgets.standing(number))
    assert (standing.tokens, standing.reserved_tokens) == (covered * cost, 0)


def test_what_cancelled_calls_did_not_use_is_there_for_others(tiny: Live) -> None:
    stub = rpc.GenerationServiceStub(tiny.channel)
    limits = Limits(budget_tokens=20_000, budget_period="day")
    number, mine = key(tiny, limits)
    request = user("Count to 30", max_tokens=400, ignore_eos=True)

    def one(i: int) -> None:
        call = stub.ChatStream(pb.ChatStreamRequest(request=request), metadata=mine)
        try:
            for event in call:
                if event.HasField("text") and event.text.text and i % 4:
                    call.cancel()
        except grpc.RpcError as e:
            allowed = (grpc.StatusCode.CANCELLED, grpc.StatusCode.RESOURCE_EXHAUSTED)
            assert e.code() in allowed

    with ThreadPoolExecutor(CALLERS) as pool:
        list(pool.map(one, range(CALLERS)))
    tiny.run(tiny.server.ledger.flush())
    standing = tiny.run(tiny.server.budgets.standing(number))
    assert standing.reserved_tokens == 0
    assert 0 < standing.tokens <= 20_000
    # All that is left can be had by one call.
    left = 20_000 - standing.tokens
    last = user("Hello", ignore_eos=True, max_tokens=min(1800, left - 200))
    assert stub.Chat(last, metadata=mine).choices
