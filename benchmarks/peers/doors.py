"""The doors of servers: how a request is written, where it goes, how its answer is read."""

from __future__ import annotations

import base64
import http.client
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import grpc
import numpy as np
from forebay.oip import open_inference_pb2 as oip
from forebay.v1 import (
    classification_pb2,
    embedding_pb2,
    rerank_pb2,
    tabular_pb2,
)
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import Message
from numpy.typing import NDArray

from benchmarks.load import Load, grpc_load, http_load

COLUMNS = [f"f{i}" for i in range(8)]
FLOATS = Path(__file__).with_name("echo") / "echo.proto"
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Door:
    """One way into a server.

    Attributes:
        route: `package.Service/Method`, or a path.
        write: an input of the workload to a message or a JSON object.
        read: the answer (message or JSON object) to numbers that a reference can be held against.
        answer: the response's class, for gRPC.
        proto: the method's file, where it is none of Forebay's or the standard's.
    """

    name: str
    transport: Literal["grpc", "http"]
    route: str
    write: Callable[[Any], Any]
    read: Callable[[Any], Numbers]
    answer: type[Message] | None = None
    proto: Path | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def ask(self, port: int, value: Any, timeout: float = 30.0) -> Numbers:
        """One call's answer.

        Raises:
            OSError, grpc.RpcError, ValueError: it is not answered.
        """
        if self.transport == "grpc":
            assert self.answer is not None
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                call: Callable[..., Any] = channel.unary_unary(
                    f"/{self.route}",
                    request_serializer=lambda m: m.SerializeToString(),
                    response_deserializer=self.answer.FromString,
                )
                metadata = list(self.headers.items())
                return self.read(call(self.write(value), timeout=timeout, metadata=metadata))
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
        try:
            body = json.dumps(self.write(value))
            headers = {"content-type": "application/json", **self.headers}
            connection.request("POST", self.route, body, headers)
            answer = connection.getresponse()
            text = answer.read()
            if answer.status != 200:
                raise ValueError(f"HTTP {answer.status}: {text[:200]!r}")
            return self.read(json.loads(text))
        finally:
            connection.close()

    def with_headers(self, headers: Mapping[str, str]) -> Door:
        """The same with these headers on each call."""
        return replace(self, headers=headers)

    def load(
        self,
        port: int,
        values: list[Any],
        callers: int,
        seconds: float,
        cpu: Callable[[], float] | None = None,
    ) -> Load:
        """A closed loop on it, the inputs in turn."""
        requests = [self.write(v) for v in values]
        if self.transport == "grpc":
            return grpc_load(
                port,
                self.route,
                requests,
                callers,
                seconds,
                metadata=self.headers,
                cpu=cpu,
                proto=self.proto,
            )
        return http_load(
            port, self.route, requests, callers, seconds, headers=self.headers, cpu=cpu
        )


def echo_floats() -> Door:
    """The bare echo of eight floats."""
    file = descriptor_pb2.FileDescriptorProto(name="echo.proto", package="bench", syntax="proto3")
    kind = file.message_type.add(name="Floats")
    kind.field.add(name="values", number=1, type=2, label=3)  # repeated float
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    floats = message_factory.GetMessageClass(pool.FindMessageTypeByName("bench.Floats"))
    return Door(
        "gRPC echo of 8 floats",
        "grpc",
        "bench.Echo/Call",
        lambda v: floats(values=[float(x) for x in v]),
        lambda a: np.array(a.values, np.float64),
        floats,
        FLOATS,
    )


def echo_infer() -> Door:
    """The bare echo of ModelInfer's message: it answers with the row that it got."""
    return replace(oip_grpc("forest"), name="gRPC echo of ModelInfer")


# The Open Inference Protocol


def _oip_message(model: str, value: Any, shape: list[int]) -> oip.ModelInferRequest:
    request = oip.ModelInferRequest(model_name=model)
    if isinstance(value, str):
        tensor = request.inputs.add(name="text", datatype="BYTES", shape=shape)
        tensor.contents.bytes_contents.append(value.encode())
    else:
        request.inputs.add(name="input", datatype="FP32", shape=[1, len(value)])
        request.raw_input_contents.append(np.asarray(value, np.float32).tobytes())
    return request


def _oip_numbers(answer: Any) -> Numbers:
    if answer.raw_output_contents:
        return np.frombuffer(answer.raw_output_contents[0], np.float32).astype(np.float64)
    contents = answer.outputs[0].contents
    return np.array(contents.fp32_contents or contents.fp64_contents, np.float64)


def oip_grpc(model: str, text_shape: tuple[int, ...] = (1,)) -> Door:
    """ModelInfer: rows as raw FP32, texts as BYTES."""
    return Door(
        "gRPC ModelInfer",
        "grpc",
        "inference.GRPCInferenceService/ModelInfer",
        lambda v: _oip_message(model, v, list(text_shape)),
        _oip_numbers,
        oip.ModelInferResponse,
    )


