"""Vector libraries beside Forebay, one after the other in one run, each in its own environment.

    python -m benchmarks.peers.vector_peers --install    # makes .forebay/peers, about 2 GB

All but Forebay are called in process, which spares them the network. See vector_peer.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks import vector_data
from benchmarks.common import KEPT, ROOT

PACKAGES = {
    "chromadb": "chromadb==1.5.9",
    "qdrant-client": "qdrant-client==1.20.0",
    "lancedb": "lancedb==0.40.0",
    "milvus-lite": "milvus-lite==3.2.2 pymilvus==3.0.2",
}
FOLDER = KEPT / "peers"
#: Enough for all of them to be built in minutes.
POINTS = 100_000


def install(wanted: dict[str, str] = PACKAGES) -> None:
    """Make the environments. `wanted`: packages by the environment's name."""
    uv = Path(sys.executable).parent / "uv"
    for name, packages in wanted.items():
        place = str(FOLDER / name)
        subprocess.run([uv, "venv", "-q", "--python", sys.executable, place], check=True)
        python = f"{place}/bin/python"
        command = [uv, "pip", "install", "-q", "--python", python, "numpy", *packages.split()]
        subprocess.run(command, check=True)


def run(points: int = POINTS, seconds: float = 4.0) -> Iterator[tuple[str, dict[str, Any]]]:
    """(library, figures), Forebay first."""
    from benchmarks import vector_search

    data, queries, _ = vector_data.points(points)
    truth = vector_data.truth(data, queries, str(points))
    args = SimpleNamespace(callers=64, seconds=2 * seconds, rounds=1)
    if not (vector_search.home_of("hnsw", points) / "collections").exists():
        yield "forebay, loading", vector_search.load_points("hnsw", data)
    yield "forebay", vector_search.measure("hnsw", data, queries, truth, args)
    with tempfile.TemporaryDirectory(dir=FOLDER) as name:
        folder = Path(name)
        np.save(folder / "points.npy", data)
        np.save(folder / "queries.npy", queries)
        np.save(folder / "truth.npy", truth)
        for peer in PACKAGES:
            python = FOLDER / peer / "bin" / "python"
            script = ROOT / "benchmarks" / "peers" / "vector_peer.py"
            command = [str(python), str(script), peer, str(folder), str(seconds)]
            done = subprocess.run(command, capture_output=True, text=True)
            shutil.rmtree(folder / peer, ignore_errors=True)
            if done.returncode:
                yield peer, {"failed": done.stderr[-500:]}
            else:
                yield peer, {"package": PACKAGES[peer], **json.loads(done.stdout.splitlines()[-1])}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--install", action="store_true")
    if parser.parse_args().install:
        install()
