"""Evaluations that run by themselves, one after another; kept as files beside the documents.

An evaluation that was cut off by the server's end begins anew at the next start, without the
configurations that it was done with. Where servers share a database and the documents' folder, the
files are the truth: a server says every SAY_EVERY_S, by the file's time, that it carries an
evaluation out; when it has not for SAID_S, another one does.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import os
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import orjson
from forebay.errors import ForebayError, NotFound

from forebay_server.knowledge.bases import Base, KnowledgeBases
from forebay_server.knowledge.evaluating import Result
from forebay_server.knowledge.evaluation import Figure

log = logging.getLogger("forebay.knowledge")
#: Where servers share a folder: how often one says that an evaluation is its own, and how long that
#: holds.
SAY_EVERY_S, SAID_S = 5.0, 30.0
Status = Literal["running", "done", "failed"]


@dataclass(slots=True)
class EvaluationJob:
    """An evaluation. `request` is what its maker sent; `models` what the maker's key may use."""

    id: str
    base_id: int
    name: str
    key_id: str
    models: list[str]
    items: int
    request: bytes
    created_at: float
    status: Status = "running"
    progress: float = 0.0
    message: str = ""
    ended_at: float = 0.0
    results: list[Result] = field(default_factory=list)


#: Carries a job out: adds its results one by one, and calls the function after each and in between.
Execute = Callable[[EvaluationJob, Callable[[], None]], Awaitable[None]]


