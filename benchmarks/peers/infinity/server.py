"""infinity-emb on the same weights in ONNX. Runs in an environment of its own.

Its optimum engine pools by itself, so it needs the graph's token states: `hidden_states` of
benchmarks.peers.models writes that file and what transformers wants beside it.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

from pathlib import Path

import bench_arguments
import uvicorn
from infinity_emb.args import EngineArgs
from infinity_emb.infinity_server import create_server
from infinity_emb.transformer.embedder import optimum

if __name__ == "__main__":
    # It gives a local file's whole path where optimum wants its name.
    files = optimum.get_onnx_files
    optimum.get_onnx_files = lambda **kwargs: Path(files(**kwargs).name)
    a = bench_arguments.parser().parse_args()
    engine = EngineArgs(
        model_name_or_path=f"{a.folder}/hidden",
        served_model_name=a.kind,
        engine="optimum",
        device="cpu",
        batch_size=32,
        model_warmup=False,
        pooling_method="mean",
        embedding_dtype="float32",
        bettertransformer=False,
        trust_remote_code=False,
        onnx_disable_optimize=True,  # the graph is fused already
        onnx_do_not_prefer_quantized=True,
    )
    app = create_server(engine_args_list=[engine], url_prefix="")
    uvicorn.run(app, host="127.0.0.1", port=a.http_port, log_level="warning", access_log=False)
