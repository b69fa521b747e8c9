"""The versions in memory: each is loaded once; what was not used for longest makes room.

Lives on one event loop; loads run in threads.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable
from dataclasses import dataclass
from math import inf
from pathlib import Path

from forebay.errors import FailedPrecondition, ForebayError

from forebay_server.repository.catalogue import Catalogue
from forebay_server.repository.events import Events
from forebay_server.repository.loading import Defaults, LoadedModel, Observer, load
from forebay_server.repository.manifest import rejected

log = logging.getLogger("forebay.repository")

#: Seconds between taking a version out of the routes and closing it: calls that have resolved it
#: are on their way to its queue.
GRACE_S = 0.5
#: Weight that an engine's files take in memory, for the budget, before it is loaded.
MEMORY_FACTOR = 1.3
#: Seconds until a load that found no room, or failed for what may pass, is tried again by the next call.
RETRY_S = 5.0
#: Model and version.
Key = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a version does not serve, the state of its files then, and from when on (monotonic clock) a call
    may have it tried again though they are as they were; infinite: never."""

    reason: str
    mark: float
    again: float = inf


def retry_s(error: ForebayError) -> float:
    """Seconds after which a load that failed so may succeed. Infinite: not before somebody mends the model."""
    passes = error.code == "UNAVAILABLE"  # as of a process that the machine killed while it loaded
    return RETRY_S if passes or error.reason == "MEMORY_BUDGET" else inf


class ModelPool:
    """See the module. Other threads read `loaded` and `failures`: they are replaced as a whole.

    Args:
        catalogue: where the versions lie.
        events: hears of loads and unloads.
        defaults: for models whose model.yaml does not say.
        budget_bytes: of all loaded models; 0 = no bound.
        observer: gives the batch observer of a version, for metrics.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        events: Events,
        defaults: Defaults,
        budget_bytes: int,
        observer: Observer,
    ) -> None:
        self._catalogue = catalogue
        self._events = events
        self._defaults = defaults
        self._budget = budget_bytes
        self._observer = observer
        self.loaded: dict[Key, LoadedModel] = {}
        self.failures: dict[Key, Failure] = {}
        self._loading: dict[Key, asyncio.Task[LoadedModel]] = {}
        self._unloading: set[Key] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self._exclusive = asyncio.Lock()

    async def load(self, key: Key) -> LoadedModel:
        """A version, loaded if it is not: once, however many wait for it.

        Raises:
            FailedPrecondition: it cannot be loaded, or finds no room; says why.
        """
        model = self.loaded.get(key)
        if model is not None:
            return model
        task = self._loading.get(key)
        if task is None:
            task = asyncio.create_task(self._load(key))
            self._loading[key] = task
            task.add_done_callback(lambda _: self._loading.pop(key, None))
        return await asyncio.shield(task)

    def unload(self, key: Key) -> Awaitable[None]:
        """Take a version out of the routes at once; awaited, until it is closed. Nothing when it is
        not loaded."""
        model = self.loaded.get(key)
        if model is None:
            return asyncio.sleep(0)
        self._unloading.add(key)
        self.loaded = {k: m for k, m in self.loaded.items() if k != key}
        self._events.on_change()
        task = asyncio.create_task(self._close(key, model))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
        return asyncio.shield(task)  # a caller who leaves must not leave the engine behind

    async def _close(self, key: Key, model: LoadedModel) -> None:
        await asyncio.sleep(GRACE_S)
        await asyncio.to_thread(model.client.close)
        self._unloading.discard(key)
        self._events.publish("unloaded", *key)

    async def close(self, timeout_s: float) -> None:
        """Drain and unload everything."""
        for task in self._loading.values():
            task.cancel()
        models, self.loaded = list(self.loaded.values()), {}
        self._events.on_change()
        closing = [asyncio.to_thread(m.client.close, timeout_s) for m in models]
        await asyncio.gather(*closing, *self._closing)

    def forgive_mended(self) -> None:
        """Forget failures of versions whose files, or model.yaml, have changed since or are gone."""
        for key, failure in self.failures.items():
            folder = self._catalogue.folders.get(key[0])
            version = folder.versions.get(key[1]) if folder else None
            if version is None or failure.mark != self._mark(key, version):
                self.forgive(key)

    def forgive(self, key: Key) -> None:
        """Forget that it has failed: calls wait for the next load instead of being refused."""
        self.failures = {k: f for k, f in self.failures.items() if k != key}

    def state_of(self, key: Key) -> tuple[str, str]:
        """State of a version (available, loading, ready, unloading, failed) and why."""
        if key in self.loaded:
            return "ready", ""
        if key in self._loading:
            return "loading", ""
        if key in self._unloading:
            return "unloading", ""
        if key[0] in self._catalogue.faults:
            return "failed", self._catalogue.faults[key[0]]
        failure = self.failures.get(key)
        return ("failed", failure.reason) if failure else ("available", "")

    async def _load(self, key: Key) -> LoadedModel:
        name, version = key
        folder = self._catalogue.folder(name).versions[version]
        self._events.publish("loading", name, version)
        try:
            async with self._exclusive:  # two loads at once would both see the same free memory
                await self._make_room(key, folder)
                config = self._catalogue.config(name)
                model = await asyncio.to_thread(
                    load, name, version, folder, config, self._defaults, self._observer
                )
        except ForebayError as e:
            log.error("model %s@%d is not served: %s", name, version, e.message)
            self._failed(key, folder, e)
            raise
        except Exception as e:  # a bug of ours, or a file that went away: other models go on
            log.exception("loading %s@%d failed", name, version)
            error = rejected(f"loading it failed: {type(e).__name__}: {e}")
            self._failed(key, folder, error)
            raise error from e
        model.last_used = time.monotonic()
        self.forgive(key)
        self.loaded = {**self.loaded, key: model}
        self._events.on_change()
        self._catalogue.learn(name, model.manifest.task)
        self._events.publish("loaded", name, version)
        return model

    def _failed(self, key: Key, folder: Path, error: ForebayError) -> None:
        again = time.monotonic() + retry_s(error)
        failure = Failure(error.message, self._mark(key, folder), again)
        self.failures = {**self.failures, key: failure}
        self._events.publish("failed", *key, error.message)

    def _mark(self, key: Key, folder: Path) -> float:
        """Changes when a file of the version, or the model's model.yaml, changes."""
        found = [*folder.rglob("*"), *(self._catalogue.root / key[0]).glob("model.yaml")]
        return max((p.stat().st_mtime for p in found), default=0.0) + len(found)

    async def _make_room(self, key: Key, folder: Path) -> None:
        """Evict models that were not used for longest, until the new one fits the budget; none when it
        would not."""
        if not self._budget:
            return
        need = int(sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) * MEMORY_FACTOR)
        while self._taken_bytes() + need > self._budget:
            idle = [m for m in self.loaded.values() if not m.config.execution.preload]
            stay = self._taken_bytes() - sum(m.memory_bytes for m in idle)
            if not idle or stay + need > self._budget:
                raise FailedPrecondition(
                    f"{key[0]}@{key[1]} needs about {need} bytes; {stay} of the "
                    f"budget of {self._budget} are taken by models that may not be evicted",
                    reason="MEMORY_BUDGET",
                )
            oldest = min(idle, key=lambda m: m.last_used)
            log.info("evicting %s@%d for %s@%d", oldest.name, oldest.version, *key)
            await self.unload((oldest.name, oldest.version))

    def _taken_bytes(self) -> int:
        return sum(m.memory_bytes for m in self.loaded.values())
