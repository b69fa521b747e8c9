"""Where a call goes: the version that its reference means, and the shadow that computes it too.

`resolve_loaded`, `splits` and `shadow` are called from any thread, for every batch of calls: they
only read, and what they read is replaced as a whole.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from math import inf

from forebay.errors import FailedPrecondition, ForebayError, NotFound, Unavailable

from forebay_server.core.interfaces import EngineRequest
from forebay_server.repository.catalogue import Catalogue
from forebay_server.repository.explain import without_folders
from forebay_server.repository.loading import LoadedModel
from forebay_server.repository.pool import ModelPool, retry_s
from forebay_server.repository.routing import by_alias, parse, select, some
from forebay_server.repository.routing_table import NOWHERE, RoutingTable

MayUse = Callable[[str], bool]


def any_model(_: str) -> bool:
    """Of callers that are not limited to some models."""
    return True


class Resolver:
    """See the module."""

    def __init__(self, catalogue: Catalogue, pool: ModelPool, routing: RoutingTable) -> None:
        self._catalogue = catalogue
        self._pool = pool
        self._routing = routing

    def resolve_loaded(
        self, ref: str, tasks: Sequence[str], key: str, may_use: MayUse = any_model
    ) -> LoadedModel | None:
        """The version that a reference means, None when it has to be loaded first.

        Args:
            key: what keeps a caller on one version.
            may_use: whether the caller may use a model: only such are named where another is meant.

        Raises:
            NotFound: no such model, version or alias; names the nearest.
            FailedPrecondition: WRONG_TASK; MODEL_REJECTED: it cannot be loaded until it is mended.
            Unavailable: MODEL_NOT_READY, it found no room; RetryInfo says when to come again.
        """
        name, version = self._find(ref, tasks, key)
        model = self._serving(name, version)
        if model is None:
            self._refuse_failed(name, version)
            return None
        self._check_task(model.name, model.manifest.task, tasks, may_use)
        model.last_used = time.monotonic()
        return model

    async def resolve(
        self, ref: str, tasks: Sequence[str], key: str, may_use: MayUse = any_model
    ) -> LoadedModel:
        """As resolve_loaded, and loads the version when need be. On the repository's loop only."""
        model = self.resolve_loaded(ref, tasks, key, may_use)
        if model is not None:
            return model
        name, version = self._find(ref, tasks, key)
        folder = self._catalogue.folder(name)
        at = name
        try:
            wanted = version or max(
                folder.served(self._catalogue.config(name), self._routing.of(name))
            )
            at = f"{name}@{wanted}"
            folder.require(wanted)
            model = await self._pool.load((name, wanted))
        except (FailedPrecondition, Unavailable) as e:
            raise self._refusal(at, e.message, retry_s(e)) from None
        self._check_task(name, model.manifest.task, tasks, may_use)
        return model

    def splits(self, ref: str) -> bool:
        """Whether traffic is split over versions for some model that the reference may mean."""
        routings = self._routing.by_model
        return any(r.shares for n, r in routings.items() if not ref or ref.startswith(n))

    def shadowed(self, model: LoadedModel) -> bool:
        """Whether some of a version's requests go to a shadow too."""
        found = self._routing.by_model.get(model.name)
        return found is not None and found.shadow is not None and found.shadow[0] != model.version

    def shadow(self, model: LoadedModel, requests: Sequence[EngineRequest]) -> None:
        """Send a copy of a fraction of the requests to the shadow version; answers are dropped."""
        found = self._routing.by_model.get(model.name)
        if found is None or found.shadow is None or found.shadow[0] == model.version:
            return
        version, fraction = found.shadow
        other = self._pool.loaded.get((model.name, version))
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

    def _find(self, ref: str, tasks: Sequence[str], key: str) -> tuple[str, int | None]:
        if not ref:
            ref = self._default(tasks)
        name, selector = parse(ref)
        routings = self._routing.by_model
        if name not in self._catalogue.folders and not selector:
            name, selector = parse(by_alias(name, routings) or name)
        versions = self._catalogue.folder(name).versions
        return name, select(name, selector, versions, routings.get(name, NOWHERE), key)

    def _default(self, tasks: Sequence[str]) -> str:
        """The model that answers requests without a name: by model.yaml, else the only one."""
        for task in tasks:
            named = [n for n, c in self._catalogue.configs.items() if task in c.default_for]
            if named:
                return sorted(named)[0]
        for task in tasks:
            only = [n for n, t in self._catalogue.tasks.items() if t == task]
            if len(only) == 1:
                return only[0]
        fitting = sorted(n for n, t in self._catalogue.tasks.items() if t in tasks)
        what = " or ".join(tasks)
        text = f"the call names no model, and no default model is set for {what}; "
        if fitting:
            listed = ", ".join(some(fitting))
            name = self._catalogue.tasks[fitting[0]]
            text += (
                f"name one of {listed}, or put `default_for: [{name}]` into the model.yaml of one"
            )
        else:
            text += "no model here is for that task: add one to the model repository"
        raise NotFound("default model", what, message=text)

    def _serving(self, name: str, version: int | None) -> LoadedModel | None:
        loaded = self._pool.loaded
        if version is not None:
            return loaded.get((name, version))
        ready = [k[1] for k in loaded if k[0] == name]
        return loaded.get((name, max(ready))) if ready else None

    def _refuse_failed(self, name: str, version: int | None) -> None:
        """Do not load again and again what has just failed: a refresh sees a mended folder."""
        faults = self._catalogue.faults
        if name in faults:
            raise self._refusal(name, faults[name])
        wanted = version or max(self._catalogue.folders[name].versions)
        failure = self._pool.failures.get((name, wanted))
        if failure is not None and (left := failure.again - time.monotonic()) > 0:
            raise self._refusal(f"{name}@{wanted}", failure.reason, left)

    def _is_broken(self, name: str) -> bool:
        folder = self._catalogue.folders.get(name)
        if folder is None or name in self._catalogue.faults:
            return True
        failed = (name, max(folder.versions)) in self._pool.failures
        return failed and self._serving(name, None) is None

    def _refusal(self, at: str, reason: str, wait_s: float = inf) -> ForebayError:
        """What a call hears of a model that cannot be loaded. The log has the paths, and the registry."""
        said = without_folders(reason, self._catalogue.root)
        if wait_s < inf:
            return Unavailable(
                f"model {at} cannot be loaded now: {said}",
                reason="MODEL_NOT_READY",
                retry_after_s=wait_s,
            )
        return FailedPrecondition(
            f"model {at} cannot be served until it is mended: {said}", reason="MODEL_REJECTED"
        )

    def _check_task(self, name: str, task: str, tasks: Sequence[str], may_use: MayUse) -> None:
        if task in tasks:
            return
        known = self._catalogue.tasks.items()
        fitting = [n for n, t in known if t in tasks and may_use(n) and not self._is_broken(n)]
        hint = f"; models for it are {', '.join(some(fitting))}" if fitting else ""
        raise FailedPrecondition(
            f"model {name!r} does {task}; this call needs {' or '.join(tasks)}{hint}",
            reason="WRONG_TASK",
            metadata={"task": task},
        )
