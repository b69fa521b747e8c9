"""A random forest in KServe's Python model server, as its users write it.

    python kserve_forest.py MODEL.onnx --grpc_port 8081 --http_port 8080

Runs in an environment of its own, with `kserve` and `onnxruntime`.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import argparse
import logging

import kserve
import onnxruntime
from kserve import InferOutput, InferRequest, InferResponse, Model, ModelServer, model_server


class Forest(Model):
    """One ONNX session; each call runs its own rows."""

    def __init__(self, path: str) -> None:
        super().__init__("forest")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(path, options)
        self.ready = True

    def predict(self, payload: InferRequest, headers=None, response_headers=None) -> InferResponse:
        (values,) = self.session.run(None, {"input": payload.inputs[0].as_numpy()})
        output = InferOutput("variable", list(values.shape), "FP32")
        output.set_data_from_numpy(values, binary_data=True)
        return InferResponse(payload.id, "forest", [output])


parser = argparse.ArgumentParser(parents=[model_server.parser])
parser.add_argument("model")
arguments = parser.parse_args()
logging.getLogger(kserve.__name__).setLevel(logging.WARNING)
ModelServer(access_log_format=None).start([Forest(arguments.model)])