def oip_http(model: str, text_shape: tuple[int, ...] = (1,)) -> Door:
    """`/v2/models/NAME/infer` with JSON numbers."""

    def write(value: Any) -> dict[str, Any]:
        if isinstance(value, str):
            tensor = {"name": "text", "datatype": "BYTES", "shape": text_shape, "data": [value]}
        else:
            numbers = [float(x) for x in value]
            tensor = {"name": "input", "datatype": "FP32", "shape": [1, len(value)]}
            tensor["data"] = numbers
        return {"inputs": [tensor]}

    def read(answer: Any) -> Numbers:
        return np.array(answer["outputs"][0]["data"], np.float64).reshape(-1)

    return Door("HTTP /v2 infer", "http", f"/v2/models/{model}/infer", write, read)


# Plain JSON, for servers without a protocol of their own


def json_http(path: str = "/predict", listed: bool = False) -> Door:
    """`{"row": [...]}` or `{"text": ...}` to `{"values": [...]}`.

    Args:
        listed: a text goes as a list of one, and a list of one vector comes back.
    """

    def write(value: Any) -> dict[str, Any]:
        if isinstance(value, str):
            return {"text": [value] if listed else value}
        return {"row": [float(x) for x in value]}

    def read(answer: Any) -> Numbers:
        return np.array(answer if listed else answer["values"], np.float64).reshape(-1)

    return Door(f"HTTP {path}", "http", path, write, read)


def openai_http(model: str, path: str = "/v1/embeddings") -> Door:
    """OpenAI's embeddings, base64 as its SDK asks by default."""

    def read(answer: Any) -> Numbers:
        vector = answer["data"][0]["embedding"]
        if isinstance(vector, str):
            return np.frombuffer(base64.b64decode(vector), np.float32).astype(np.float64)
        return np.array(vector, np.float64)

    def write(value: str) -> dict[str, Any]:
        return {"model": model, "input": value, "encoding_format": "base64"}

    return Door(f"HTTP {path}", "http", path, write, read)


# Forebay's own contract


def predict_grpc(model: str) -> Door:
    """TabularService.Predict."""

    def write(value: Any) -> Message:
        request = tabular_pb2.PredictRequest(model=model)
        row = {n: float(v) for n, v in zip(COLUMNS, value, strict=True)}
        request.rows.add().update(row)
        return request

    return Door(
        "gRPC Predict",
        "grpc",
        "forebay.v1.TabularService/Predict",
        write,
        lambda a: np.array([a.predictions[0].value]),
        tabular_pb2.PredictResponse,
    )


def predict_http(model: str) -> Door:
    """POST /api/v1/tabular:predict."""

    def write(value: Any) -> dict[str, Any]:
        return {
            "model": model,
            "rows": [{n: float(v) for n, v in zip(COLUMNS, value, strict=True)}],
        }

    return Door(
        "HTTP REST predict",
        "http",
        "/api/v1/tabular:predict",
        write,
        lambda a: np.array([float(a["predictions"][0]["value"])]),
    )


def embed_grpc(model: str) -> Door:
    """EmbeddingService.Embed, one text a call."""
    return Door(
        "gRPC Embed",
        "grpc",
        "forebay.v1.EmbeddingService/Embed",
        lambda v: embedding_pb2.EmbedRequest(model=model, texts=[v]),
        lambda a: np.array(a.embeddings[0].values, np.float64),
        embedding_pb2.EmbedResponse,
    )


def embed_http(model: str) -> Door:
    """POST /api/v1/embeddings:embed."""
    return Door(
        "HTTP REST embed",
        "http",
        "/api/v1/embeddings:embed",
        lambda v: {"model": model, "texts": [v]},
        lambda a: np.array(a["embeddings"][0]["values"], np.float64),
    )


def classify_grpc(model: str) -> Door:
    """ClassificationService.Classify: scores, best first."""
    return Door(
        "gRPC Classify",
        "grpc",
        "forebay.v1.ClassificationService/Classify",
        lambda v: classification_pb2.ClassifyRequest(model=model, texts=[v]),
        lambda a: np.array([x.score for x in a.results[0].labels]),
        classification_pb2.ClassifyResponse,
    )


def classify_http(model: str) -> Door:
    """POST /api/v1/classification:classify."""
    return Door(
        "HTTP REST classify",
        "http",
        "/api/v1/classification:classify",
        lambda v: {"model": model, "texts": [v]},
        lambda a: np.array([x["score"] for x in a["results"][0]["labels"]]),
    )


def _by_index(results: list[tuple[int, float]]) -> Numbers:
    return np.array([score for _, score in sorted(results)])


def rerank_grpc(model: str) -> Door:
    """RerankService.Rerank: scores in the documents' order."""
    return Door(
        "gRPC Rerank",
        "grpc",
        "forebay.v1.RerankService/Rerank",
        lambda v: rerank_pb2.RerankRequest(model=model, query=v[0], documents=v[1]),
        lambda a: _by_index([(x.index, x.score) for x in a.results]),
        rerank_pb2.RerankResponse,
    )


def rerank_http(model: str) -> Door:
    """POST /v1/rerank, as Cohere and Jina have it."""
    return Door(
        "HTTP /v1/rerank",
        "http",
        "/v1/rerank",
        lambda v: {"model": model, "query": v[0], "documents": v[1]},
        lambda a: _by_index([(x["index"], x["relevance_score"]) for x in a["results"]]),
    )
