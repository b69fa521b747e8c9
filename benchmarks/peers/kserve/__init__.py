"""KServe's Python model server. It has no batching of its own (that is a sidecar's work)."""

from benchmarks.peers.doors import oip_grpc, oip_http
from benchmarks.peers.spec import Config, Peer

PEER = Peer(
    "kserve",
    ("kserve==0.21.0", "onnxruntime==1.32.0", "tokenizers==0.23.3", "numpy==2.4.6"),
    configs={
        "forest": (Config("w1"), Config("w2", ("--workers", "2"))),
        "minilm": (
            Config("w1", ("--threads", "2")),
            Config("w1 2 threads of calls", ("--threads", "1", "--in-threads", "2")),
        ),
    },
    doors=lambda kind: (oip_grpc(kind), oip_http(kind)),
)
