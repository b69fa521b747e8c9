"""The registry's use cases: what there is, how busy it is, loading and unloading."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from typing import Any

from forebay.errors import FailedPrecondition

from forebay_server.core.call import Principal
from forebay_server.core.statistics import EngineStatistics
from forebay_server.engines.process import resident_bytes
from forebay_server.repository import LoadedModel, ModelRepository
from forebay_server.repository.explain import without_folders
from forebay_server.repository.manifest import ModelConfig
from forebay_server.repository.state import Routing

_OIP_STATES = {
    "ready": "READY",
    "loading": "LOADING",
    "unloading": "UNLOADING",
    "failed": "UNAVAILABLE",
    "available": "UNAVAILABLE",
}


@dataclass(frozen=True, slots=True)
class VersionView:
    """One version as the registry shows it; `loaded` is None when it is not."""

    version: int
    state: str
    reason: str
    loaded: LoadedModel | None


@dataclass(frozen=True, slots=True)
class ModelView:
    """One model as the registry shows it. `task` is empty where no file tells it."""

    name: str
    task: str
    description: str
    versions: list[VersionView]
    routing: Routing
    is_default: bool


@dataclass(frozen=True, slots=True)
class StatisticsView:
    """Counters of one loaded version."""

    model: str
    version: int
    statistics: EngineStatistics
    queue_depth: int
    memory_bytes: int


class Registry:
    """See the module."""

    def __init__(self, repository: ModelRepository) -> None:
        self._repository = repository

    @property
    def ready(self) -> bool:
        """Whether the server serves: preloaded models tried, collections and knowledge bases open."""
        return self._repository.started

    def is_ready(self, name: str, version: int | None) -> bool:
        """Whether a version (or any) serves."""
        loaded = self._repository.pool.loaded
        return any(k[0] == name and version in (None, k[1]) for k in loaded)

    def versions(self, name: str) -> list[int]:
        """Versions of a model, oldest first."""
        folder = self._repository.catalogue.folders.get(name)
        return sorted(folder.versions) if folder else []

    def require_version_folders(self, name: str) -> None:
        """Raise when a model's files lie in its own folder: beside a numbered one they would be no
        version any more. Fine for a model that there is not."""
        found = self._repository.catalogue.folders.get(name)
        if found is not None and found.folder in found.versions.values():
            raise FailedPrecondition(
                f"the files of {name}@1 lie in the model's own folder; move them into {name}/1, "
                "then there is room for other versions",
                reason="NO_VERSION_FOLDERS",
            )

    def reason(self, reason: str, asker: Principal) -> str:
        """Why a version does not serve, as a caller may hear it: where its files lie is for keys with
        the admin scope."""
        if "admin" in asker.scopes:
            return reason
        return without_folders(reason, self._repository.catalogue.root)

    def view(self, name: str, asker: Principal) -> ModelView:
        """One model, as a caller may see it. Raises NotFound."""
        catalogue, pool = self._repository.catalogue, self._repository.pool
        folder = catalogue.folder(name)
        config = catalogue.configs.get(name, ModelConfig())  # one that cannot be read says nothing
        versions = []
        for version in sorted(folder.versions, reverse=True):
            state, reason = pool.state_of((name, version))
            loaded = pool.loaded.get((name, version))
            versions.append(VersionView(version, state, self.reason(reason, asker), loaded))
        described = next((v.loaded.manifest.description for v in versions if v.loaded), "")
        return ModelView(
            name,
            catalogue.task_of(name),
            config.description or described,
            versions,
            self._repository.routing.of(name),
            bool(config.default_for),
        )

    def views(self, asker: Principal) -> list[ModelView]:
        """All models, by name."""
        return [self.view(name, asker) for name in sorted(self._repository.catalogue.folders)]

    def index(self, asker: Principal) -> list[tuple[str, int, str, str]]:
        """Name, version, state and reason in the Open Inference Protocol's words."""
        return [
            (m.name, v.version, _OIP_STATES[v.state], v.reason)
            for m in self.views(asker)
            for v in reversed(m.versions)
        ]

    def statistics(self, name: str) -> list[StatisticsView]:
        """Counters of loaded versions of a model, or of all. Raises NotFound."""
        if name:
            self._repository.catalogue.folder(name)
        out = []
        for (model, version), loaded in sorted(self._repository.pool.loaded.items()):
            if name in ("", model):
                stats: Any = loaded.client.stats()
                out.append(
                    StatisticsView(
                        model,
                        version,
                        stats["statistics"],
                        stats["queue_depth"],
                        loaded.memory_bytes,
                    )
                )
        return out

    async def load(self, name: str, version: int | None) -> None:
        """Load; raises why it could not be loaded."""
        await self._repository.load(name, version)

    async def unload(self, name: str, version: int | None) -> tuple[int, int]:
        """Unload; gives resident bytes before and after, of the server and its engines."""
        before = self.resident_bytes()
        await self._repository.unload(name, version)
        return before, self.resident_bytes()

    def resident_bytes(self) -> int:
        """Resident bytes of the server and of its engines' processes."""
        pids = {os.getpid()}
        for model in self._repository.pool.loaded.values():
            pids.update(int(e.info().get("pid", 0)) for e in model.client.engines)
        return sum(resident_bytes(p) for p in pids if p)


async def in_thread(function: Any, *args: Any) -> Any:
    """File work, off the event loop."""
    return await asyncio.to_thread(function, *args)
