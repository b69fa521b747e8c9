"""ModelService: the registry."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import cast

from forebay.errors import InvalidArgument
from forebay.v1 import model_pb2 as pb
from google.protobuf.timestamp_pb2 import Timestamp

from forebay_server.core.call import Call
from forebay_server.dataplane.registry import (
    ModelView,
    Registry,
    VersionView,
    in_thread,
)
from forebay_server.repository import ModelRepository
from forebay_server.repository.uploads import VersionUpload
from forebay_server.services.base import Service
from forebay_server.services.paging import Page

TASKS = {
    "tabular-regression": pb.TASK_TABULAR_REGRESSION,
    "tabular-classification": pb.TASK_TABULAR_CLASSIFICATION,
    "text-classification": pb.TASK_TEXT_CLASSIFICATION,
    "zero-shot-classification": pb.TASK_ZERO_SHOT_CLASSIFICATION,
    "embedding": pb.TASK_EMBEDDING,
    "rerank": pb.TASK_RERANK,
    "tensor": pb.TASK_TENSOR,
    "generation": pb.TASK_GENERATION,
    "": pb.TASK_UNSPECIFIED,
}
STATES = {
    "available": pb.MODEL_STATE_AVAILABLE,
    "loading": pb.MODEL_STATE_LOADING,
    "ready": pb.MODEL_STATE_READY,
    "unloading": pb.MODEL_STATE_UNLOADING,
    "failed": pb.MODEL_STATE_FAILED,
}
#: Bytes of one imported version at most.
MAX_IMPORT_BYTES = 8 << 30


class ModelService(Service):
    """See protos/forebay/v1/model.proto. Answers show what `registry` sees of `repository`."""

    name = "forebay.v1.ModelService"

    def __init__(self, registry: Registry, repository: ModelRepository) -> None:
        self._registry = registry
        self._repository = repository

    async def list_models(self, call: Call) -> pb.ListModelsResponse:
        """ListModels."""
        request = cast(pb.ListModelsRequest, call.request)
        views = self._registry.views(call.principal)
        models = [m for m in views if request.task in (0, TASKS[m.task])]
        chosen, token = Page(request, 100, str).of(models, lambda m: (m.name,))
        return pb.ListModelsResponse(models=[message(m) for m in chosen], next_page_token=token)

    async def get_model(self, call: Call) -> pb.GetModelResponse:
        """GetModel."""
        request = cast(pb.GetModelRequest, call.request)
        view = self._registry.view(request.model, call.principal)
        response = pb.GetModelResponse(model=message(view))
        for event in await self._repository.routing.history(view.name):
            response.history.add(
                time=timestamp(event.time),
                from_version=event.from_version,
                to_version=event.to_version,
                key_id=event.key_id,
                action=event.action,
            )
        return response

    async def load_model(self, call: Call) -> pb.LoadModelResponse:
        """LoadModel."""
        request = cast(pb.LoadModelRequest, call.request)
        version = request.version if request.HasField("version") else None
        await self._registry.load(request.model, version)
        return pb.LoadModelResponse(model=self._model(call, request.model))

    async def unload_model(self, call: Call) -> pb.UnloadModelResponse:
        """UnloadModel."""
        request = cast(pb.UnloadModelRequest, call.request)
        version = request.version if request.HasField("version") else None
        before, after = await self._registry.unload(request.model, version)
        return pb.UnloadModelResponse(
            model=self._model(call, request.model),
            memory_before_bytes=before,
            memory_after_bytes=after,
        )

    async def import_version(
        self, call: Call, requests: AsyncIterator[pb.ImportVersionRequest]
    ) -> pb.ImportVersionResponse:
        """ImportVersion."""
        first = await anext(requests, None)
        if first is None or first.WhichOneof("part") != "header":
            raise InvalidArgument.at("header", "must be the first message of the stream")
        header = first.header
        self._registry.require_version_folders(header.model)
        known = self._registry.versions(header.model)
        version = header.version if header.HasField("version") else max(known, default=0) + 1
        upload = VersionUpload(
            self._repository.catalogue.root, header.model, version, MAX_IMPORT_BYTES
        )
        try:
            async for request in requests:
                if request.WhichOneof("part") != "chunk":
                    raise InvalidArgument.at("chunk", "must be every message after the first")
                await in_thread(upload.write, request.chunk.path, request.chunk.data)
            await in_thread(upload.commit)
        except BaseException:
            upload.abort()
            raise
        await self._repository.catalogue.read()
        if header.load:
            await self._repository.load(header.model, version)
        return pb.ImportVersionResponse(
            model=self._model(call, header.model),
            version=version,
            bytes_written=upload.bytes_written,
        )

    async def set_alias(self, call: Call) -> pb.SetAliasResponse:
        """SetAlias."""
        request = cast(pb.SetAliasRequest, call.request)
        version = request.version if request.HasField("version") else None
        await self._repository.routing.set_alias(request.model, request.alias, version)
        return pb.SetAliasResponse(model=self._model(call, request.model))

    async def set_traffic(self, call: Call) -> pb.SetTrafficResponse:
        """SetTraffic."""
        request = cast(pb.SetTrafficRequest, call.request)
        shares: dict[int, int] = {}
        for i, share in enumerate(request.shares):
            if share.version in shares:
                raise InvalidArgument.at(f"shares[{i}].version", f"{share.version} is there twice")
            shares[share.version] = share.weight
        if shares and not any(shares.values()):
            raise InvalidArgument.at("shares", "have no weight above 0")
        shadow = None
        if request.HasField("shadow"):
            shadow = (request.shadow.version, request.shadow.fraction)
        await self._repository.routing.set_traffic(request.model, shares, shadow)
        return pb.SetTrafficResponse(model=self._model(call, request.model))

    async def promote(self, call: Call) -> pb.PromoteResponse:
        """Promote."""
        request = cast(pb.PromoteRequest, call.request)
        await self._repository.routing.promote(
            request.model, request.version, call.principal.key_id
        )
        return pb.PromoteResponse(model=self._model(call, request.model))

    async def rollback(self, call: Call) -> pb.RollbackResponse:
        """Rollback."""
        request = cast(pb.RollbackRequest, call.request)
        await self._repository.routing.rollback(request.model, call.principal.key_id)
        return pb.RollbackResponse(model=self._model(call, request.model))

    async def get_statistics(self, call: Call) -> pb.GetStatisticsResponse:
        """GetStatistics."""
        request = cast(pb.GetStatisticsRequest, call.request)
        response = pb.GetStatisticsResponse()
        for view in self._registry.statistics(request.model):
            s = view.statistics
            response.versions.add(
                model=view.model,
                version=view.version,
                succeeded=s.success.count,
                failed=s.fail.count,
                cancelled=s.cancelled,
                expired=s.expired,
                rejected=s.rejected,
                rows=s.rows,
                batches=s.batches,
                mean_batch_rows=s.rows / s.batches if s.batches else 0.0,
                queue_seconds=s.queue.seconds,
                execute_seconds=s.execute.seconds,
                queue_depth=view.queue_depth,
                token_efficiency=s.tokens / s.padded_tokens if s.padded_tokens else 0.0,
                memory_bytes=view.memory_bytes,
            )
        return response

    async def watch_models(self, call: Call) -> AsyncIterator[pb.WatchModelsResponse]:
        """WatchModels."""
        request = cast(pb.WatchModelsRequest, call.request)
        with self._repository.events.watch() as events:  # first: what changes meanwhile is told too
            if request.model:
                model = self._model(call, request.model)
                yield pb.WatchModelsResponse(event="current", model=model)
            else:
                for view in self._registry.views(call.principal):
                    yield pb.WatchModelsResponse(event="current", model=message(view))
            while True:
                event = await events.get()
                if request.model in ("", event.model):
                    yield pb.WatchModelsResponse(
                        event=event.event,
                        model=self._model(call, event.model),
                        version=event.version,
                        reason=self._registry.reason(event.reason, call.principal),
                        time=timestamp(event.time),
                    )

    def _model(self, call: Call, name: str) -> pb.Model:
        return message(self._registry.view(name, call.principal))


def timestamp(seconds: float) -> Timestamp:
    """Seconds since the epoch."""
    out = Timestamp()
    out.FromNanoseconds(int(seconds * 1e9))
    return out


def message(view: ModelView) -> pb.Model:
    """A model in the contract's words."""
    out = pb.Model(
        name=view.name,
        task=TASKS[view.task],
        description=view.description,
        versions=[_version(v) for v in view.versions],
        aliases=view.routing.aliases,
        is_default=view.is_default,
    )
    for version, weight in sorted(view.routing.shares.items()):
        out.traffic.add(version=version, weight=weight)
    if view.routing.shadow is not None:
        out.shadow.version, out.shadow.fraction = view.routing.shadow
    return out


def _version(view: VersionView) -> pb.ModelVersion:
    out = pb.ModelVersion(version=view.version, state=STATES[view.state], reason=view.reason)
    loaded = view.loaded
    if loaded is None:
        return out
    manifest = loaded.manifest
    out.precision = manifest.precision
    out.memory_bytes = loaded.memory_bytes
    out.providers.extend(loaded.providers)
    out.loaded_at.CopyFrom(timestamp(loaded.loaded_at))
    for name, value in manifest.number_metrics.items():
        out.metrics[name] = value
    out.dimensions = manifest.embedding.dimensions if manifest.embedding else 0
    out.max_tokens = manifest.max_tokens or 0
    out.labels.extend(manifest.labels)
    return out
