"""A model in LitServe. Runs in an environment of its own."""

# pyright: reportMissingImports=false
from __future__ import annotations

import bench_arguments
import bench_models
import litserve
import numpy as np


class Served(litserve.LitAPI):
    """A batch of rows or texts a call of the worker, where batching is on."""

    def __init__(self, kind: str, folder: str, threads: int, **options) -> None:
        super().__init__(**options)
        self.kind, self.folder, self.threads = kind, folder, threads
        self.batched = options["max_batch_size"] > 1

    def setup(self, device) -> None:
        self.model = bench_models.load(self.kind, self.folder, self.threads)

    def decode_request(self, request):
        return request["row"] if self.kind == "forest" else request["text"]

    def batch(self, inputs):
        return inputs

    def predict(self, x):
        work = x if self.batched else [x]
        if self.kind == "forest":
            out = self.model.predict(np.array(work, np.float32))
        else:
            out = self.model.embed(work)
        return out if self.batched else out[0]

    def unbatch(self, output):
        return list(output)

    def encode_response(self, output):
        return {"values": output.tolist()}


if __name__ == "__main__":
    parser = bench_arguments.parser()
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--servers", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--wait", type=float, default=0.001, help="seconds for a batch to fill")
    a = parser.parse_args()
    api = Served(
        a.kind,
        a.folder,
        a.threads,
        max_batch_size=a.batch,
        batch_timeout=a.wait if a.batch > 1 else 0.0,
    )
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=a.workers, timeout=120)
    server.run(
        host="127.0.0.1",
        port=a.http_port,
        num_api_servers=a.servers,
        log_level="warning",
        generate_client_file=False,
        access_log=False,
    )
