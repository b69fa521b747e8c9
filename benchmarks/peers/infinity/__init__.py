"""infinity-emb on ONNX Runtime (its `optimum` engine): OpenAI's embeddings by HTTP."""

from benchmarks.peers.doors import openai_http
from benchmarks.peers.spec import Config, Peer

PEER = Peer(
    "infinity",
    (
        "infinity-emb[optimum,server]==0.0.78",
        "onnxruntime==1.32.0",
        "optimum==2.1.0",
        "transformers==4.57.6",
        "torch==2.15.0",
    ),
    configs={"minilm": (Config("optimum, batch 32"),)},
    doors=lambda kind: (openai_http(kind, "/embeddings"),),
    environment={"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "2"},
)
