"""BentoML: HTTP only (1.4 has no gRPC)."""

from benchmarks.peers.doors import json_http
from benchmarks.peers.spec import Config, Peer

PEER = Peer(
    "bentoml",
    ("bentoml==1.4.40", "onnxruntime==1.32.0", "tokenizers==0.23.3", "numpy==2.4.6"),
    configs={
        "forest": (Config("1 worker"), Config("2 workers", ("--workers", "2"))),
        "minilm": (
            Config("1 worker, batch 32", ("--threads", "2", "--batch")),
            Config("2 workers, batch 32", ("--workers", "2", "--batch")),
        ),
    },
    tried={"minilm": (Config("2 workers", ("--workers", "2")),)},
    doors=lambda kind: (json_http(),) if kind == "forest" else (json_http(listed=True),),
)
