"""Pages of other sites may not use this one in their visitors' names.

A browser sends a page's POST to any address, its visitor's own machine included, and asks first (CORS) only
where the request is unlike a form's. It opens WebSockets without asking at all. And a site that has its own
name mean 127.0.0.1 for a while (DNS rebinding) is of one origin with whoever listens there. Where calls need
a key, such a page has none; a gateway on loopback mostly needs none.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any
from urllib.parse import urlsplit

from forebay.addresses import is_here, name_of
from forebay.errors import PermissionDenied
from forebay.settings import Settings, is_loopback
from starlette.datastructures import Headers

from forebay_gateway import http_errors

#: These change nothing, and what they answer is read by nobody whom CORS does not let.
SAFE = ("GET", "HEAD", "OPTIONS")
#: What no page can send to another site without being asked about it first.
KEYS = ("authorization", "x-api-key")


def names(settings: Settings) -> frozenset[str] | None:
    """The hosts that requests may be for, beside loopback's. None: any, for calls need a key, the gateway
    listens to more than this machine, or `http.cors_origins` lets every page in."""
    http = settings.http
    if settings.keys_required or not is_loopback(http.host) or "*" in http.cors_origins:
        return None
    origins = (name_of(o.partition("://")[2]) for o in http.cors_origins)
    return frozenset({http.host.strip("[]").lower(), *origins} - {""})


class Origins:
    """ASGI middleware: requests that a browser sends for a page of another site are 403, unless they bring
    a key. So are requests for hosts that are not this machine's.

    Args:
        allowed: other origins that may, as `http.cors_origins` has them.
        names: see `names`.
    """

    def __init__(
        self, app: Any, allowed: Sequence[str], names: Collection[str] | None = None
    ) -> None:
        self._app = app
        self._allowed = frozenset(allowed)
        self._names = names

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """ASGI."""
        error = self._refusal(scope) if scope["type"] in ("http", "websocket") else None
        if error is None:
            await self._app(scope, receive, send)
        else:  # a WebSocket is not accepted, and this is the answer to its request
            await http_errors.response(error.to_status())(scope, receive, send)

    def _refusal(self, scope: Any) -> PermissionDenied | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        # No browser leaves it out.
        if host and self._names is not None and not self._is_ours(name_of(host)):
            return PermissionDenied(
                f"no key is needed here, and {host[:100]!r} is not a name of this machine; where it is"
                " reached by that name, as through a proxy, add its origin to http.cors_origins, or set"
                " auth.required to 'always'",
                reason="HOST_NOT_ALLOWED",
            )
        if self._foreign(scope, headers, host):
            return PermissionDenied(
                "pages of other origins may not do this; http.cors_origins names those that may",
                reason="ORIGIN_NOT_ALLOWED",
            )
        return None

    def _is_ours(self, name: str) -> bool:
        return is_here(name) or (self._names is not None and name in self._names)

    def _foreign(self, scope: Any, headers: Headers, host: str) -> bool:
        if scope.get("method") in SAFE:
            return False
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
        return urlsplit(origin).netloc != host
