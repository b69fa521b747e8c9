"""The model repository: which versions there are, which are loaded, and where names lead.

Lives on one event loop; only `resolve_loaded` and `shadow` are called from other threads, and they
read dictionaries that are replaced as a whole. Loads run in threads.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from forebay.errors import FailedPrecondition, ForebayError, NotFound, Unavailable

from forebay_server.core.batcher import BatchReport
from forebay_server.core.interfaces import EngineRequest
from forebay_server.repository import routing
from forebay_server.repository.loading import Defaults, LoadedModel, load, trim
from forebay_server.repository.manifest import Manifest, ModelConfig, read_config
from forebay_server.repository.scan import FolderModel, scan
from forebay_server.repository.state import HistoryEvent, RepositoryState, Routing

log = logging.getLogger("forebay.repository")

#: Seconds between taking a version out of the routes and closing it: calls that have resolved it
#: are on their way to its queue.
GRACE_S = 0.5
#: Weight that an engine's files take in memory, for the budget, before it is loaded.
MEMORY_FACTOR = 1.3
Key = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Event:
    """A change of the repository, for watchers."""

    event: str
    model: str
    version: int = 0
    reason: str = ""
    time: float = 0.0


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a version does not serve, and the state of its folder then."""

    reason: str
    mark: float


class ModelRepository:
    """See the module.

    Args:
        root: folder of model folders.
        defaults: for models whose model.yaml does not say.
        state: aliases, traffic, history.
        memory_budget_bytes: of all loaded models; 0 = no bound.
        observer: gives the batch observer of a version, for metrics.
    """

    def __init__(
        self,
        root: Path,
        defaults: Defaults,
        state: RepositoryState,
        memory_budget_bytes: int = 0,
        observer: Callable[[str, int], Callable[[BatchReport], None] | None] = lambda m, v: None,
    ) -> None:
        self.root = root
        self._defaults = defaults
        self._state = state
        self._budget = memory_budget_bytes
        self._observer = observer
        self._folders: dict[str, FolderModel] = {}
        self._configs: dict[str, ModelConfig] = {}
        self._config_faults: dict[str, str] = {}
        self.routings: dict[str, Routing] = {}
        self.loaded: dict[Key, LoadedModel] = {}
        self.failures: dict[Key, Failure] = {}
        self._loading: dict[Key, asyncio.Task[LoadedModel]] = {}
        self._unloading: set[Key] = set()
        self._stopped: set[str] = set()
        self._tasks: dict[str, str] = {}
        self._watchers: set[asyncio.Queue[Event]] = set()
        self._exclusive = asyncio.Lock()
        #: Set by the server when all of it serves, what was stored included.
        self.started = False

    # Life.

    async def start(self) -> None:
        """Read state and folders, load what is to be preloaded. A bad model hurts no other."""
        self.routings = await self._state.load()
        await self.refresh(first=True)
        gc.collect()
        gc.freeze()  # what was made at start lives as long as the server: no need to look at it again
        # Calls leave hardly a cycle behind; looking for them every 700 objects cost 3% of the time.
        gc.set_threshold(50_000, 20, 20)
        trim()

    async def close(self, timeout_s: float = 10.0) -> None:
        """Drain and unload everything."""
        for task in self._loading.values():
            task.cancel()
        models, self.loaded = list(self.loaded.values()), {}
        await asyncio.gather(*(asyncio.to_thread(m.client.close, timeout_s) for m in models))

    async def watch_folder(self, every_s: float) -> None:
        """Refresh for ever: new versions are loaded when they appear."""
        while True:
            await asyncio.sleep(every_s)
            try:
                await self.refresh()
            except Exception:
                log.exception("refreshing the model repository failed")

    async def refresh(self, first: bool = False) -> None:
        """Read the folders anew; load versions that should serve and do not."""
        self._read_folders(await asyncio.to_thread(scan, self.root))
        for name, folder in self._folders.items():
            config = self._configs.get(name)
            if config is None or name in self._stopped:
                continue
            if first:
                for alias, version in config.aliases.items():
                    self._routing(name).aliases.setdefault(alias, version)
            serving = any(k[0] == name for k in self.loaded)
            if not (config.execution.preload or serving):
                continue
            for version in self._wanted(folder, config):
                key = (name, version)
                if key in self.loaded or self._known_bad(key, folder):
                    continue
                try:
                    await self._load(key)
                except ForebayError as e:
                    log.error("model %s@%d is not served: %s", name, version, e.message)
            await self._retire(name)
        for name in {k[0] for k in self.loaded} - set(self._folders):
            await self.unload(name, None)

    def _read_folders(self, found: dict[str, FolderModel]) -> None:
        configs: dict[str, ModelConfig] = {}
        faults: dict[str, str] = {}
        for name, folder in found.items():
            try:
                configs[name] = read_config(folder.folder / "model.yaml")
            except ForebayError as e:
                if faults.get(name) != e.message:
                    log.error("model %s: %s", name, e.message)
                faults[name] = e.message
        self._folders, self._configs, self._config_faults = found, configs, faults

    def _wanted(self, folder: FolderModel, config: ModelConfig) -> list[int]:
        """Versions that should be loaded, by policy and by what points to them."""
        have = sorted(folder.versions)
        policy = config.version_policy
        if policy == "all":
            wanted = set(have)
        elif policy == "latest":
            wanted = {have[-1]}
        else:
            wanted = {v for v in policy if v in folder.versions}
        return sorted(wanted | (self._routing(folder.name).versions & set(have)))

    def _known_bad(self, key: Key, folder: FolderModel) -> bool:
        failure = self.failures.get(key)
        return failure is not None and failure.mark == _mark(folder.versions[key[1]])

    async def _retire(self, name: str) -> None:
        """Unload versions that the policy no longer wants, once their successor serves."""
        config, folder = self._configs[name], self._folders[name]
        wanted = set(self._wanted(folder, config))
        if not any((name, v) in self.loaded for v in wanted):
            return
        for key in [k for k in self.loaded if k[0] == name and k[1] not in wanted]:
            await self._unload(key)

    # Loading and unloading.

    async def load(self, name: str, version: int | None) -> None:
        """Load a version, or what the policy says. Raises why it could not be loaded."""
        await self.refresh_folders()
        folder = self._folder(name)
        self._stopped.discard(name)
        wanted = [version] if version else self._wanted(folder, self._config(name))
        for one in wanted:
            if one not in folder.versions:
                raise NotFound("model version", f"{name}@{one}", nearest=self._refs(folder))
            self.failures.pop((name, one), None)
            if (name, one) not in self.loaded:
                await self._load((name, one))
        if version is None:
            await self._retire(name)

    async def unload(self, name: str, version: int | None) -> None:
        """Unload a version, or all. They stay unloaded until loaded by name or by a call."""
        folder = self._folders.get(name)
        if folder is None and not any(k[0] == name for k in self.loaded):
            raise NotFound("model", name, nearest=routing.nearest(name, self._folders))
        if version is not None and folder is not None and version not in folder.versions:
            raise NotFound("model version", f"{name}@{version}", nearest=self._refs(folder))
        if version is None:
            self._stopped.add(name)
        keys = [k for k in self.loaded if k[0] == name and version in (None, k[1])]
        await asyncio.gather(*(self._unload(k) for k in keys))

    async def refresh_folders(self) -> None:
        """See new folders without loading anything."""
        self._read_folders(await asyncio.to_thread(scan, self.root))

    async def _load(self, key: Key) -> LoadedModel:
        """Load once, however many wait for it."""
        task = self._loading.get(key)
        if task is None:
            task = asyncio.create_task(self._load_now(key))
            self._loading[key] = task
            task.add_done_callback(lambda _: self._loading.pop(key, None))
        return await asyncio.shield(task)

    async def _load_now(self, key: Key) -> LoadedModel:
        name, version = key
        folder = self._folder(name).versions[version]
        self._publish("loading", name, version)
        try:
            async with self._exclusive:  # two loads at once would both see the same free memory
                await self._make_room(key, folder)
                model = await asyncio.to_thread(
                    load, name, version, folder, self._config(name), self._defaults, self._observer
                )
        except ForebayError as e:
            self.failures = {**self.failures, key: Failure(e.message, _mark(folder))}
            self._publish("failed", name, version, e.message)
            raise
        model.last_used = time.monotonic()
        self.failures = {k: v for k, v in self.failures.items() if k != key}
        self.loaded = {**self.loaded, key: model}
        self._tasks[name] = model.manifest.task
        self._publish("loaded", name, version)
        return model

    async def _unload(self, key: Key) -> None:
        model = self.loaded.get(key)
        if model is None:
            return
        self._unloading.add(key)
        self.loaded = {k: m for k, m in self.loaded.items() if k != key}
        await asyncio.sleep(GRACE_S)
        await asyncio.to_thread(model.client.close)
        self._unloading.discard(key)
        self._publish("unloaded", *key)

    async def _make_room(self, key: Key, folder: Path) -> None:
        """Evict models that were not used for longest, until the new one fits the budget."""
        if not self._budget:
            return
        need = int(sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) * MEMORY_FACTOR)
        while self.memory_bytes() + need > self._budget:
            idle = [
                m
                for m in self.loaded.values()
                if not m.config.execution.preload and (m.name, m.version) != key
            ]
            if not idle:
                raise FailedPrecondition(
                    f"{key[0]}@{key[1]} needs about {need} bytes; {self.memory_bytes()} of the "
                    f"budget of {self._budget} are taken by models that may not be evicted",
                    reason="MEMORY_BUDGET",
                )
            oldest = min(idle, key=lambda m: m.last_used)
            log.info("evicting %s@%d for %s@%d", oldest.name, oldest.version, *key)
            await self._unload((oldest.name, oldest.version))

    def memory_bytes(self) -> int:
        """Resident bytes of all loaded models."""
        return sum(m.memory_bytes for m in self.loaded.values())

    # Resolving.

    def resolve_loaded(self, ref: str, tasks: Sequence[str], key: str) -> LoadedModel | None:
        """The version that a reference means, None when it has to be loaded first.

        Raises:
            NotFound: no such model, version or alias; names the nearest.
            FailedPrecondition: WRONG_TASK.
            Unavailable: it cannot be loaded; says why.
        """
        name, version = self._find(ref, tasks, key)
        model = self._serving(name, version)
        if model is None:
            self._refuse_failed(name, version)
            return None
        self._check_task(model.name, model.manifest.task, tasks)
        model.last_used = time.monotonic()
        return model

    def splits(self, ref: str) -> bool:
        """Whether traffic is split over versions for some model that the reference may mean."""
        return any(r.shares for n, r in self.routings.items() if not ref or ref.startswith(n))

    async def resolve(self, ref: str, tasks: Sequence[str], key: str) -> LoadedModel:
        """As resolve_loaded, and loads the version when need be."""
        model = self.resolve_loaded(ref, tasks, key)
        if model is not None:
            return model
        name, version = self._find(ref, tasks, key)
        folder = self._folder(name)
        wanted = version or max(self._wanted(folder, self._config(name)))
        if wanted not in folder.versions:
            raise NotFound("model version", f"{name}@{wanted}", nearest=self._refs(folder))
        try:
            model = await self._load((name, wanted))
        except FailedPrecondition as e:
            raise Unavailable(
                f"model {name}@{wanted} cannot be loaded: {e.message}",
                reason="MODEL_NOT_READY",
                retry_after_s=5.0,
            ) from None
        self._check_task(name, model.manifest.task, tasks)
        return model

    def _find(self, ref: str, tasks: Sequence[str], key: str) -> tuple[str, int | None]:
        if not ref:
            ref = self._default(tasks)
        name, selector = routing.parse(ref)
        if name not in self._folders and not selector:
            name, selector = routing.parse(routing.by_alias(name, self.routings) or name)
        folder = self._folders.get(name)
        if folder is None:
            raise NotFound("model", name, nearest=routing.nearest(name, self._folders))
        found = self._routing(name)
        return name, routing.select(name, selector, folder.versions, found, key)

    def _default(self, tasks: Sequence[str]) -> str:
        """The model that answers requests without a name: by model.yaml, else the only one."""
        for task in tasks:
            named = [n for n, c in self._configs.items() if task in c.default_for]
            if named:
                return sorted(named)[0]
        for task in tasks:
            only = [n for n, t in self._tasks.items() if t == task]
            if len(only) == 1:
                return only[0]
        raise NotFound("default model", " or ".join(tasks), nearest=sorted(self._folders)[:5])

    def _serving(self, name: str, version: int | None) -> LoadedModel | None:
        loaded = self.loaded
        if version is not None:
            return loaded.get((name, version))
        ready = [k[1] for k in loaded if k[0] == name]
        return loaded.get((name, max(ready))) if ready else None

    def _refuse_failed(self, name: str, version: int | None) -> None:
        """Do not load again and again what has just failed: a refresh sees a mended folder."""
        if name in self._config_faults:
            raise Unavailable(
                f"model {name!r} cannot be loaded: {self._config_faults[name]}",
                reason="MODEL_NOT_READY",
            )
        folder = self._folders[name]
        wanted = version or max(folder.versions)
        failure = self.failures.get((name, wanted))
        if failure is not None:
            raise Unavailable(
                f"model {name}@{wanted} cannot be loaded: {failure.reason}",
                reason="MODEL_NOT_READY",
                retry_after_s=5.0,
            )

    def _check_task(self, name: str, task: str, tasks: Sequence[str]) -> None:
        if task in tasks:
            return
        fitting = sorted(n for n, t in self._tasks.items() if t in tasks)
        hint = f"; models for it are {', '.join(fitting)}" if fitting else ""
        raise FailedPrecondition(
            f"model {name!r} does {task}; this call needs {' or '.join(tasks)}{hint}",
            reason="WRONG_TASK",
            metadata={"task": task},
        )

    def shadow(self, model: LoadedModel, requests: Sequence[EngineRequest]) -> None:
        """Send a copy of a fraction of the requests to the shadow version; answers are dropped."""
        found = self.routings.get(model.name)
        if found is None or found.shadow is None or found.shadow[0] == model.version:
            return
        version, fraction = found.shadow
        other = self.loaded.get((model.name, version))
        if other is None:
            return
        copies = [
            EngineRequest(r.items, r.request_id, r.deadline, priority=-1)
            for r in requests
            if random.random() < fraction
        ]
        if copies:
            other.shadow_calls += len(copies)
            other.client.submit(copies)

    # Routing.

    def _routing(self, name: str) -> Routing:
        found = self.routings.get(name)
        if found is None:
            found = Routing()
            self.routings = {**self.routings, name: found}
        return found

    async def set_alias(self, name: str, alias: str, version: int | None) -> None:
        """Point an alias to a version (loaded first, so that no call waits), or remove it."""
        if version is not None:
            await self._ready(name, version)
        elif alias not in self._routing(name).aliases:
            raise NotFound("model alias", f"{name}@{alias}")
        await self._state.set_alias(name, alias, version)
        aliases = dict(self._routing(name).aliases)
        aliases.pop(alias, None)
        if version is not None:
            aliases[alias] = version
        self._replace(name, aliases=aliases)
        self._publish("alias", name, version or 0)

    async def set_traffic(
        self, name: str, shares: dict[int, int], shadow: tuple[int, float] | None
    ) -> None:
        """Replace a model's split and shadow. Every version named is loaded first."""
        self._folder(name)
        for version in {*shares, *([shadow[0]] if shadow else [])}:
            await self._ready(name, version)
        await self._state.set_traffic(name, shares, shadow)
        self._replace(name, shares=shares, shadow=shadow)
        self._publish("traffic", name)

    async def promote(self, name: str, version: int, key_id: str, action: str = "promote") -> None:
        """Make a version the production one."""
        await self._ready(name, version)
        before = self._routing(name).aliases.get(routing.PRODUCTION, 0)
        event = HistoryEvent(time.time(), action, before, version, key_id)
        await self._state.promote(name, event)
        aliases = {**self._routing(name).aliases, routing.PRODUCTION: version}
        self._replace(name, aliases=aliases)
        self._publish("alias", name, version)

    async def rollback(self, name: str, key_id: str) -> None:
        """Back to the version that was production before the newest promotion still in force."""
        self._folder(name)
        stack: list[int] = []
        for event in reversed(await self._state.history(name)):
            if event.action == "rollback" and stack:
                stack.pop()
            elif event.action == "promote":
                stack.append(event.from_version)
        if not stack or stack[-1] == 0:
            raise FailedPrecondition(
                f"model {name!r} has no earlier production version", reason="NOTHING_TO_ROLL_BACK"
            )
        await self.promote(name, stack[-1], key_id, "rollback")

    async def history(self, name: str) -> list[HistoryEvent]:
        """Steps of the production alias, newest first."""
        return await self._state.history(name)

    async def _ready(self, name: str, version: int) -> None:
        await self.refresh_folders()
        folder = self._folder(name)
        if version not in folder.versions:
            raise NotFound("model version", f"{name}@{version}", nearest=self._refs(folder))
        if (name, version) not in self.loaded:
            await self._load((name, version))

    def _replace(self, name: str, **changes: object) -> None:
        old = self._routing(name)
        fields = {"aliases": old.aliases, "shares": old.shares, "shadow": old.shadow, **changes}
        self.routings = {**self.routings, name: Routing(**fields)}  # type: ignore[arg-type]

    # Looking.

    def folders(self) -> dict[str, FolderModel]:
        """Models of the repository, loaded or not."""
        return self._folders

    def config(self, name: str) -> ModelConfig:
        """A model's model.yaml; the defaults when it cannot be read."""
        return self._configs.get(name, ModelConfig())

    def state_of(self, key: Key) -> tuple[str, str]:
        """State of a version (available, loading, ready, unloading, failed) and why."""
        if key in self.loaded:
            return "ready", ""
        if key in self._loading:
            return "loading", ""
        if key in self._unloading:
            return "unloading", ""
        if key[0] in self._config_faults:
            return "failed", self._config_faults[key[0]]
        failure = self.failures.get(key)
        return ("failed", failure.reason) if failure else ("available", "")

    def task_of(self, name: str) -> str:
        """A model's task, as far as it is known without loading it."""
        if name not in self._tasks:
            folder = self._folders.get(name)
            newest = folder.versions[max(folder.versions)] if folder else None
            if newest is not None and (newest / "manifest.json").exists():
                from forebay_server.repository.manifest import read_manifest

                try:
                    self._tasks[name] = read_manifest(newest / "manifest.json").task
                except ForebayError:
                    return ""
        return self._tasks.get(name, "")

    def manifest_of(self, key: Key) -> Manifest | None:
        """The manifest of a loaded version."""
        model = self.loaded.get(key)
        return model.manifest if model else None

    async def events(self) -> AsyncIterator[Event]:
        """Changes from now on. A watcher that falls 1000 behind loses the oldest."""
        queue: asyncio.Queue[Event] = asyncio.Queue(1000)
        self._watchers.add(queue)
        try:
            while True:
                yield await queue.get()
        finally:
            self._watchers.discard(queue)

    def _publish(self, event: str, model: str, version: int = 0, reason: str = "") -> None:
        for queue in self._watchers:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(Event(event, model, version, reason, time.time()))

    def _folder(self, name: str) -> FolderModel:
        folder = self._folders.get(name)
        if folder is None:
            raise NotFound("model", name, nearest=routing.nearest(name, self._folders))
        return folder

    def _config(self, name: str) -> ModelConfig:
        if name in self._config_faults:
            raise FailedPrecondition(self._config_faults[name], reason="MODEL_REJECTED")
        return self._configs[name]

    def _refs(self, folder: FolderModel) -> list[str]:
        return [f"{folder.name}@{v}" for v in sorted(folder.versions)[-3:]]


def _mark(folder: Path) -> float:
    """Changes when a file of the folder changes."""
    return max((p.stat().st_mtime for p in folder.rglob("*")), default=0.0) + len(
        list(folder.rglob("*"))
    )
