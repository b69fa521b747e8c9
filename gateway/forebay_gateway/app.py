"""The HTTP application: every door on one upstream."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from forebay.errors import ForebayError, NotFound, Unimplemented
from forebay.methods import methods
from forebay.settings import ClientSettings, HttpSettings
from forebay.v1 import server_pb2
from google.rpc import code_pb2, status_pb2
from grpc import aio
from grpc_health.v1 import health_pb2
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.staticfiles import StaticFiles

from forebay_gateway import connect, http_errors, rest, schema
from forebay_gateway.anthropic import messages
from forebay_gateway.open_inference import OpenInference
from forebay_gateway.openai import (
    batches,
    chat,
    completions,
    embeddings,
    files,
    models,
    moderations,
    rerank,
    responses,
)
from forebay_gateway.openai.generation import renamed
from forebay_gateway.openai.paths import PATHS
from forebay_gateway.origins import Origins
from forebay_gateway.route_table import Doors, RouteTable
from forebay_gateway.upstream import Upstream

INFO = methods()["/forebay.v1.ServerService/GetServerInfo"]
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
#: Headers of answers that pages of other origins may read.
EXPOSED = [
    "x-request-id",
    "retry-after",
    "retry-after-ms",
    *(
        f"x-ratelimit-{what}-{of}"
        for what in ("limit", "remaining", "reset")
        for of in ("requests", "tokens")
    ),
]
Metrics = Callable[[], Awaitable[bytes]]


def create_app(
    settings: HttpSettings,
    target: str,
    server_metrics: Metrics | None = None,
    client: ClientSettings | None = None,
    names: Collection[str] | None = None,
) -> FastAPI:
    """The application.

    Args:
        target: host:port of the gRPC server.
        server_metrics: gives the gRPC server's exposition, which /metrics puts behind its own.
        client: how to call that server by TLS; None = in the clear.
        names: the hosts that requests may be for, see `origins.names`; None = any.

    Raises:
        SettingsError: a file of TLS cannot be read.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await upstream.close()

    app = FastAPI(
        title="Forebay",
        openapi_url="/openapi.json",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        redirect_slashes=False,  # see _http_exception
    )
    upstream = Upstream(
        target, settings.timeout_s, settings.max_body_bytes, settings.max_upload_bytes, client
    )
    registry = CollectorRegistry()
    routes = [*rest.routes(upstream), *connect.routes(upstream)]
    routes += OpenInference(upstream).routes()
    add = routes.append
    for verb, path, endpoint in (
        ("POST", "/v1/embeddings", embeddings.endpoint(upstream)),
        ("GET", "/v1/models", models.list_endpoint(upstream)),
        ("GET", "/v1/models/{model}", models.get_endpoint(upstream)),
        *(("POST", path, rerank.endpoint(upstream)) for path in rerank.PATHS),
        ("POST", "/v1/moderations", moderations.endpoint(upstream, settings.flagged_labels)),
        ("POST", "/v1/files", files.upload_endpoint(upstream)),
        ("GET", "/v1/files", files.list_endpoint(upstream)),
        ("GET", "/v1/files/{file}", files.get_endpoint(upstream)),
        ("GET", "/v1/files/{file}/content", files.content_endpoint(upstream)),
        ("DELETE", "/v1/files/{file}", files.delete_endpoint(upstream)),
    ):
        add(Route(path, rest.guarded(endpoint), methods=[verb]))
    for verb, path, endpoint in (
        ("POST", "/v1/batches", batches.endpoint(upstream)),
        ("GET", "/v1/batches", batches.list_endpoint(upstream)),
        ("GET", "/v1/batches/{batch}", batches.get_endpoint(upstream)),
        ("POST", "/v1/batches/{batch}/cancel", batches.cancel_endpoint(upstream)),
    ):
        add(Route(path, rest.guarded(endpoint, batches.renamed), methods=[verb]))
    for verb, path, endpoint in (
        ("POST", "/v1/responses", responses.endpoint(upstream)),
        ("GET", "/v1/responses/{response}", responses.get_endpoint(upstream)),
        ("DELETE", "/v1/responses/{response}", responses.delete_endpoint(upstream)),
        ("POST", "/v1/responses/{response}/cancel", responses.cancel_endpoint(upstream)),
        ("GET", "/v1/responses/{response}/input_items", responses.items_endpoint(upstream)),
    ):
        add(Route(path, rest.guarded(endpoint, responses.renamed), methods=[verb]))
    for path, endpoint in (
        ("/v1/chat/completions", chat.endpoint(upstream)),
        ("/v1/completions", completions.endpoint(upstream)),
    ):
        add(Route(path, rest.guarded(endpoint, renamed), methods=["POST"]))
    for path, endpoint in (
        ("/v1/messages", messages.endpoint(upstream)),
        ("/v1/messages/count_tokens", messages.count_endpoint(upstream)),
    ):
        add(Route(path, endpoint, methods=["POST"]))
    for path, endpoint in (
        ("/healthz", healthz),
        ("/readyz", _readyz(upstream)),
        ("/metrics", rest.guarded(_metrics(upstream, registry, server_metrics))),
        ("/docs", _docs),
    ):
        add(Route(path, endpoint, methods=["GET"]))
    table = RouteTable(routes)
    app.router.routes.insert(0, table)  # for what Doors leaves
    # A page of static files, without a build step.
    app.mount("/ui", StaticFiles(directory=Path(__file__).parent / "ui", html=True), name="ui")
    for path in ("/", "/ui"):
        app.add_route(path, lambda request: RedirectResponse("/ui/"), methods=["GET"])
    app.mount("/docs/assets", StaticFiles(directory=_swagger_folder()), name="assets")
    page = schema.openapi(PATHS)
    app.openapi = lambda: page
    app.add_exception_handler(HTTPException, _http_exception(table))  # type: ignore[arg-type]
    app.add_exception_handler(Exception, _our_fault)
    app.add_middleware(Doors, table=table)
    app.add_middleware(Origins, allowed=settings.cors_origins, names=names)
    app.add_middleware(Measured, registry=registry)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=EXPOSED,
        )
    return app