class EvaluationJobs:
    """See the module. Lives on one event loop."""

    def __init__(self, bases: KnowledgeBases) -> None:
        self._bases = bases
        self._jobs: dict[str, EvaluationJob] = {}
        self._queue: asyncio.Queue[str] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None
        self._running: tuple[str, asyncio.Task[None]] | None = None
        self._saying: asyncio.Task[None] | None = None
        self._ended: set[Path] = set()
        self.execute: Execute | None = None

    @property
    def _shared(self) -> bool:
        """Whether other servers may carry out evaluations too; what ends is not held in memory then."""
        return self._bases.store.owner is not None

    async def start(self) -> None:
        """Read what is kept, go on with what was cut off."""
        if self._shared:
            self._saying = asyncio.create_task(self._say())
        else:
            for base in self._bases.all():
                self._jobs |= self._read(base.row.id)
            for job in sorted(self._jobs.values(), key=lambda j: j.created_at):
                if job.status == "running":
                    self._queue.put_nowait(job.id)
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Stop; what is not done goes on at the next start."""
        for task in (self._saying, self._task):
            if task is not None:
                task.cancel()
                await asyncio.wait({task})

    async def add(
        self, base: Base, name: str, key_id: str, models: list[str], items: int, request: bytes
    ) -> EvaluationJob:
        """Keep and queue an evaluation."""
        job = EvaluationJob(
            secrets.token_hex(8), base.row.id, name, key_id, models, items, request, time.time()
        )
        await asyncio.to_thread(self._keep, job)
        self._jobs[job.id] = job
        self._queue.put_nowait(job.id)
        return job

    async def get(self, base: Base, job_id: str) -> EvaluationJob:
        """The evaluation. Raises NotFound."""
        job = self._jobs.get(job_id)
        if job is None and self._shared:
            job = (await asyncio.to_thread(self._read, base.row.id)).get(job_id)
        if job is None or job.base_id != base.row.id:
            raise NotFound("evaluation", job_id)
        return job

    async def of(self, base: Base) -> list[EvaluationJob]:
        """A knowledge base's evaluations, newest first."""
        jobs = self._jobs
        if self._shared:
            jobs = await asyncio.to_thread(self._read, base.row.id) | jobs
        return sorted(
            (j for j in jobs.values() if j.base_id == base.row.id),
            key=lambda j: (-j.created_at, j.id),
        )

    async def delete(self, base: Base, job_id: str) -> None:
        """Stop it where it runs, and remove it."""
        job = await self.get(base, job_id)
        self._drop(job)
        await asyncio.to_thread(self._path(job).unlink, True)

    def forget(self, base: Base) -> None:
        """A knowledge base goes with its files."""
        for job in [j for j in self._jobs.values() if j.base_id == base.row.id]:
            self._drop(job)

    def _drop(self, job: EvaluationJob) -> None:
        self._jobs.pop(job.id, None)
        if self._running is not None and self._running[0] == job.id:
            self._running[1].cancel()

    # Where servers share the folder.

    async def _say(self) -> None:
        while True:
            try:
                for job in list(self._jobs.values()):
                    if not await asyncio.to_thread(_touch, self._path(job)):
                        self._drop(job)  # another server was told to remove it
                for job in await asyncio.to_thread(self._left):
                    if job.id not in self._jobs:
                        self._jobs[job.id] = job
                        self._queue.put_nowait(job.id)
            except Exception:
                log.exception("looking after evaluations failed; it is tried again")
            await asyncio.sleep(SAY_EVERY_S)

    def _left(self) -> list[EvaluationJob]:
        """Evaluations that nobody carries out any more, which this server does from now on."""
        found: list[EvaluationJob] = []
        for base in self._bases.all():
            for path in self._folder(base.row.id).glob("*.json"):
                if path in self._ended or not _silent(path):
                    continue
                job = _job(path)
                if job is None or job.status != "running":
                    self._ended.add(path)
                elif _touch(path):
                    found.append(job)
        return sorted(found, key=lambda j: j.created_at)

    async def _run(self) -> None:
        while True:
            job = self._jobs.get(await self._queue.get())
            if job is None:
                continue
            task = asyncio.create_task(self._carry_out(job))
            self._running = (job.id, task)
            try:
                await asyncio.wait({task})
            finally:
                task.cancel()
                self._running = None

    async def _carry_out(self, job: EvaluationJob) -> None:
        assert self.execute is not None
        kept = len(job.results)

        def note() -> None:
            nonlocal kept
            if len(job.results) > kept and job.id in self._jobs:
                kept = len(job.results)
                self._keep_known(job)

        try:
            await self.execute(job, note)
            job.status, job.progress = "done", 1.0
        except ForebayError as e:
            job.status, job.message = "failed", e.message
        except Exception:
            log.exception("evaluation %s failed", job.id)
            job.status, job.message = "failed", "internal error; the log has more"
        job.ended_at = time.time()
        if job.id in self._jobs:
            await asyncio.to_thread(self._keep_known, job)
            if self._shared:
                self._jobs.pop(job.id, None)

    def _folder(self, base_id: int) -> Path:
        return self._bases.folder(base_id) / "evaluations"

    def _path(self, job: EvaluationJob) -> Path:
        return self._folder(job.base_id) / f"{job.id}.json"

    def _read(self, base_id: int) -> dict[str, EvaluationJob]:
        """What is kept of a knowledge base, by id."""
        found = map(_job, sorted(self._folder(base_id).glob("*.json")))
        return {job.id: job for job in found if job is not None}

    def _keep_known(self, job: EvaluationJob) -> None:
        """Keep what has come of an evaluation, unless another server has removed it."""
        if not self._shared or self._path(job).exists():
            self._keep(job)

    def _keep(self, job: EvaluationJob) -> None:
        path = self._path(job)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".new")
        values = {name: getattr(job, name) for name in EvaluationJob.__slots__}
        values["request"] = base64.b64encode(job.request).decode()
        with temporary.open("wb") as file:
            file.write(orjson.dumps(values))
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)


def _silent(path: Path) -> bool:
    """Whether no server has said for long that it carries the evaluation out."""
    with contextlib.suppress(FileNotFoundError):  # removed meanwhile
        return path.stat().st_mtime < time.time() - SAID_S
    return False


def _touch(path: Path) -> bool:
    """Say that an evaluation is this server's; False when it was removed."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _job(path: Path) -> EvaluationJob | None:
    """A kept evaluation; None when it was removed or cannot be read."""
    try:
        return _from_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        log.exception("evaluation %s cannot be read; it is left out", path)
        return None


def _from_json(data: bytes) -> EvaluationJob:
    values: Mapping[str, Any] = orjson.loads(data)
    results = [
        Result(r["name"], r["seconds"], [Figure(**f) for f in r["figures"]])
        for r in values["results"]
    ]
    request = base64.b64decode(values["request"])
    return EvaluationJob(**{**values, "request": request, "results": results})
