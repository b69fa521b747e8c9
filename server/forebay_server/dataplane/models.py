"""From a request's model reference to a model that can be called."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

from forebay.errors import (
    ForebayError,
    Internal,
    InvalidArgument,
    PermissionDenied,
    QueueFull,
)

from forebay_server.core.call import ANONYMOUS, Call, CallFacts, Principal
from forebay_server.core.interfaces import Completion, EngineClient, EngineRequest
from forebay_server.dataplane.tokenization import TextEncoder
from forebay_server.repository import LoadedModel
from forebay_server.repository.manifest import Manifest
from forebay_server.repository.resolver import Resolver

log = logging.getLogger("forebay.dataplane")
T = TypeVar("T")


class ItemCache(Protocol):
    """The response cache, by item. Never across versions."""

    @property
    def enabled(self) -> bool: ...

    def get_many(
        self, model: str, version: int, keys: Sequence[bytes]
    ) -> Sequence[bytes | None]: ...

    def put_many(self, model: str, version: int, values: Mapping[bytes, bytes]) -> None: ...


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class ServedModel:
    """A loaded version with its tokenizer. `encoder` raises for models without texts.

    `artefact` is a hash of the version's files, so that a response cache that outlives the process
    never answers for a version whose files were replaced.
    """

    loaded: LoadedModel
    text_encoder: TextEncoder | None
    artefact: bytes = b""

    @property
    def name(self) -> str:
        return self.loaded.name

    @property
    def version(self) -> int:
        return self.loaded.version

    @property
    def manifest(self) -> Manifest:
        return self.loaded.manifest

    @property
    def client(self) -> EngineClient:
        return self.loaded.client

    @property
    def cache_enabled(self) -> bool:
        return self.loaded.config.cache.enabled

    @property
    def encoder(self) -> TextEncoder:
        """The tokenizer with its limits."""
        if self.text_encoder is None:
            raise Internal(f"model {self.name!r} has no tokenizer")
        return self.text_encoder


class ModelAccess:
    """Resolves references, and submits to engines.

    Args:
        resolver: gives the version that a reference means.
        loop: the event loop that the repository lives on; loads run there.
        executor: threads that go on with calls whose model had to be loaded first.
    """

    def __init__(
        self, resolver: Resolver, loop: asyncio.AbstractEventLoop, executor: Executor
    ) -> None:
        self._resolver = resolver
        self._loop = loop
        self._executor = executor

    def resolve(
        self,
        call: Call,
        ref: str,
        tasks: Sequence[str],
        sticky_key: str,
        then: Callable[[ServedModel], None],
    ) -> ServedModel | None:
        """The model, when it is loaded. Otherwise None: `then` runs after the load, or the call
        is ended with the error."""
        key = _sticky(call, sticky_key)
        try:
            loaded = self._resolver.resolve_loaded(ref, tasks, key, call.principal.may_use)
            if loaded is not None:
                return self._serve(call, loaded)
        except ForebayError as e:
            call.fail(e)
            return None

        async def load() -> ServedModel:
            loaded = await self._resolver.resolve(ref, tasks, key, call.principal.may_use)
            return self._serve(call, loaded)

        self.go_on(call, load(), then)
        return None

    def go_on(self, call: Call, work: Coroutine[Any, Any, T], then: Callable[[T], None]) -> None:
        """Wait for what a call needs on the event loop, then go on with the call on another thread.
        What fails ends the call."""

        async def wait() -> None:
            try:
                found = await work
            except ForebayError as e:
                call.fail(e)
                return
            except Exception as e:  # nobody looks at this task: the call would never end
                log.exception("call %s did not get what it needs", call.request_id)
                call.fail(_internal(call), cause=e)
                return
            self._executor.submit(guarded, call, lambda: then(found))

        asyncio.run_coroutine_threadsafe(wait(), self._loop)

    def common(
        self, calls: Sequence[Call], ref: str, tasks: Sequence[str], sticky_key: str
    ) -> ServedModel | None:
        """The one loaded model that all these calls mean and may use. None where they may differ,
        or where there is something to say: then `resolve` says it to each."""
        principal = calls[0].principal
        if any(c.principal is not principal for c in calls):
            return None
        own = sticky_key or (principal.key_id if principal is not ANONYMOUS else "")
        try:
            if not own and self._resolver.splits(ref):
                return None  # each call draws anew
            loaded = self._resolver.resolve_loaded(ref, tasks, own)
            return None if loaded is None else self._serve(calls[0], loaded)
        except ForebayError:
            return None

    def still(
        self, model: ServedModel, ref: str, tasks: Sequence[str], sticky_key: str, who: Principal
    ) -> bool:
        """Whether a caller's calls mean this model, and it alone: without a split and without a shadow."""
        own = sticky_key or (who.key_id if who is not ANONYMOUS else "")
        if self._resolver.splits(ref) or self._resolver.shadowed(model.loaded):
            return False
        try:
            loaded = self._resolver.resolve_loaded(ref, tasks, own)
        except ForebayError:
            return False
        return loaded is model.loaded and who.may_use(model.name)

    async def resolve_async(
        self, call: Call, ref: str, tasks: Sequence[str], sticky_key: str = ""
    ) -> ServedModel:
        """The model, loaded when need be. For handlers that run on the event loop."""
        key = _sticky(call, sticky_key)
        loaded = await self._resolver.resolve(ref, tasks, key, call.principal.may_use)
        return self._serve(call, loaded)

    def refused(
        self, model: ServedModel, ref: str, calls: Sequence[Call], rows: int = 1, ahead: int = 0
    ) -> bool:
        """Whether the queue would take none of these calls, of so many rows at least; they are ended
        with its word, then. `ahead`: rows of other calls that go before them.

        To be asked before their inputs are made: under overload most of what comes is refused.
        """
        deadlines = [c.deadline for c in calls]
        known = [d for d in deadlines if d is not None]
        latest = max(known) if len(known) == len(deadlines) else None
        full = model.client.refusal(latest, rows, len(calls), ahead)
        if full is None:
            return False
        if isinstance(full, QueueFull) and self._resolver.splits(ref):
            full.holds_s = 0.0  # the next call may draw another version, whose queue is another
        facts = CallFacts(model.name, model.version)
        for call in calls:
            call.facts = facts
            call.fail(full)
        return True

    def submit(self, model: ServedModel, requests: Sequence[EngineRequest]) -> Sequence[Completion]:
        """Queue the requests, and a copy for the shadow version where there is one."""
        if not requests:
            return []
        self._resolver.shadow(model.loaded, requests)
        return model.client.submit(requests)

    def _serve(self, call: Call, loaded: LoadedModel) -> ServedModel:
        if not call.principal.may_use(loaded.name):
            raise PermissionDenied(
                f"this key may not use the model {loaded.name!r}", reason="MODEL_NOT_ALLOWED"
            )
        served = loaded.attachment
        if not isinstance(served, ServedModel):
            served = ServedModel(loaded, _encoder(loaded), artefact_of(loaded))
            loaded.attachment = served
        return served


