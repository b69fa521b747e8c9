"""The gRPC server, put together: settings in, a running server out, and its orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, cast

import forebay.methods
from forebay.constraints import Validator
from forebay.settings import Settings
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from forebay_server.access.budgets import Budgets
from forebay_server.access.cache import ProcessCache, RedisCache, ResponseCache
from forebay_server.access.idempotency import IdempotencyStore
from forebay_server.access.keys import KeyStore
from forebay_server.access.limits import Limiter, ProcessLimiter
from forebay_server.access.redis_limits import RedisLimiter
from forebay_server.access.usage import UsageLedger
from forebay_server.core.allocator import trim
from forebay_server.dataplane.generation import GenerationPipeline
from forebay_server.dataplane.generation_cache import AnswerCache
from forebay_server.dataplane.models import ModelAccess
from forebay_server.dataplane.registry import Registry
from forebay_server.dataplane.tabular import TabularPipeline
from forebay_server.dataplane.tensors import TensorPipeline
from forebay_server.dataplane.texts import TextPipeline
from forebay_server.deferred import Deferred
from forebay_server.generation.client import GenerationClient
from forebay_server.observability.metrics import Metrics
from forebay_server.observability.tracing import Tracer
from forebay_server.repository import Defaults, ModelRepository
from forebay_server.services.base import Service, handlers
from forebay_server.services.classification import ClassificationService
from forebay_server.services.embedding import EmbeddingService
from forebay_server.services.generation import GenerationService
from forebay_server.services.key import KeyService
from forebay_server.services.model import ModelService
from forebay_server.services.open_inference import OpenInferenceService
from forebay_server.services.rerank import RerankService
from forebay_server.services.server import ServerService
from forebay_server.services.tabular import TabularService
from forebay_server.services.token import TokenService
from forebay_server.services.usage import UsageService
from forebay_server.storage.database import Database
from forebay_server.storage.routing_state import StoredRoutingState
from forebay_server.transport.http_port import HttpPort
from forebay_server.transport.lanes import Lanes, choose
from forebay_server.transport.leasing import Leasing
from forebay_server.transport.metrics_http import MetricsListener
from forebay_server.transport.pipeline import Pipeline
from forebay_server.transport.stages import (
    WATCHING,
    AccessLog,
    Admission,
    Measuring,
    standard_stages,
)

log = logging.getLogger("forebay.server")

#: Threads that go on with calls whose model had to be loaded first.
RESUME_THREADS = 4


def retrieval_installed() -> bool:
    """Whether the `retrieval` extra is there: without it, its services are UNIMPLEMENTED."""
    return all(importlib.util.find_spec(name) for name in ("faiss", "Stemmer", "pypdfium2"))


class Server:
    """A running server. `start`, then `wait`, then `stop`; all on one event loop."""

    def __init__(self, settings: Settings, http: HttpPort | None = None) -> None:
        """`http`: a port for HTTP, beside that of gRPC."""
        settings.check_exposure()
        self.settings = settings
        self._http = http
        self.metrics = Metrics()
        self.metrics_port = 0
        self._listens = False
        #: Ends what has been opened, the newest first.
        self._opened = contextlib.AsyncExitStack()
        self._background: list[asyncio.Task[None]] = []
        self._health: Any = cast(Any, health).aio.HealthServicer()

    async def start(self) -> None:
        """Open state, listen, load models. Ready (health SERVING) when the models are.

        Whatever ends it before, a cancellation too: what was opened until then is closed as by `stop`.
        Calls may have been answered by then.
        """
        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise

    async def _start(self) -> None:
        s, opened = self.settings, self._opened
        Path(s.home).mkdir(parents=True, exist_ok=True, mode=0o700)
        s.models_root.mkdir(parents=True, exist_ok=True)
        self._database = await Database.open(s.database_url)
        opened.push_async_callback(self._database.close)
        self.keys = KeyStore(self._database, s.keys_required)
        await self.keys.reload()
        self.ledger = UsageLedger(self._database, s.home / "usage")
        await self.ledger.start()
        opened.push_async_callback(self.ledger.close)
        self.repository = ModelRepository(
            s.models_root,
            Defaults(
                providers=tuple(s.models.providers),
                intra_op_threads=s.models.intra_op_threads,
                max_batch_tokens=s.models.max_batch_tokens,
                max_batch_size=s.models.max_batch_size,
                max_batch_rows=s.models.max_batch_rows,
                max_queue_size=s.models.max_queue_size,
                engine_nice=s.models.engine_nice,
                tensorrt_cache=str(s.home / "tensorrt"),
                vllm_python=str(s.generation.vllm_python or ""),
                vllm_cache_gb=s.generation.vllm_cache_gb,
                trtllm_python=str(s.generation.trtllm_python or ""),
            ),
            StoredRoutingState(self._database),
            s.models.memory_budget_bytes,
            self.metrics.batches.observer,
        )
        opened.push_async_callback(self.repository.close)
        self.metrics.watch_models(
            lambda: [(m, v, x.memory_bytes) for (m, v), x in self.repository.pool.loaded.items()]
        )
        self.metrics.generation.watch(
            lambda: [
                (m, str(v), x.client)
                for (m, v), x in self.repository.pool.loaded.items()
                if isinstance(x.client, GenerationClient)
            ]
        )
        self.budgets = Budgets(self.keys.limits, self.ledger, loop=asyncio.get_running_loop())
        self._tracer = Tracer(s.observability.otlp_endpoint)
        opened.callback(self._tracer.close)
        limiter = self._limiter()
        self._admission = Admission(self.keys, limiter, self.budgets)
        pipeline = Pipeline(
            standard_stages(self._tracer, self.metrics, self.keys, self._admission, self.ledger),
            outer=WATCHING,
            waits=isinstance(limiter, RedisLimiter),
        )
        validator = Validator()
        self._resume = ThreadPoolExecutor(RESUME_THREADS, "resume")
        opened.callback(self._resume.shutdown, wait=False)
        registered = handlers(self._services(validator))
        if self._retrieval is not None:
            opened.push_async_callback(self._retrieval.close)
        self._idempotency = IdempotencyStore(self._database)
        opened.push_async_callback(self._idempotency.drain)
        opened.push_async_callback(self._deferred.close)
        self.lanes = Lanes(
            s.grpc,
            registered,
            pipeline,
            validator,
            self._idempotency,
            self.metrics.refused_at_the_door,
            self._http,
            self.metrics.http.ended,
            self._leases(limiter),
        )
        self._listens = True
        await self._listen()
        await self.repository.start()
        if self._retrieval is not None:
            await self._retrieval.start()
        await self._deferred.start()
        trim()
        self.repository.started = True  # before, a stored knowledge base would be "not found"
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)
        self._background = [
            asyncio.create_task(self.keys.keep_fresh(s.auth.reload_s)),
            asyncio.create_task(self.ledger.keep()),
            asyncio.create_task(self.repository.watch_folder(s.models.poll_s)),
        ]
        if isinstance(limiter, RedisLimiter):
            self._background.append(asyncio.create_task(limiter.keep()))
        opened.push_async_callback(self._end_background)
        log.info("serving gRPC on %s:%d by the %s lane", s.grpc.host, self.port, self.lanes.lane)

    @property
    def port(self) -> int:
        """The gRPC port in force."""
        return self.lanes.port

    def _leases(self, limiter: Limiter) -> Leasing | None:
        if self._tracer.enabled:
            return None  # each call has a span
        watch = Measuring(self.metrics), AccessLog()
        leasing = Leasing(self.keys, limiter, self.ledger, *watch)
        self.keys.on_change = self.repository.events.on_change = leasing.recall
        if isinstance(limiter, ProcessLimiter):
            limiter.borrower = leasing
        return leasing

    def _limiter(self) -> Limiter:
        url = self.settings.storage.redis.get_secret_value()
        if not url:
            return ProcessLimiter()
        bypassed = self.metrics.bypassed.labels("limits")
        return RedisLimiter(url, observe=bypassed.inc)

    def _cache(self) -> ResponseCache:
        storage = self.settings.storage
        url = storage.redis.get_secret_value()
        if url:
            return RedisCache(
                url,
                storage.cache_ttl_s,
                self.metrics.cache_looked_up,
                bypassed=self.metrics.bypassed.labels("cache").inc,
            )
        return ProcessCache(storage.cache_bytes, self.metrics.cache_looked_up)

    def _services(self, validator: Validator) -> list[Service]:
        most = self.settings.grpc.max_items_per_call
        access = ModelAccess(self.repository.resolver, asyncio.get_running_loop(), self._resume)
        registry = Registry(self.repository)
        cache = self._cache()
        texts = TextPipeline(access, cache, most)
        pipeline = GenerationPipeline(
            access, self.metrics.generation, self.budgets, AnswerCache(cache)
        )
        generation, embedding = GenerationService(pipeline), EmbeddingService(texts, validator)
        self._deferred = Deferred(
            self.settings,
            self._database,
            self.keys,
            self.budgets,
            self.ledger,
            pipeline,
            generation,
            embedding,
            self.metrics,
            validator,
        )
        self._retrieval = None
        retrieval: list[Service] = []
        if retrieval_installed():
            from forebay_server.retrieval import Retrieval

            self._retrieval = Retrieval(
                self.settings,
                self._database,
                access,
                texts,
                self.metrics,
                validator,
                self.ledger,
                pipeline,
                self.budgets,
            )
            retrieval = self._retrieval.services
        return [
            *retrieval,
            *self._deferred.services,
            TabularService(TabularPipeline(access, most), access, validator),
            ClassificationService(texts, validator),
            embedding,
            RerankService(texts),
            TokenService(access),
            generation,
            ModelService(registry, self.repository),
            KeyService(self.keys),
            UsageService(self.ledger, self.budgets),
            ServerService(self.settings, time.time(), choose(self.settings.grpc)),
            OpenInferenceService(access, registry, texts, TensorPipeline(access), validator),
        ]

    async def _listen(self) -> None:
        names = sorted({m.service for m in forebay.methods.methods().values()})
        names += [health.SERVICE_NAME, reflection.SERVICE_NAME]
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        await self.lanes.start(
            [
                partial(health_pb2_grpc.add_HealthServicer_to_server, self._health),
                partial(reflection.enable_server_reflection, names),
            ]
        )
        if self.settings.observability.metrics_port >= 0:
            self._metrics_listener = MetricsListener(self.metrics.exposition)
            self.metrics_port = await self._metrics_listener.start(
                self.settings.observability.metrics_port
            )
            self._opened.push_async_callback(self._metrics_listener.stop)

    async def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        names = {m.service for m in forebay.methods.methods().values()}
        for name in ["", *names]:
            await self._health.set(name, status)

    async def wait(self) -> None:
        """Until the server has stopped."""
        await self.lanes.wait()

    async def leave(self) -> None:
        """Say NOT_SERVING, for good, and serve gRPC on: balancers take their calls elsewhere meanwhile.
        HTTP is closed to new requests: the gateway that most of them need drains now."""
        await self._health.enter_graceful_shutdown()
        if self._listens:
            self.lanes.leave()

    async def stop(self) -> None:
        """Say NOT_SERVING, let running calls end, then close everything."""
        await self.leave()
        if self._listens:
            await self.lanes.stop()
        await self._opened.aclose()
        if self._listens:
            log.info("stopped")

    async def _end_background(self) -> None:
        for task in self._background:
            task.cancel()
        for task in self._background:
            with contextlib.suppress(asyncio.CancelledError):
                await task
