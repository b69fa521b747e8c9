"""MLServer. Its adaptive batching waits for its time even for one caller: off on the forest."""

from benchmarks.peers.doors import oip_grpc, oip_http
from benchmarks.peers.spec import Config, Peer

PEER = Peer(
    "mlserver",
    (
        "mlserver==1.7.1",
        "uvloop==0.21.0",  # it breaks with newer ones
        "onnxruntime==1.32.0",
        "tokenizers==0.23.3",
        "numpy==2.4.6",
    ),
    configs={
        "forest": (Config("in process"),),
        "minilm": (
            Config("in process, batch 32", ("--threads", "2", "--batch", "32")),
            Config("pool of 1, batch 32", ("--threads", "2", "--batch", "32", "--pool", "1")),
        ),
    },
    tried={
        "forest": (
            Config("in process, batch 32", ("--batch", "32")),
            Config("pool of 1", ("--pool", "1")),
        ),
        "minilm": (Config("in process", ("--threads", "2")),),
    },
    doors=lambda kind: (oip_grpc(kind), oip_http(kind)),
    environment={"PYTHONPATH": "{root}/benchmarks/peers/served:{root}/benchmarks/peers/mlserver"},
)