def _sticky(call: Call, given: str) -> str:
    """What keeps a caller on one version: its word, its key, else nothing (each call anew)."""
    key_id = call.principal.key_id
    return given or (key_id if key_id != ANONYMOUS.key_id else call.request_id)


def artefact_of(loaded: LoadedModel) -> bytes:
    """16 bytes that change with the version's files. Without hashes, with each load."""
    facts = sorted((name, f.sha256) for name, f in loaded.manifest.files.items())
    known = repr(facts) if facts else repr(loaded.loaded_at)
    return hashlib.blake2b(known.encode(), digest_size=16).digest()


def _encoder(loaded: LoadedModel) -> TextEncoder | None:
    limit = loaded.manifest.max_tokens
    if loaded.tokenizer is None or limit is None:
        return None
    type_ids = any(t.name == "token_type_ids" for t in loaded.manifest.inputs)
    return TextEncoder(loaded.tokenizer, limit, type_ids)


def guarded(call: Call, run: Callable[[], None]) -> None:
    """Run a step of a call; whatever it raises ends the call."""
    try:
        run()
    except ForebayError as e:
        call.fail(e)
    except Exception as e:
        log.exception("call %s of %s failed", call.request_id, call.method.path)
        call.fail(_internal(call), cause=e)


def _internal(call: Call) -> Internal:
    return Internal(
        f"internal error; the log has more under request id {call.request_id}",
        metadata={"request_id": call.request_id},
    )


def attempt(call: Call, make: Callable[[], T]) -> T | None:
    """A step's value; None when it failed, which has ended this call and no other."""
    out: list[T] = []
    guarded(call, lambda: out.append(make()))
    return out[0] if out else None


def jobs_of(calls: Sequence[Call], make: Callable[[Call], T]) -> list[T]:
    """One job per call; a call whose job cannot be made is ended alone."""
    made = [attempt(call, partial(make, call)) for call in calls]
    return [job for job in made if job is not None]


def located(error: BaseException, path: str | None) -> ForebayError:
    """An engine's error as the caller sees it: with the path of the item that is to blame."""
    if isinstance(error, InvalidArgument) and path is not None:
        return InvalidArgument.at(path, error.description, reason=error.reason)
    if isinstance(error, ForebayError):
        return error
    return Internal("the model failed on this input", reason="ITEM_FAILED")
