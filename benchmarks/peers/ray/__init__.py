"""Ray Serve: HTTP, and gRPC with the standard's message."""

from benchmarks.peers.doors import json_http, oip_grpc
from benchmarks.peers.spec import Config, Peer

PEER = Peer(
    "ray",
    (
        "ray[serve]==2.60.0",
        "onnxruntime==1.32.0",
        "tokenizers==0.23.3",
        "numpy==2.4.6",
        "googleapis-common-protos==1.76.0",
    ),
    configs={
        "forest": (Config("1 replica"),),
        "minilm": (Config("1 replica, batch 32", ("--threads", "2", "--batch", "32")),),
    },
    tried={
        "forest": (
            Config("2 replicas", ("--replicas", "2")),
            Config("1 replica, batch 32", ("--batch", "32")),
        ),
        "minilm": (Config("2 replicas, batch 32", ("--replicas", "2", "--batch", "32")),),
    },
    doors=lambda kind: (oip_grpc(kind), json_http("/")),
    # The generated modules of the standard's proto are Forebay's.
    environment={"PYTHONPATH": "{root}/benchmarks/peers/served:{root}/contract"},
)
