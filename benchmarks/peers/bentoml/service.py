"""A model as a BentoML service. Runs in an environment of its own."""

# pyright: reportMissingImports=false
# No `from __future__ import annotations`: BentoML reads the annotations as types.
import os

import bench_models
import bentoml
import numpy as np

KIND, FOLDER = os.environ["SERVED_KIND"], os.environ["SERVED_FOLDER"]


class _Base:
    def __init__(self) -> None:
        self.model = bench_models.load(KIND, FOLDER, int(os.environ["SERVED_THREADS"]))


class _Forest(_Base):
    @bentoml.api
    def predict(self, row: list[float]) -> dict:
        return {"values": self.model.predict(np.array([row], np.float32))[0].tolist()}


class _Texts(_Base):
    @bentoml.api(
        batchable=bool(os.environ["SERVED_BATCH"]), max_batch_size=32, max_latency_ms=60_000
    )
    def predict(self, text: list[str]) -> list[list[float]]:
        return self.model.embed(text).tolist()


class Implementation(_Forest if KIND == "forest" else _Texts):
    """The service's body."""


Served = bentoml.service(
    workers=int(os.environ["SERVED_WORKERS"]),
    traffic={"timeout": 120, "max_concurrency": 1024},
    logging={"access": {"enabled": False}},
    metrics={"enabled": False},
    tracing={"sample_rate": 0.0},
    name="served",
)(Implementation)
