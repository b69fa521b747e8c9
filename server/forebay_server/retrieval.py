"""Collections and knowledge bases, put together. Imported only where the `retrieval` extra is."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import cast

from forebay.constraints import Validator
from forebay.settings import Settings

from forebay_server.access.budgets import Budgets
from forebay_server.access.usage import UsageLedger
from forebay_server.core.batcher import BatchingEngineClient
from forebay_server.core.call import Call
from forebay_server.core.interfaces import BatchPolicy
from forebay_server.dataplane.collections import Collections
from forebay_server.dataplane.embedding import Embedded, TextEmbedder
from forebay_server.dataplane.generation import GenerationPipeline
from forebay_server.dataplane.models import ModelAccess
from forebay_server.dataplane.searching import LARGEST, PointReader, SearchPipeline
from forebay_server.dataplane.snapshots import Snapshots
from forebay_server.dataplane.texts import TextPipeline
from forebay_server.indexes.backends import Backends
from forebay_server.indexes.dense import gpus
from forebay_server.indexes.engine import SearchEngine
from forebay_server.indexes.qdrant import QdrantStore
from forebay_server.knowledge.answering import Answerer, Done, Event
from forebay_server.knowledge.bases import KnowledgeBases
from forebay_server.knowledge.citations import Unsupported
from forebay_server.knowledge.evaluating import Evaluator
from forebay_server.knowledge.evaluation_jobs import EvaluationJobs
from forebay_server.knowledge.ingest import Ingest
from forebay_server.knowledge.retrieval import Retriever
from forebay_server.knowledge.writer import Writer
from forebay_server.observability.metrics import Metrics
from forebay_server.services.base import Service
from forebay_server.services.collection import CollectionService
from forebay_server.services.knowledge import KnowledgeService
from forebay_server.storage.collections import CollectionStore
from forebay_server.storage.database import Database
from forebay_server.storage.knowledge import KnowledgeStore

log = logging.getLogger("forebay.collections")


class Retrieval:
    """The part's life: `start` opens collections, `close` saves them."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        access: ModelAccess,
        texts: TextPipeline,
        metrics: Metrics,
        validator: Validator,
        ledger: UsageLedger,
        generation: GenerationPipeline,
        budgets: Budgets,
    ) -> None:
        def part_ended(call: Call) -> None:
            """What a part of another call took is counted as its own model's."""
            facts = call.facts
            cost = float(cast(float, call.context.get("cost", 0.0)))
            used = (0, facts.items, facts.tokens, 0, 0, 0, facts.engine_s * 1e3, cost)
            ledger.record({(call.principal.key_id, facts.model, facts.version): used})
            budgets.settle(call)

        def on_embedded(key_id: str, found: Embedded, items: int) -> None:
            used = (0, items, found.tokens, 0, 0, 0, 0.0, 0.0)
            ledger.record({(key_id, found.model, found.version): used})
            budgets.spend(key_id, found.tokens)

        store = CollectionStore(database)
        self._backends = backends(settings, store.shared)
        embedder = TextEmbedder(texts)
        self.collections = Collections(
            store,
            settings.home / "collections",
            access,
            embedder,
            lambda name, why: metrics.index_rebuilds.labels(name, why).inc(),
            self._backends,
        )
        # An engine a core, each with one thread: a batch's threads would wait for the slowest of
        # them, and spin while they do.
        policy = BatchPolicy(
            max_batch_tokens=LARGEST, max_batch_size=LARGEST, max_queue_size=8192, sort_window=1
        )
        engines = [SearchEngine(policy, metrics.search_stage) for _ in range(os.cpu_count() or 1)]
        self._client = BatchingEngineClient(
            engines, observer=metrics.batches.observer("collections", 1), name="collections"
        )
        points = PointReader(store, asyncio.get_running_loop(), metrics.search_stage)
        self.searches = SearchPipeline(self.collections, self._client, texts, points)
        metrics.watch_collections(
            lambda: [(c.name, c.index.sizes()) for c in self.collections.all()]
        )
        follower = self.collections.follower
        if follower is not None:
            metrics.watch_follower(follower.behind_s)
        self.bases = KnowledgeBases(
            KnowledgeStore(database), self.collections, settings.home / "knowledge"
        )
        self.ingest = Ingest(
            self.bases,
            access,
            embedder,
            on_embedded,
            lambda status: metrics.documents.labels(status).inc(),
        )
        writer = Writer(generation, settings.knowledge, part_ended)
        retriever = Retriever(self.bases, self.searches, embedder, writer)

        def on_event(event: Event) -> None:
            if isinstance(event, Done):
                metrics.answers.labels(event.method).inc()
            elif isinstance(event, Unsupported):
                metrics.unsupported.labels(event.reason).inc()

        self.answerer = Answerer(self.bases, retriever, embedder, writer, on_event)
        self.evaluations = EvaluationJobs(self.bases)
        self._snapshots = Snapshots(self.collections)
        self.services: list[Service] = [
            CollectionService(self.collections, self.searches, self._snapshots, validator),
            KnowledgeService(
                self.bases,
                self.ingest,
                retriever,
                self.answerer,
                Evaluator(retriever, self.answerer, embedder),
                self.evaluations,
                part_ended,
            ),
        ]

    async def start(self) -> None:
        """Open what is stored."""
        await self.collections.start()
        await self._snapshots.start()
        await self.bases.start()
        await self.ingest.start()
        await self.evaluations.start()

    async def close(self) -> None:
        """Finish what runs, save what has changed."""
        await self.evaluations.close()
        await self.ingest.close()
        await self.bases.close()
        await self.collections.close()
        await asyncio.to_thread(self._client.close)
        await asyncio.to_thread(self._backends.close)


def backends(settings: Settings, shared: bool = False) -> Backends:
    """What the settings say of Qdrant and GPUs. `shared`: other servers may use the same database."""
    r = settings.retrieval
    qdrant = None
    if r.qdrant:
        key = r.qdrant_api_key.get_secret_value()
        folder = settings.home / "qdrant"
        prefix = f"{r.qdrant_prefix}-{_own_name(settings.home)}" if shared else r.qdrant_prefix
        qdrant = QdrantStore(r.qdrant, folder, key, prefix, r.qdrant_timeout_s)
    found = gpus() if r.faiss_device == "gpu" else 0
    if r.faiss_device == "gpu":
        log.info("FAISS searches on %d GPUs", found) if found else log.warning(
            "retrieval.faiss_device is gpu and FAISS sees none (faiss-gpu is needed): the CPU serves"
        )
    return Backends(qdrant, gpu=found > 0)


def _own_name(home: Path) -> str:
    """What tells a server's points in Qdrant from those of others, whose collections have the same
    ids: each keeps its own, and removes what it has no use for. Stays with the home."""
    path = home / "collections" / "qdrant_name"
    with suppress(FileNotFoundError):
        if name := path.read_text():
            return name
    path.parent.mkdir(parents=True, exist_ok=True)
    name = secrets.token_hex(4)
    path.write_text(name)
    return name
