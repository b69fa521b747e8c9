"""Two servers that share a PostgreSQL: what one is told holds for the other, and it may restart."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import grpc
import pytest
from forebay.v1 import (
    embedding_pb2,
    embedding_pb2_grpc,
    key_pb2,
    key_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    usage_pb2,
    usage_pb2_grpc,
)
from forebay_server.storage import database

from tests.conftest import Live, NewDatabase, Start, copy_models
from tests.integration.test_access import bearer, make_key, retry_delay

#: A version that is a time: more than 32 bits.
DATED = 20260131120000


@pytest.fixture(scope="module")
def pair(
    starters: Path,
    start: Start,
    postgres: NewDatabase,
    tmp_path_factory: pytest.TempPathFactory,
) -> list[Live]:
    """Two servers of one database, each with a home of its own."""
    models = copy_models(starters, tmp_path_factory.mktemp("models"), "minilm")
    versions = sorted(p for p in (models / "minilm").iterdir() if p.is_dir() and p.name.isdigit())
    versions[-1].rename(versions[-1].with_name(str(DATED)))
    shared = {"storage__database": postgres(), "auth__required": "always", "auth__reload_s": 0.05}
    return [start(models, **shared) for _ in range(2)]


@pytest.fixture(scope="module")
def admin(pair: list[Live]) -> str:
    """An admin's key, made on the first server."""
    _, secret = pair[0].run(pair[0].server.keys.create("admin", ("infer", "read", "admin")))
    pair[1].run(pair[1].server.keys.reload())
    return secret


def embed(live: Live, secret: str) -> None:
    stub = embedding_pb2_grpc.EmbeddingServiceStub(live.channel)
    stub.Embed(embedding_pb2.EmbedRequest(texts=["a"]), metadata=bearer(secret))


def refusal(live: Live, secret: str) -> grpc.RpcError:
    """The first refusal of a call that is made again and again."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            embed(live, secret)
        except grpc.RpcError as e:
            return e
        time.sleep(0.02)
    raise AssertionError("no call was refused")


def test_a_key_is_made_and_revoked_for_both(pair: list[Live], admin: str) -> None:
    first, second = pair
    key_id, secret = make_key(first, admin)
    embed(first, secret)
    second.run(second.server.keys.reload())
    embed(second, secret)
    keys = key_pb2_grpc.KeyServiceStub(first.channel)
    keys.RevokeKey(key_pb2.RevokeKeyRequest(id=key_id), metadata=bearer(admin))
    assert refusal(second, secret).code() is grpc.StatusCode.UNAUTHENTICATED


def test_usage_and_budgets_are_of_both(pair: list[Live], admin: str) -> None:
    key_id, secret = make_key(pair[0], admin, limits={"budget_tokens": 30})
    pair[1].run(pair[1].server.keys.reload())
    for live in pair:
        embed(live, secret)
        live.run(live.server.ledger.flush())
    stub = usage_pb2_grpc.UsageServiceStub(pair[1].channel)
    asked = usage_pb2.ListUsageRequest(key_id=key_id)
    (row,) = stub.ListUsage(asked, metadata=bearer(admin)).rows
    assert (row.version, row.counters.calls) == (DATED, 2)
    mine = usage_pb2.GetUsageRequest(key_id=key_id)
    total = stub.GetUsage(mine, metadata=bearer(admin)).total
    assert (total.calls, total.tokens) == (2, row.counters.tokens)
    assert refusal(pair[0], secret).code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_calls_go_on_when_it_has_closed_its_connections(pair: list[Live], admin: str) -> None:
    async def terminate() -> None:
        async with pair[0].server._database.begin() as db:
            await db.exec_driver_sql(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE pid <> pg_backend_pid() AND datname = current_database()"
            )

    pair[0].run(terminate())
    make_key(pair[1], admin)


def test_a_statement_that_takes_too_long_is_unavailable(
    starters: Path,
    start: Start,
    postgres: NewDatabase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(database, "STATEMENT_S", 1.0)
    live = start(copy_models(starters, tmp_path, "minilm"), storage__database=postgres())
    held, end = threading.Event(), asyncio.Event()

    async def hold() -> None:
        """Keep everybody from a table, until the end."""
        async with live.server._database.begin() as db:
            await db.exec_driver_sql("LOCK TABLE model_aliases")
            held.set()
            await end.wait()

    holding = asyncio.run_coroutine_threadsafe(hold(), live.loop)
    assert held.wait(10)
    models = model_pb2_grpc.ModelServiceStub(live.channel)
    asked = model_pb2.SetAliasRequest(model="minilm", alias="a", version=1)
    with pytest.raises(grpc.RpcError) as caught:
        models.SetAlias(asked, timeout=30)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert retry_delay(caught.value) == 1
    live.loop.call_soon_threadsafe(end.set)
    holding.result(10)
    models.SetAlias(asked, timeout=30)
