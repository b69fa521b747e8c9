"""A model in KServe's Python server, as its users write it. Runs in an environment of its own."""

# pyright: reportMissingImports=false
from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor

import bench_arguments
import bench_models
import grpc.aio
import kserve
import uvicorn
from kserve import InferOutput, InferRequest, InferResponse, Model, ModelServer, model_server
from kserve.protocol.rest.multiprocess.server import RESTServerProcess


class Served(Model):
    """Each call runs its own rows or texts."""

    def __init__(self, kind: str, folder: str, threads: int) -> None:
        super().__init__(kind)
        self.arguments = (kind, folder, threads)
        self.kind = kind
        self.model = bench_models.load(kind, folder, threads)
        self.ready = True

    def predict(self, payload: InferRequest, headers=None, response_headers=None) -> InferResponse:
        values = payload.inputs[0].as_numpy()
        if self.kind == "forest":
            out = self.model.predict(values)
        else:
            texts = [t.decode() if isinstance(t, bytes) else t for t in values.reshape(-1)]
            out = self.model.embed(texts)
        output = InferOutput("output", list(out.shape), "FP32")
        output.set_data_from_numpy(out, binary_data=payload.from_grpc)
        return InferResponse(payload.id or "0", self.kind, [output])

    def __reduce__(self):
        """Workers load the file themselves: sessions cannot be pickled."""
        return type(self), self.arguments


class InThreads(Served):
    """The same on a pool of threads, so that two calls compute at once."""

    def __init__(self, kind: str, folder: str, threads: int, pool: int) -> None:
        super().__init__(kind, folder, threads)
        self.arguments = (kind, folder, threads, pool)
        self.pool = ThreadPoolExecutor(pool)

    async def predict(self, payload, headers=None, response_headers=None):
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.pool, super().predict, payload)


def patient() -> None:
    """It kills workers that have not come up within five seconds."""
    alive = RESTServerProcess.is_alive
    RESTServerProcess.is_alive = lambda self, timeout=60: alive(self, timeout)


def on_loopback() -> None:
    """It listens on all interfaces and has no setting for it."""
    add, config = grpc.aio.Server.add_insecure_port, uvicorn.Config.__init__

    def port(self, address: str) -> int:
        return add(self, address.replace("[::]", "127.0.0.1"))

    def init(self, *args, **kwargs) -> None:
        config(self, *args, **{**kwargs, "host": "127.0.0.1"})

    grpc.aio.Server.add_insecure_port, uvicorn.Config.__init__ = port, init


if __name__ == "__main__":
    parser = bench_arguments.parser()
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--in-threads", type=int, default=0)
    a = parser.parse_args()
    on_loopback()
    patient()
    logging.getLogger(kserve.__name__).setLevel(logging.WARNING)
    model_server.args.enable_latency_logging = False
    model = (
        InThreads(a.kind, a.folder, a.threads, a.in_threads)
        if a.in_threads
        else Served(a.kind, a.folder, a.threads)
    )
    server = ModelServer(
        http_port=a.http_port,
        grpc_port=a.grpc_port,
        workers=a.workers,
        access_log_format=None,
        enable_latency_logging=False,
    )
    server.start([model])
