"""The table finds what Starlette's router finds by trying one route after the other."""

from __future__ import annotations

import re
from typing import Any

import pytest
from forebay.settings import HttpSettings
from forebay_gateway.app import create_app
from forebay_gateway.route_table import RouteTable
from starlette.routing import Match, Route, Router
from starlette.testclient import TestClient


@pytest.fixture(scope="module")
def table() -> RouteTable:
    """The gateway's own."""
    (found,) = [
        r
        for r in create_app(HttpSettings(), "127.0.0.1:1").router.routes
        if isinstance(r, RouteTable)
    ]
    return found


def scope(path: str, method: str = "GET", kind: str = "http") -> dict[str, Any]:
    return {"type": kind, "path": path, "method": method}


def first(routes: list[Any], wanted: dict[str, Any]) -> tuple[Match, Any, Any]:
    """Starlette's rule: the first that fits fully, else the first that fits but for the method."""
    partial: tuple[Match, Any, Any] = (Match.NONE, None, None)
    for route in routes:
        match, child = route.matches(wanted)
        if match is Match.FULL:
            return match, route, child["path_params"]
        if match is Match.PARTIAL and partial[0] is Match.NONE:
            partial = (match, route, child["path_params"])
    return partial


def test_every_route_of_the_gateway_is_found(table: RouteTable) -> None:
    every = table.routes
    assert len(every) > 150
    for route in every:
        for value in ("x", "a.b-c_d", "x:y"):
            path = re.sub(r"\{.*?\}", value, route.path)
            for method in ("GET", "POST", "DELETE", "PUT"):
                kind = "http" if isinstance(route, Route) else "websocket"
                wanted = scope(path, method, kind)
                match, found, params = first(every, wanted)
                got, child = table.matches(wanted)
                assert got is match, wanted
                if match is not Match.NONE:
                    assert (child["route"], child["path_params"]) == (found, params), wanted


@pytest.mark.parametrize(
    "path", ["/", "", "/v1", "/v1/", "/v1/embeddings/x", "/api/v1", "//", "/v2/models//infer"]
)
def test_what_is_no_route_is_not_found(table: RouteTable, path: str) -> None:
    assert table.matches(scope(path))[0] is Match.NONE
    assert first(table.routes, scope(path))[0] is Match.NONE


def test_a_prefix_of_a_proxy_is_no_part_of_the_path() -> None:
    async def here(request: Any) -> Any:
        from starlette.responses import PlainTextResponse

        return PlainTextResponse(request.path_params["name"])

    app = Router([RouteTable([Route("/things/{name}", here)])])
    with TestClient(app, root_path="/prefix") as client:
        assert client.get("/prefix/things/a").text == "a"
        assert client.get("/things/b").text == "b"
