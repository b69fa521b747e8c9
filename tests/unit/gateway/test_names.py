"""Names of parameters: the contract's own and protobuf's for JSON, in queries, forms and paths as in bodies."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from forebay.errors import InvalidArgument
from forebay.methods import methods
from forebay.settings import HttpSettings
from forebay.v1 import knowledge_pb2, model_pb2
from forebay_gateway import rest
from forebay_gateway.app import create_app
from forebay_gateway.contract import bindings
from forebay_gateway.upstream import Upstream
from starlette.requests import Request
from starlette.testclient import TestClient

ASK = methods()["/forebay.v1.KnowledgeService/Ask"]
LIST = "/forebay.v1.ModelService/ListModels"


@pytest.fixture(scope="module")
def door() -> Iterator[TestClient]:
    """A gateway whose server does not run: what is not refused here is 503."""
    with TestClient(create_app(HttpSettings(), "127.0.0.1:1")) as client:
        yield client


def read(query: str) -> Any:
    (binding,) = [b for b in bindings() if b.method.path == LIST]
    scope = {"type": "http", "headers": [], "query_string": query.encode(), "path_params": {}}
    return asyncio.run(rest.read(Upstream("none:1", 1, 1, 1), binding, Request(scope)))


@pytest.mark.parametrize("name", ["page_size", "pageSize"])
def test_a_query(name: str) -> None:
    assert read(f"{name}=7") == model_pb2.ListModelsRequest(page_size=7)


def test_a_query_that_says_it_twice() -> None:
    with pytest.raises(InvalidArgument, match="is given beside page_size"):
        read("page_size=7&pageSize=8")


def test_a_path_and_a_body() -> None:
    place = {"knowledge_base": "handbook"}
    for name in ("knowledge_base", "knowledgeBase"):
        body = {name: "handbook", "question": "Why?"}
        asked = rest.with_places(ASK, body, place)
        assert isinstance(asked, knowledge_pb2.AskRequest)
        assert asked.knowledge_base == "handbook"
        with pytest.raises(InvalidArgument) as caught:
            rest.with_places(ASK, {name: "other"}, place)
        assert caught.value.violations[0].field == name


@pytest.mark.parametrize("name", ["knowledge_base", "knowledgeBase"])
def test_a_form(door: TestClient, name: str) -> None:
    files = {"files": ("a.txt", b"text")}
    answer = door.post("/api/v1/knowledge:upload", data={name: "handbook"}, files=files)
    assert answer.status_code == 503, answer.text


@pytest.mark.parametrize("value", ["True", "1", "yes", ""])
def test_booleans_of_forms_are_those_of_queries(door: TestClient, value: str) -> None:
    files = {"files": ("a.txt", b"text")}
    data = {"model": "a", "load": value}
    refused = door.post("/api/v1/models:import", data=data, files=files)
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert (error["param"], "allowed are true and false" in error["message"]) == ("load", True)


@pytest.mark.parametrize("name", ["x-forebay-timeout-ms", "connect-timeout-ms"])
def test_a_time_that_is_none_is_refused_by_its_own_name(door: TestClient, name: str) -> None:
    refused = door.get("/api/v1/models", headers={name: "x"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, name)
