"""What dense indexes are made of on this server: FAISS on the CPU or on GPUs, and Qdrant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from forebay.errors import FailedPrecondition
from numpy.typing import NDArray

from forebay_server.indexes.dense import DenseConfig, DenseIndex
from forebay_server.indexes.qdrant import QdrantIndex, QdrantStore


class Backends:
    """See the module.

    Args:
        qdrant: where collections of the kind `qdrant` lie; None = there can be none.
        gpu: search flat and IVF-PQ indexes on GPUs.
    """

    def __init__(self, qdrant: QdrantStore | None = None, gpu: bool = False) -> None:
        self.qdrant = qdrant
        self.gpu = gpu

    def check(self, config: DenseConfig | None) -> None:
        """Raise FailedPrecondition for what cannot be made here."""
        if config is not None and config.kind == "qdrant" and self.qdrant is None:
            raise FailedPrecondition(
                "no Qdrant is configured: set retrieval.qdrant to its URL",
                reason="QDRANT_NOT_CONFIGURED",
            )

    def make(
        self, name: str, config: DenseConfig, labels: Callable[[], NDArray[Any]]
    ) -> DenseIndex:
        """An empty index for the collection of that name. Raises FailedPrecondition."""
        self.check(config)
        if config.kind == "qdrant":
            assert self.qdrant is not None
            return QdrantIndex(config, self.qdrant, name, labels)
        return DenseIndex(config, self.gpu)

    def close(self) -> None:
        """Close connections."""
        if self.qdrant is not None:
            self.qdrant.close()
