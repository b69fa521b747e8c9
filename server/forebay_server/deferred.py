"""What callers leave with the server: files, stored responses, batches. Put together here."""

from __future__ import annotations

import asyncio
import contextlib

from forebay.constraints import Validator
from forebay.settings import Settings

from forebay_server.access.budgets import Budgets
from forebay_server.access.deferred import DeferredWork
from forebay_server.access.keys import KeyStore
from forebay_server.access.usage import UsageLedger
from forebay_server.batches.runner import BatchRunner
from forebay_server.dataplane.generation import GenerationPipeline
from forebay_server.files.library import FileLibrary
from forebay_server.observability.metrics import Metrics
from forebay_server.services.base import Service
from forebay_server.services.batch import BatchService
from forebay_server.services.batch_execution import BatchExecution
from forebay_server.services.embedding import EmbeddingService
from forebay_server.services.file import FileService
from forebay_server.services.generation import GenerationService
from forebay_server.services.response import ResponseService
from forebay_server.storage.batches import BatchStore
from forebay_server.storage.database import Database
from forebay_server.storage.files import FileStore
from forebay_server.storage.responses import ResponseStore


class Deferred:
    """The parts' life: `start` goes on where an earlier process was, `close` stops."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        keys: KeyStore,
        budgets: Budgets,
        ledger: UsageLedger,
        pipeline: GenerationPipeline,
        generation: GenerationService,
        embedding: EmbeddingService,
        metrics: Metrics,
        validator: Validator,
    ) -> None:
        work = DeferredWork(keys, budgets, ledger)
        f, b = settings.files, settings.batches
        self._files = FileLibrary(
            FileStore(database),
            settings.home / "files",
            f.max_file_bytes,
            f.max_bytes_per_key,
            f.keep_s,
        )
        self._responses = ResponseService(
            pipeline, ResponseStore(database), work, settings.responses
        )
        self._runner = BatchRunner(
            BatchStore(database),
            BatchExecution(generation, embedding),
            work,
            b.max_running,
            b.keep_s,
            metrics.batch_items_ended,
        )
        metrics.watch_batches(self._runner.open)
        self.services: list[Service] = [
            FileService(self._files),
            self._responses,
            BatchService(self._runner, b, validator),
        ]
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Go on with what was left unfinished."""
        await self._files.start()
        await self._runner.start()
        self._tasks = [
            asyncio.create_task(self._files.keep()),
            asyncio.create_task(self._responses.keep()),
        ]

    async def close(self) -> None:
        """Stop; what is not done goes on at the next start."""
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await self._runner.close()
        await self._responses.close()
