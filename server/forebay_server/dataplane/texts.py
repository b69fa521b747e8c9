"""The way of every text task: resolve, tokenise as one batch, look into the cache, submit, answer.

`TextPipeline.run` takes the jobs of all calls that arrived together. It never waits: a job whose
model is still to be loaded goes on when the load is done, and each call is answered by the thread
that finished its own last item.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from forebay.errors import InvalidArgument, TooLarge
from numpy.typing import NDArray

from forebay_server.core.call import Call
from forebay_server.core.interfaces import BACKGROUND_PRIORITY, Completion, EngineRequest, Item
from forebay_server.dataplane.models import (
    ItemCache,
    ModelAccess,
    ServedModel,
    attempt,
    guarded,
    located,
)
from forebay_server.dataplane.tokenization import Encoded, TextInput, Truncate


@dataclass(slots=True)
class TextOutcome:
    """What the model said to one job's inputs.

    Attributes:
        rows: one float32 array per input, in order: a vector, or logits.
        tokens, original, truncated: per input; `original` is the length before truncation.
    """

    model: ServedModel
    rows: list[NDArray[np.float32]]
    tokens: list[int]
    original: list[int]
    truncated: list[bool]


@dataclass(slots=True)
class TextJob:
    """One call's texts on their way.

    Attributes:
        ref: the request's model reference; empty = the default of the first task.
        tasks: tasks that the model may have.
        inputs: the inputs, given the model (prompts and hypotheses depend on it).
        path: name of the request field that the inputs come from, for errors: `texts`.
        path_of: index of the request's element for input i, where they are not the same.
        done: gets the outcome, on the thread that completed it; answers the call.
    """

    call: Call
    ref: str
    tasks: Sequence[str]
    inputs: Callable[[ServedModel], Sequence[TextInput]]
    done: Callable[[TextOutcome], None]
    truncate: Truncate = "end"
    sticky_key: str = ""
    path: str = "texts"
    path_of: Callable[[int], str] | None = None
    _inputs: Sequence[TextInput] = field(default_factory=list)

    def path_at(self, i: int) -> str:
        """Path of input i in the request."""
        return self.path_of(i) if self.path_of else f"{self.path}[{i}]"


class TextPipeline:
    """See the module. One per server."""

    def __init__(self, access: ModelAccess, cache: ItemCache, max_items: int) -> None:
        self._access = access
        self._cache = cache
        self._max_items = max_items

    def run(self, jobs: Sequence[TextJob]) -> None:
        """Start all jobs. Errors end their own calls."""
        ready: dict[int, tuple[ServedModel, list[TextJob]]] = {}
        for job in jobs:
            model = self._access.resolve(
                job.call, job.ref, job.tasks, job.sticky_key, lambda m, j=job: self._start(m, [j])
            )
            if model is not None:
                ready.setdefault(id(model), (model, []))[1].append(job)
        for model, group in ready.values():
            self._start(model, group)

    def _inputs_of(self, job: TextJob, model: ServedModel) -> Sequence[TextInput]:
        inputs = job.inputs(model)
        if len(inputs) > self._max_items:
            raise TooLarge(job.path, size=len(inputs), limit=self._max_items, unit="items")
        return inputs

    def _start(self, model: ServedModel, jobs: list[TextJob]) -> None:
        """Tokenise the jobs of one model as one batch and submit them."""
        live, inputs, truncate, paths = [], [], [], []
        for job in jobs:
            # Cached answers are given however full the queue is; nothing else is tokenised in vain.
            if not model.cache_enabled and self._access.refused(model, job.ref, [job.call]):
                continue
            found = attempt(job.call, partial(self._inputs_of, job, model))
            if found is None:
                continue
            job._inputs = found
            live.append(job)
            inputs.extend(job._inputs)
            truncate.extend([job.truncate] * len(job._inputs))
            paths.extend(job.path_at(i) for i in range(len(job._inputs)))
        if not live:
            return
        encoded = model.encoder.encode(inputs, truncate, paths)
        at = 0
        runs: list[_Run] = []
        for job in live:
            part = encoded[at : at + len(job._inputs)]
            at += len(part)
            bad = [e for e in part if isinstance(e, InvalidArgument)]
            if bad:
                job.call.fail(InvalidArgument([v for e in bad for v in e.violations]))
            else:
                runs.append(_Run(self, model, job, part))  # type: ignore[arg-type]
        self._submit(model, runs)

    def _submit(self, model: ServedModel, runs: list[_Run]) -> None:
        waiting: list[_Run] = []
        for run in runs:
            run.look_up(self._cache)
            if run.missing:
                waiting.append(run)
            else:
                run.answer()
        requests = [run.request() for run in waiting]
        for run, completion in zip(waiting, self._access.submit(model, requests), strict=True):
            run.job.call.on_cancel(completion.cancel)
            completion.add_done_callback(run.completed)


class _Run:
    """One job with its tokens, between tokenizer and answer."""

    __slots__ = ("cache", "encoded", "job", "keys", "missing", "model", "rows")

    def __init__(
        self, pipeline: TextPipeline, model: ServedModel, job: TextJob, encoded: list[Encoded]
    ) -> None:
        self.cache = pipeline._cache
        self.model = model
        self.job = job
        self.encoded = encoded
        self.rows: list[NDArray[np.float32] | None] = [None] * len(encoded)
        self.missing: Sequence[int] = range(len(encoded))
        self.keys: list[bytes] | None = None
        facts = job.call.facts
        facts.model, facts.version = model.name, model.version
        facts.items = len(encoded)
        facts.tokens = sum(len(e.tokens.ids) for e in encoded)
        facts.truncated = sum(e.truncated for e in encoded)

    def look_up(self, cache: ItemCache) -> None:
        """Take from the cache what is there. Keys hold the version and the very token ids."""
        if not self.model.cache_enabled or not cache.enabled:
            return
        self.keys = [cache_key(e, self.model.artefact) for e in self.encoded]
        found = cache.get_many(self.model.name, self.model.version, self.keys)
        for i, value in enumerate(found):
            if value is not None:
                self.rows[i] = np.frombuffer(value, np.float32)
        self.missing = [i for i, row in enumerate(self.rows) if row is None]
        self.job.call.facts.cached = len(self.encoded) - len(self.missing)

    def request(self) -> EngineRequest:
        """What the engine has to compute."""
        items = [
            Item(self.encoded[i].tokens, length=len(self.encoded[i].tokens.ids))
            for i in self.missing
        ]
        call = self.job.call
        return EngineRequest(
            items,
            call.request_id,
            call.deadline,
            priority=BACKGROUND_PRIORITY if call.background else 0,
        )

    def completed(self, completion: Completion) -> None:
        """Runs on the thread that finished the last item."""
        call = self.job.call
        facts, timing = call.facts, completion.timing
        facts.queue_s = timing.queue_s
        facts.compute_s = timing.prepare_s + timing.execute_s + timing.finish_s
        facts.batch_rows = timing.batch_rows
        mine = sum(len(self.encoded[i].tokens.ids) for i in self.missing)
        facts.engine_s = timing.execute_s * min(1.0, mine / max(1, timing.batch_tokens))
        error = completion.error()
        if error is not None:
            failed = completion.failed_item
            where = None if failed is None else self.job.path_at(self.missing[failed])
            call.fail(located(error, where), cause=error)
            return
        for i, row in zip(self.missing, completion.result(), strict=True):
            self.rows[i] = row  # type: ignore[assignment]
        if self.keys is not None:
            fresh = {self.keys[i]: self.rows[i].tobytes() for i in self.missing}  # type: ignore[union-attr]
            self.cache.put_many(self.model.name, self.model.version, fresh)
        self.answer()

    def answer(self) -> None:
        """Hand the outcome over; what goes wrong there ends the call."""
        outcome = TextOutcome(
            self.model,
            self.rows,  # type: ignore[arg-type]
            [len(e.tokens.ids) for e in self.encoded],
            [e.original for e in self.encoded],
            [e.truncated for e in self.encoded],
        )
        guarded(self.job.call, lambda: self.job.done(outcome))


def cache_key(encoded: Encoded, artefact: bytes) -> bytes:
    """Hash of what the model sees, and of the model's files. Truncation is in it: it changes the
    ids."""
    digest = hashlib.blake2b(encoded.tokens.ids.tobytes(), digest_size=16, key=artefact)
    if encoded.tokens.type_ids is not None:
        digest.update(encoded.tokens.type_ids.tobytes())
    return digest.digest()
