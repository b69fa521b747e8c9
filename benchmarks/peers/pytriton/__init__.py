"""PyTriton: Triton's front with Python behind it. Its batcher does not wait."""

from benchmarks.peers.doors import oip_grpc, oip_http
from benchmarks.peers.spec import Config, Peer

PEER = Peer(
    "pytriton",
    ("nvidia-pytriton==0.7.0", "onnxruntime==1.32.0", "tokenizers==0.23.3", "numpy==1.26.4"),
    configs={
        "forest": (Config("1 instance, batch 64", ("--batch", "64")),),
        "minilm": (
            Config("1 instance, batch 32", ("--threads", "2", "--batch", "32")),
            Config("2 instances, batch 32", ("--instances", "2", "--batch", "32")),
        ),
    },
    tried={
        "forest": (
            Config("1 instance, no batching"),
            Config("2 instances, batch 64", ("--instances", "2", "--batch", "64")),
        )
    },
    doors=lambda kind: (oip_grpc(kind, (1, 1)), oip_http(kind, (1, 1))),
)
