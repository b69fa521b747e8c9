"""Pages of other sites may not use this one in their visitors' names.

A browser sends a page's POST to any address, its visitor's own machine included, and asks first (CORS) only
where the request is unlike a form's. It opens WebSockets without asking at all. Where calls need a key, such
a page has none; a gateway on loopback mostly needs none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from forebay.errors import PermissionDenied
from starlette.datastructures import Headers

from forebay_gateway import http_errors

#: These change nothing, and what they answer is read by nobody whom CORS does not let.
SAFE = ("GET", "HEAD", "OPTIONS")
#: What no page can send to another site without being asked about it first.
KEYS = ("authorization", "x-api-key")


class Origins:
    """ASGI middleware: requests that a browser sends for a page of another site are 403, unless they bring
    a key.

    Args:
        allowed: other origins that may, as `http.cors_origins` has them.
    """

    def __init__(self, app: Any, allowed: Sequence[str]) -> None:
        self._app = app
        self._allowed = frozenset(allowed)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """ASGI."""
        if scope["type"] not in ("http", "websocket") or not self._foreign(scope):
            await self._app(scope, receive, send)
            return
        error = PermissionDenied(
            "pages of other origins may not do this; http.cors_origins names those that may",
            reason="ORIGIN_NOT_ALLOWED",
        )
        if scope["type"] == "websocket":  # closed before it was accepted: 403
            await send({"type": "websocket.close", "code": 1008, "reason": error.message})
            return
        await http_errors.response(error.to_status())(scope, receive, send)

    def _foreign(self, scope: Any) -> bool:
        if scope.get("method") in SAFE:
            return False
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        if origin is None or origin in self._allowed or "*" in self._allowed:
            return False
        if any(name in headers for name in KEYS):
            return False
        site = headers.get(
            "sec-fetch-site"
        )  # the browser's own word, whatever a proxy does to Host
        if site is not None:
            return site not in ("same-origin", "none")
        return urlsplit(origin).netloc != headers.get("host", "")
