"""A model in Ray Serve. Runs in an environment of its own."""

# pyright: reportMissingImports=false
from __future__ import annotations

import asyncio
import signal

import bench_arguments
import bench_models
import numpy as np
import ray
from forebay.oip import open_inference_pb2 as oip
from ray import serve
from ray.serve.config import gRPCOptions
from starlette.requests import Request


@serve.deployment(max_ongoing_requests=512)
class Served:
    """One model; texts are gathered by serve.batch."""

    def __init__(self, kind: str, folder: str, threads: int, batch: int) -> None:
        self.kind = kind
        self.model = bench_models.load(kind, folder, threads)
        self.batched = batch > 1
        self.gather.set_max_batch_size(max(batch, 1))

    def compute(self, work: list) -> list:
        if self.kind == "forest":
            return list(self.model.predict(np.array(work, np.float32)))
        return list(self.model.embed(work))

    @serve.batch(max_batch_size=1, batch_wait_timeout_s=0.0)
    async def gather(self, work: list) -> list:
        return await asyncio.to_thread(self.compute, work)

    async def answer(self, value):
        return await self.gather(value) if self.batched else self.compute([value])[0]

    async def __call__(self, request: Request) -> dict:
        body = await request.json()
        out = await self.answer(body["row"] if self.kind == "forest" else body["text"])
        return {"values": out.tolist()}

    async def ModelInfer(self, request: oip.ModelInferRequest) -> oip.ModelInferResponse:
        if self.kind == "forest":
            value = np.frombuffer(request.raw_input_contents[0], np.float32)
        else:
            value = request.inputs[0].contents.bytes_contents[0].decode()
        out = (await self.answer(value)).astype(np.float32)
        response = oip.ModelInferResponse(model_name=request.model_name)
        response.outputs.add(name="output", datatype="FP32", shape=[1, len(out)])
        response.raw_output_contents.append(out.tobytes())
        return response


if __name__ == "__main__":
    parser = bench_arguments.parser()
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    a = parser.parse_args()
    ray.init(
        include_dashboard=False,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
        object_store_memory=100 << 20,
        _system_config={"automatic_object_spilling_enabled": False},
    )
    servicer = "forebay.oip.open_inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server"
    serve.start(
        http_options={"host": "127.0.0.1", "port": a.http_port},
        grpc_options=gRPCOptions(port=a.grpc_port, grpc_servicer_functions=[servicer]),
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
    )
    served = Served.options(num_replicas=a.replicas, ray_actor_options={"num_cpus": 0})
    serve.run(served.bind(a.kind, a.folder, a.threads, a.batch), route_prefix="/")
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    serve.shutdown()
    ray.shutdown()
