"""A model in PyTriton. Runs in an environment of its own."""

# pyright: reportMissingImports=false
from __future__ import annotations

import logging
import os
import sysconfig

import bench_arguments
import bench_models
import numpy as np
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig


def forest(model):
    """Rows [n, 8] to [n, 1]."""

    @batch
    def infer(input):
        return {"output": model.predict(input)}

    return infer


def encoder(model):
    """Texts [n, 1] to [n, 384]."""

    @batch
    def infer(text):
        return {"output": model.embed([t.decode() for t in text.reshape(-1)])}

    return infer


def unbatched(model):
    """One row a call, as a request comes."""

    def infer(requests):
        return [{"output": model.predict(r["input"])} for r in requests]

    return infer


if __name__ == "__main__":
    parser = bench_arguments.parser()
    parser.add_argument("--instances", type=int, default=1)
    parser.add_argument("--batch", type=int, default=0)
    a = parser.parse_args()
    # Triton's stub looks for libpython where the loader looks.
    os.environ["LD_LIBRARY_PATH"] = sysconfig.get_config_var("LIBDIR")
    logging.getLogger("pytriton").setLevel(logging.WARNING)
    make = encoder if a.kind == "minilm" else forest if a.batch else unbatched
    functions = [make(bench_models.load(a.kind, a.folder, a.threads)) for _ in range(a.instances)]
    rows = () if a.batch else (1,)
    given = (
        Tensor(name="input", dtype=np.float32, shape=(*rows, 8))
        if a.kind == "forest"
        else Tensor(name="text", dtype=bytes, shape=(1,))
    )
    width = 1 if a.kind == "forest" else 384
    settings = TritonConfig(
        http_port=a.http_port,
        grpc_port=a.grpc_port,
        http_address="127.0.0.1",
        grpc_address="127.0.0.1",
        allow_metrics=False,
        log_verbose=0,
    )
    if a.batch:
        config = ModelConfig(max_batch_size=a.batch, batcher=DynamicBatcher())
    else:
        config = ModelConfig(batching=False)
    with Triton(config=settings) as triton:
        triton.bind(
            model_name=a.kind,
            infer_func=functions,
            inputs=[given],
            outputs=[Tensor(name="output", dtype=np.float32, shape=(*rows, width))],
            config=config,
        )
        triton.serve()
