"""The model repository: its parts put together, and which versions it keeps loaded.

Lives on one event loop, but for what `resolver` says of threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
from pathlib import Path

from forebay.errors import ForebayError

from forebay_server.core.allocator import trim
from forebay_server.repository.catalogue import Catalogue
from forebay_server.repository.events import Events
from forebay_server.repository.loading import Defaults, Observer
from forebay_server.repository.pool import ModelPool
from forebay_server.repository.resolver import Resolver
from forebay_server.repository.routing_table import RoutingTable
from forebay_server.repository.state import RepositoryState
from forebay_server.repository.uploads import remove_unfinished

log = logging.getLogger("forebay.repository")


class ModelRepository:
    """See the module.

    Args:
        root: folder of model folders.
        defaults: for models whose model.yaml does not say.
        state: aliases, traffic, history.
        memory_budget_bytes: of all loaded models; 0 = no bound.
        observer: gives the batch observer of a version, for metrics.

    Attributes:
        catalogue: what the folders say.
        pool: the versions in memory.
        routing: where names lead, and what changes it.
        resolver: where a call goes.
        events: for watchers.
        started: set by the server when all of it serves, what was stored included.
    """

    def __init__(
        self,
        root: Path,
        defaults: Defaults,
        state: RepositoryState,
        memory_budget_bytes: int = 0,
        observer: Observer = lambda m, v: None,
    ) -> None:
        self.events = Events()
        self.catalogue = Catalogue(root)
        self.pool = ModelPool(self.catalogue, self.events, defaults, memory_budget_bytes, observer)
        self.routing = RoutingTable(state, self.catalogue, self.pool, self.events)
        self.resolver = Resolver(self.catalogue, self.pool, self.routing)
        self.started = False
        #: Models, and versions, that were unloaded by name: no refresh loads them.
        self._stopped: set[str | tuple[str, int]] = set()
        #: Models whose model.yaml has been asked for aliases: what was removed later stays so.
        self._suggested: set[str] = set()

    async def start(self) -> None:
        """Read state and folders, load what is to be preloaded. A bad model hurts no other."""
        await asyncio.to_thread(remove_unfinished, self.catalogue.root)
        await self.routing.load()
        await self.refresh()
        gc.collect()
        gc.freeze()  # what was made at start lives as long as the server: no need to look at it again
        # Calls leave hardly a cycle behind; looking for them every 700 objects cost 3% of the time.
        gc.set_threshold(50_000, 20, 20)
        trim()

    async def close(self, timeout_s: float = 10.0) -> None:
        """Drain and unload everything."""
        await self.pool.close(timeout_s)

    async def watch_folder(self, every_s: float) -> None:
        """Refresh for ever: new versions are loaded when they appear."""
        while True:
            await asyncio.sleep(every_s)
            try:
                await self.refresh()
            except Exception:
                log.exception("refreshing the model repository failed")

    async def refresh(self) -> None:
        """Read the folders anew; load versions that should serve and do not."""
        await self._read()
        self.pool.forgive_mended()
        # What a call has loaded since is not stopped any more.
        self._stopped -= {*self.pool.loaded, *(name for name, _ in self.pool.loaded)}
        for name, folder in self.catalogue.folders.items():
            config = self.catalogue.configs.get(name)
            if config is None or name in self._stopped:
                continue
            serving = any(k[0] == name for k in self.pool.loaded)
            if not (config.execution.preload or serving):
                continue
            for version in folder.wanted(config, self.routing.of(name)):
                key = (name, version)
                if key in self.pool.loaded or key in self._stopped or key in self.pool.failures:
                    continue
                with contextlib.suppress(ForebayError):  # the log has it, and the index
                    await self.pool.load(key)
            await self._retire(name)
        for name in {k[0] for k in self.pool.loaded} - set(self.catalogue.folders):
            await self.unload(name, None)

    async def _read(self) -> None:
        await self.catalogue.read()
        self._suggested &= set(self.catalogue.folders)
        for name, config in self.catalogue.configs.items():
            if name not in self._suggested:
                self._suggested.add(name)
                self.routing.suggest(name, config.aliases)

    async def load(self, name: str, version: int | None) -> None:
        """Load a version, or what the policy says. Raises why it could not be loaded."""
        await self._read()
        folder = self.catalogue.folder(name)
        self._stopped.discard(name)
        if version:
            wanted = [version]
        else:
            wanted = folder.served(self.catalogue.config(name), self.routing.of(name))
        for one in wanted:
            folder.require(one)
            self._stopped.discard((name, one))
            self.pool.forgive((name, one))
            await self.pool.load((name, one))
        if version is None:
            await self._retire(name)

    async def unload(self, name: str, version: int | None) -> None:
        """Unload a version, or all. They stay unloaded until loaded by name or by a call."""
        mine = [k for k in self.pool.loaded if k[0] == name]
        if name in self.catalogue.folders or not mine:  # the folder of a loaded one may be gone
            folder = self.catalogue.folder(name)
            if version is not None:
                folder.require(version)
        self._stopped.add(name if version is None else (name, version))
        await asyncio.gather(*(self.pool.unload(k) for k in mine if version in (None, k[1])))

    async def _retire(self, name: str) -> None:
        """Unload versions that the policy no longer wants, once their successor serves."""
        wanted = self._wanted(name)
        if not any((name, v) in self.pool.loaded for v in wanted):
            return
        for key in [k for k in self.pool.loaded if k[0] == name and k[1] not in wanted]:
            await self.pool.unload(key)

    def _wanted(self, name: str) -> list[int]:
        folder, config = self.catalogue.folder(name), self.catalogue.config(name)
        return folder.wanted(config, self.routing.of(name))
