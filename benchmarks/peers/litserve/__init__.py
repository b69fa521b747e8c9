"""LitServe: HTTP only."""

from benchmarks.peers.doors import json_http
from benchmarks.peers.spec import Config, Peer

PEER = Peer(
    "litserve",
    ("litserve==0.2.19", "onnxruntime==1.32.0", "tokenizers==0.23.3", "numpy==2.4.6"),
    configs={
        "forest": (
            Config("1 worker, 1 API server"),
            Config("2 workers, 2 API servers", ("--workers", "2", "--servers", "2")),
        ),
        "minilm": (
            Config("1 worker, batch 32", ("--threads", "2", "--batch", "32")),
            Config("2 workers, batch 32", ("--workers", "2", "--batch", "32")),
        ),
    },
    tried={
        "forest": (Config("1 worker, batch 32", ("--batch", "32")),),
        "minilm": (Config("2 workers", ("--workers", "2")),),
    },
    doors=lambda kind: (json_http(),),
)
