"""Routes found by the literal part of their path.

Starlette tries one route after the other: with two hundred of them that took 40 to 90 us of a request
that costs 300 in all; a look into the table takes 1 to 4.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from starlette.requests import Request
from starlette.routing import BaseRoute, Match, Route, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send

Listed = Route | WebSocketRoute
_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
#: Characters of an unknown path that is compared with the known ones.
MAX_COMPARED = 100


class RouteTable(BaseRoute):
    """Many routes as one. Of those that match, the one with the longest literal part serves; of several
    with the same, the first. Every route of the gateway is found as Starlette's own router finds it."""

    def __init__(self, routes: Iterable[Listed]) -> None:
        self.routes = list(routes)
        self._by_area: dict[str, list[Listed]] = {}
        for route in self.routes:
            self._by_area.setdefault(_area(route.path), []).append(route)

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """The route that fits, in the child scope's `route`."""
        if scope["type"] not in ("http", "websocket"):
            return Match.NONE, {}
        area, partial = scope["path"].removeprefix(scope.get("root_path", "")), None
        while True:
            for route in self._by_area.get(area, ()):
                match, child = route.matches(scope)
                if match is Match.FULL:
                    child["route"] = route
                    return match, child
                if match is Match.PARTIAL and partial is None:
                    child["route"] = route
                    partial = child
            if not area:
                break
            area = area.rpartition("/")[0]
        return (Match.NONE, {}) if partial is None else (Match.PARTIAL, partial)

    def methods(self, scope: Scope) -> list[str]:
        """The methods that the scope's path takes."""
        return [m for m in _METHODS if self.matches({**scope, "method": m})[0] is Match.FULL]

    def nearest(self, path: str) -> list[str]:
        """Paths of routes that look like it, best first; none where it is too long to be a slip."""
        if len(path) > MAX_COMPARED:
            return []
        return difflib.get_close_matches(path, {r.path for r in self.routes}, n=3, cutoff=0.8)

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve by the route that was found."""
        await scope["route"].handle(scope, receive, send)


class Doors:
    """Middleware that serves the table's routes itself, nearest to the socket.

    Behind it FastAPI and Starlette pass a request through six more layers, which nothing here needs:
    our endpoints make their errors into answers, and `request` is all that they take. That was a
    quarter of what the gateway did for a small request. All else goes on: WebSockets, wrong methods,
    unknown paths, pages.
    """

    def __init__(self, app: ASGIApp, table: RouteTable) -> None:
        self._app = app
        self._table = table

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http":
            match, child = self._table.matches(scope)
            if match is Match.FULL:
                scope.update(child)
                response = await scope["route"].endpoint(Request(scope, receive, send))
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _area(path: str) -> str:
    """The path, or where it has parameters, the whole segments before the first of them."""
    literal, brace, _ = path.partition("{")
    return literal.rpartition("/")[0] if brace else path