async def healthz(request: Request) -> Response:
    """The gateway lives."""
    return PlainTextResponse("ok\n")


def _readyz(upstream: Upstream) -> Callable[[Request], Awaitable[Response]]:
    async def readyz(request: Request) -> Response:
        """200 when the server serves."""
        check = upstream.channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        try:
            answer = await check(health_pb2.HealthCheckRequest(), timeout=2)
        except aio.AioRpcError as e:
            return PlainTextResponse(
                f"the inference server does not answer: {e.code().name}\n", 503
            )
        if answer.status != health_pb2.HealthCheckResponse.SERVING:
            return PlainTextResponse("the inference server is not ready\n", 503)
        return PlainTextResponse("ok\n")

    return readyz


def _metrics(
    upstream: Upstream, registry: CollectorRegistry, server_metrics: Metrics | None
) -> Callable[[Request], Awaitable[Response]]:
    async def metrics(request: Request) -> Response:
        """Both expositions, for those who may read the server's facts."""
        message = server_pb2.GetServerInfoRequest()
        await upstream.unary(INFO, request, message.SerializeToString())
        text = generate_latest(_all_workers() or registry)
        if server_metrics is not None:
            with contextlib.suppress(OSError):  # the server is away: its own metrics are missing
                text += await server_metrics()
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    return metrics


def _all_workers() -> CollectorRegistry | None:
    """The metrics of all workers that share the port; None where there is one."""
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return None
    from prometheus_client.multiprocess import MultiProcessCollector

    registry = CollectorRegistry()
    MultiProcessCollector(registry)
    return registry


async def _docs(request: Request) -> Response:
    return get_swagger_ui_html(
        openapi_url="/openapi.json",
        title="Forebay",
        swagger_js_url="/docs/assets/swagger-ui-bundle.js",
        swagger_css_url="/docs/assets/swagger-ui.css",
        swagger_favicon_url="/docs/assets/favicon-32x32.png",
    )


def _swagger_folder() -> Path:
    # From a package, not from a content network: the page works without internet.
    from swagger_ui_bundle import swagger_ui_path

    return Path(swagger_ui_path)


def _http_exception(table: RouteTable) -> Callable[[Request, HTTPException], Awaitable[Response]]:
    async def answer(request: Request, error: HTTPException) -> Response:
        """Unknown paths and wrong methods, in the same shape as all errors."""
        # Not `request.url`: that is made of the Host header, which may be missing, or nonsense.
        path = request.scope["path"]
        if error.status_code == 405:
            taken = ", ".join(table.methods(request.scope))
            text = f"{path} does not take {request.method}; it takes {taken}"
            body: ForebayError = Unimplemented(text, reason="METHOD_NOT_ALLOWED")
            refused = http_errors.response(body.to_status(), {"allow": taken})
            refused.status_code = 405
            return refused
        if error.status_code == 404:
            if path.endswith("/") and table.matches({**request.scope, "path": path[:-1]})[1]:
                return _without_slash(request)
            missing = NotFound("path", path, nearest=table.nearest(path))
            return http_errors.response(missing.to_status())
        status = status_pb2.Status(code=code_pb2.INVALID_ARGUMENT, message=str(error.detail))
        refused = http_errors.response(status)
        refused.status_code = error.status_code
        return refused

    return answer


def _without_slash(request: Request) -> Response:
    """To the path without its last slash, on the host and by the scheme that the client sees."""
    path, query = request.scope["raw_path"].decode("latin-1"), request.scope["query_string"]
    return RedirectResponse(path[:-1] + (f"?{query.decode('latin-1')}" if query else ""))


async def _our_fault(request: Request, error: Exception) -> Response:
    """Nothing of the inside leaks; the log has the traceback."""
    status = status_pb2.Status(code=code_pb2.INTERNAL, message="internal error of the gateway")
    return http_errors.response(status)


class Measured:
    """Duration and status of every HTTP request, by route; also of those that end by a fault of ours."""

    def __init__(self, app: Any, registry: CollectorRegistry) -> None:
        self._app = app
        self._duration = Histogram(
            "forebay_http_server_duration_seconds",
            "Time to the end of an HTTP answer",
            ["route", "status"],
            buckets=SECONDS,
            registry=registry,
        )
        self._gone = Counter(
            "forebay_http_server_client_gone", "Clients that left first", registry=registry
        )

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.monotonic(), 0

        async def watched(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as e:
            # Here, for what Starlette answers has no headers of CORS: no page could read it.
            if not status:
                await (await _our_fault(Request(scope), e))(scope, receive, watched)
            raise  # to the log
        finally:
            route = scope.get("route")
            name = getattr(route, "path", "unknown")
            self._duration.labels(name, str(status)).observe(time.monotonic() - started)
            if status == 499:
                self._gone.inc()
