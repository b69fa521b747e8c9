"""Who calls by HTTP, where keys are required: what a key may stand in, and what is said when it is spent."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
from forebay_server.access.keys import Limits

from tests.conftest import Live, Start
from tests.integration.gateway import Gateway

CONNECT = "/forebay.v1.EmbeddingService/Embed"
#: Served by the gateway, and on the fast lane straight by the server.
DIRECT = "/v1/embeddings"
INPUT = {"model": "minilm", "input": "a"}


class Door(NamedTuple):
    """A gateway and keys."""

    server: Live
    http: httpx.Client
    good: str
    scarce: str


@pytest.fixture(scope="module")
def door(embedder: Path, start: Start) -> Iterator[Door]:
    server = start(embedder, auth__required="always")
    keys = server.server.keys
    _, good = server.run(keys.create("good", ("infer", "read")))
    one = Limits(requests_per_second=0.01, burst=1)
    _, scarce = server.run(keys.create("scarce", ("infer",), limits=one))
    gateway = Gateway(server)
    yield Door(server, gateway.http, good, scarce)
    gateway.stop()


def statuses(door: Door, headers: dict[str, str]) -> set[int]:
    """What each kind of door says."""
    return {
        door.http.get("/v1/models", headers=headers).status_code,
        door.http.get("/api/v1/models", headers=headers).status_code,
        door.http.get("/v2/models/minilm", headers=headers).status_code,
        door.http.post(DIRECT, json=INPUT, headers=headers).status_code,
        door.http.post(CONNECT, json={"texts": ["a"]}, headers=headers).status_code,
    }


def test_a_key_as_anthropics_clients_send_it(door: Door) -> None:
    assert statuses(door, {}) == {401}
    assert statuses(door, {"x-api-key": door.good}) == {200}
    assert statuses(door, {"x-api-key": "fbk_0_x"}) == {401}


def test_the_bearer_counts_where_both_are_there(door: Door) -> None:
    bearer = {"authorization": f"Bearer {door.good}"}
    assert statuses(door, {**bearer, "x-api-key": "fbk_0_x"}) == {200}
    assert statuses(door, {"authorization": "Bearer fbk_0_x", "x-api-key": door.good}) == {401}


def test_several_spaces_before_a_key(door: Door) -> None:
    assert statuses(door, {"authorization": f"Bearer  {door.good}"}) == {200}


def test_every_door_says_when_to_come_back(door: Door) -> None:
    headers = {"authorization": f"Bearer {door.scarce}"}
    assert door.http.post(DIRECT, json=INPUT, headers=headers).status_code == 200
    for path, body in ((DIRECT, INPUT), (CONNECT, {"texts": ["a"]})):
        refused = door.http.post(path, json=body, headers=headers)
        assert refused.status_code == 429
        assert 60 < int(refused.headers["retry-after"]) <= 100
        assert int(refused.headers["retry-after-ms"]) > 60_000


def test_limits_and_keys_through_http(door: Door) -> None:
    limits = Limits(requests_per_second=0.5, burst=1)
    keys = door.server.server.keys
    _, secret = door.server.run(keys.create("k", ("infer",), limits=limits))
    body = {"model": "minilm", "input": "a"}
    assert door.http.post("/v1/embeddings", json=body).status_code == 401
    assert door.http.get("/metrics").status_code == 401
    headers = {"authorization": f"Bearer {secret}"}
    good = door.http.post("/v1/embeddings", json=body, headers=headers)
    assert good.status_code == 200
    assert good.headers["x-ratelimit-limit-requests"] == "1"
    assert good.headers["x-ratelimit-remaining-requests"] == "0"
    refused = door.http.post("/v1/embeddings", json=body, headers=headers)
    assert refused.status_code == 429
    assert 1 <= int(refused.headers["retry-after"]) <= 2
    assert door.http.get("/api/v1/models", headers=headers).status_code in (403, 429)
