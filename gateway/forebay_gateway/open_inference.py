"""Open Inference Protocol REST under /v2, with binary tensors: what tritonclient.http speaks.

Source: kserve.github.io/website (v2 protocol) and Triton's binary tensor data extension.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import orjson
from forebay.datatypes import DTYPES
from forebay.errors import ForebayError, InvalidArgument, http_error
from forebay.methods import methods
from forebay.oip import open_inference_pb2 as pb
from google.rpc import status_pb2
from grpc import aio
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from forebay_gateway import http_errors
from forebay_gateway.json_codec import dumps, parse_json, to_dict
from forebay_gateway.route_table import Listed
from forebay_gateway.upstream import ClientGone, Upstream

_SERVICE = "/inference.GRPCInferenceService/"
INFER = methods()[f"{_SERVICE}ModelInfer"]
#: Where a model's routes begin.
MODELS = ("/v2/models/{name}", "/v2/models/{name}/versions/{version}")
HEADER = "inference-header-content-length"
Endpoint = Callable[[Request], Awaitable[Response]]


class OpenInference:
    """The routes, on one upstream."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream

    def routes(self) -> list[Listed]:
        """All of /v2."""
        table: list[tuple[str, str, Endpoint]] = [
            ("GET", "/v2", self.metadata),
            ("GET", "/v2/health/live", self.live),
            ("GET", "/v2/health/ready", self.ready),
            ("POST", "/v2/repository/index", self.index),
            ("POST", "/v2/repository/models/{name}/load", self.load),
            ("POST", "/v2/repository/models/{name}/unload", self.unload),
            ("GET", "/v2/models/stats", self.statistics),
        ]
        for base in MODELS:
            table += [
                ("GET", base, self.model),
                ("GET", f"{base}/ready", self.model_ready),
                ("GET", f"{base}/stats", self.statistics),
                ("POST", f"{base}/infer", self.infer),
            ]
        return [Route(path, _guarded(fn), methods=[verb]) for verb, path, fn in table]

    async def _ask(self, name: str, request: Request, message: Any) -> Any:
        method = methods()[_SERVICE + name]
        data, _ = await self._upstream.unary(method, request, message.SerializeToString())
        return method.response.FromString(data)

    async def metadata(self, request: Request) -> Response:
        """Name, version, extensions."""
        return _json(
            to_dict(await self._ask("ServerMetadata", request, pb.ServerMetadataRequest()))
        )

    async def live(self, request: Request) -> Response:
        """200 when the server is up."""
        answer = await self._ask("ServerLive", request, pb.ServerLiveRequest())
        return Response(status_code=200 if answer.live else 503)

    async def ready(self, request: Request) -> Response:
        """200 when the server is ready."""
        answer = await self._ask("ServerReady", request, pb.ServerReadyRequest())
        return Response(status_code=200 if answer.ready else 503)

    async def model(self, request: Request) -> Response:
        """Inputs and outputs."""
        name, version = _place(request)
        message = pb.ModelMetadataRequest(name=name, version=version)
        return _json(to_dict(await self._ask("ModelMetadata", request, message)))

    async def model_ready(self, request: Request) -> Response:
        """200 when the model is ready, else 404 by the protocol's custom of Triton: 400."""
        name, version = _place(request)
        answer = await self._ask(
            "ModelReady", request, pb.ModelReadyRequest(name=name, version=version)
        )
        return Response(status_code=200 if answer.ready else 400)

    async def statistics(self, request: Request) -> Response:
        """Counters."""
        name, version = _place(request)
        message = pb.ModelStatisticsRequest(name=name, version=version)
        return _json(to_dict(await self._ask("ModelStatistics", request, message)))

    async def index(self, request: Request) -> Response:
        """Models and states."""
        body = parse_json(await self._upstream.body(request))
        message = pb.RepositoryIndexRequest(ready=bool(body.get("ready")))
        return _json(to_dict(await self._ask("RepositoryIndex", request, message))["models"])

    async def load(self, request: Request) -> Response:
        """Load a model."""
        body = parse_json(await self._upstream.body(request))
        message = pb.RepositoryModelLoadRequest(model_name=request.path_params["name"])
        for name in body.get("parameters") or {}:
            message.parameters[str(name)].string_param = ""
        await self._ask("RepositoryModelLoad", request, message)
        return Response(status_code=200)

    async def unload(self, request: Request) -> Response:
        """Unload a model."""
        message = pb.RepositoryModelUnloadRequest(model_name=request.path_params["name"])
        await self._ask("RepositoryModelUnload", request, message)
        return Response(status_code=200)

    async def infer(self, request: Request) -> Response:
        """Run a model: JSON tensors, binary tensors, or both."""
        raw = await self._upstream.body(request)
        message, wants_binary = read_infer(raw, request.headers.get(HEADER), *_place(request))
        data, trailers = await self._upstream.unary(INFER, request, message.SerializeToString())
        accepted = request.headers.get("accept-encoding", "")
        headers, body = write_infer(pb.ModelInferResponse.FromString(data), wants_binary, accepted)
        return Response(body, headers={**trailers, **headers})


def read_infer(
    raw: bytes, head_size: str | None, name: str, version: str
) -> tuple[pb.ModelInferRequest, Callable[[str], bool]]:
    """The request of a body, and which outputs are wanted as binary.

    Args:
        head_size: what `inference-header-content-length` says; None without binary tensors.

    Raises:
        InvalidArgument: the place in the body, and what is allowed there.
    """
    if head_size is not None and (not head_size.isdigit() or int(head_size) > len(raw)):
        raise InvalidArgument.at(HEADER, f"is {head_size!r:.30}; the body has {len(raw)} bytes")
    split = int(head_size) if head_size is not None else len(raw)
    body, binary = parse_json(raw[:split]), memoryview(raw)[split:]
    message = pb.ModelInferRequest(
        model_name=name, model_version=version, id=_text(body.get("id", ""), "id")
    )
    _read_inputs(body.get("inputs"), binary, message)
    return message, _read_outputs(body, message)


def refused(status: status_pb2.Status) -> tuple[int, dict[str, str], bytes]:
    """An error in the protocol's shape, {"error": text}: status, headers, body."""
    error = http_error(status)
    return error.status, http_errors.headers_of(error), orjson.dumps({"error": error.message})


def _guarded(endpoint: Endpoint) -> Endpoint:
    """Errors in the protocol's shape: {"error": text}."""

    async def run(request: Request) -> Response:
        more: dict[str, str] = {}
        try:
            return await endpoint(request)
        except aio.AioRpcError as e:
            status = http_errors.from_rpc(e)
        except ForebayError as e:
            status = e.to_status()
        except ClientGone:
            return Response(status_code=499)
        except Exception:
            status, more = http_errors.our_fault(request)
        code, headers, body = refused(status)
        headers = {**headers, **more}
        return Response(body, status_code=code, media_type="application/json", headers=headers)

    return run


def _place(request: Request) -> tuple[str, str]:
    return request.path_params.get("name", ""), request.path_params.get("version", "")


def _json(value: Any) -> Response:
    return Response(dumps(value), media_type="application/json")


def _text(value: Any, path: str) -> str:
    if not isinstance(value, str):
        raise InvalidArgument.at(path, "must be a string")
    return value


def _list(value: Any, path: str) -> list[Any]:
    if not isinstance(value, list):
        raise InvalidArgument.at(path, "must be a list")
    return value


def _read_inputs(inputs: Any, binary: memoryview, message: pb.ModelInferRequest) -> None:
    at = 0
    for i, tensor in enumerate(_list(inputs, "inputs")):
        path = f"inputs[{i}]"
        if not isinstance(tensor, dict):
            raise InvalidArgument.at(path, "must be an object")
        shape = _list(tensor.get("shape"), f"{path}.shape")
        if not all(
            isinstance(d, int) and not isinstance(d, bool) and 0 <= d < 2**31 for d in shape
        ):
            raise InvalidArgument.at(f"{path}.shape", "must be whole numbers from 0")
        datatype = _text(tensor.get("datatype"), f"{path}.datatype")
        message.inputs.add(
            name=_text(tensor.get("name"), f"{path}.name"), datatype=datatype, shape=shape
        )
        parameters = tensor.get("parameters") or {}
        size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
        if size is not None:
            if not isinstance(size, int) or size < 0 or at + size > len(binary):
                raise InvalidArgument.at(
                    f"{path}.parameters.binary_data_size",
                    f"is {size!r:.30}; {len(binary) - at} bytes are left",
                )
            message.raw_input_contents.append(bytes(binary[at : at + size]))
            at += size
        else:
            message.raw_input_contents.append(_raw(tensor.get("data"), datatype, path))
    if at != len(binary):
        raise InvalidArgument.at("body", f"has {len(binary) - at} bytes that no input names")


def _raw(data: Any, datatype: str, path: str) -> bytes:
    """JSON data, flat or nested, as raw bytes."""
    values = _flat(_list(data, f"{path}.data"))
    if datatype == "BYTES":
        out = []
        for i, value in enumerate(values):
            text = _text(value, f"{path}.data[{i}]").encode()
            out.append(struct.pack("<I", len(text)) + text)
        return b"".join(out)
    if datatype not in DTYPES:
        raise InvalidArgument.at(
            f"{path}.datatype", f"is {datatype!r}; allowed are {', '.join([*DTYPES, 'BYTES'])}"
        )
    wrong = next((v for v in values if not isinstance(v, (int, float))), None)
    if wrong is not None or (None in values):
        raise InvalidArgument.at(f"{path}.data", f"holds {wrong!r:.30}; numbers are needed")
    try:
        return np.array(values, DTYPES[datatype]).tobytes()
    except (OverflowError, ValueError) as e:
        raise InvalidArgument.at(f"{path}.data", f"does not fit {datatype}: {e}") from None


def _flat(values: list[Any]) -> list[Any]:
    out: list[Any] = []
    stack = [iter(values)]
    while stack:
        for value in stack[-1]:
            if isinstance(value, list):
                stack.append(iter(value))
                break
            out.append(value)
        else:
            stack.pop()
    return out


def _read_outputs(body: dict[str, Any], message: pb.ModelInferRequest) -> Callable[[str], bool]:
    """Add the outputs asked for; tells which of them are wanted as binary."""
    parameters = body.get("parameters") or {}
    default = bool(parameters.get("binary_data_output")) if isinstance(parameters, dict) else False
    wishes: dict[str, bool] = {}
    for i, output in enumerate(_list(body.get("outputs") or [], "outputs")):
        if not isinstance(output, dict):
            raise InvalidArgument.at(f"outputs[{i}]", "must be an object")
        name = _text(output.get("name"), f"outputs[{i}].name")
        own = output.get("parameters") or {}
        if isinstance(own, dict) and own.get("classification"):
            raise InvalidArgument.at(f"outputs[{i}].parameters.classification", "is not supported")
        wishes[name] = bool(own.get("binary_data", default)) if isinstance(own, dict) else default
        message.outputs.add(name=name)
    return lambda name: wishes.get(name, default)


def write_infer(
    answer: pb.ModelInferResponse, wants_binary: Callable[[str], bool], accepted: str
) -> tuple[dict[str, str], bytes]:
    """Headers and body of an answer. `accepted` is the request's `accept-encoding`."""
    outputs, binary = [], []
    for tensor, raw in zip(answer.outputs, answer.raw_output_contents, strict=True):
        one: dict[str, Any] = {
            "name": tensor.name,
            "datatype": tensor.datatype,
            "shape": list(tensor.shape),
        }
        if wants_binary(tensor.name):
            one["parameters"] = {"binary_data_size": len(raw)}
            binary.append(raw)
        elif tensor.datatype == "BYTES":
            one["data"] = _strings(raw)
        else:
            values = np.frombuffer(raw, DTYPES[tensor.datatype])
            one["data"] = values.astype(np.float32) if tensor.datatype == "FP16" else values
        outputs.append(one)
    head: dict[str, Any] = {
        "model_name": answer.model_name,
        "model_version": answer.model_version,
        "outputs": outputs,
    }
    if answer.id:
        head["id"] = answer.id
    text = dumps(head)
    headers: dict[str, str] = {}
    body = text
    if binary:
        headers[HEADER] = str(len(text))
        body = text + b"".join(binary)
    # Only what tritonclient asks for by its own flags: browsers' wishes are the proxy's business.
    if accepted == "gzip":
        body, headers["content-encoding"] = gzip.compress(body, 1), "gzip"
    elif accepted == "deflate":
        body, headers["content-encoding"] = zlib.compress(body, 1), "deflate"
    headers["content-type"] = "application/octet-stream" if binary else "application/json"
    return headers, body


def _strings(raw: bytes) -> list[str]:
    out, at = [], 0
    while at < len(raw):
        (size,) = struct.unpack_from("<I", raw, at)
        out.append(raw[at + 4 : at + 4 + size].decode("utf-8", "replace"))
        at += 4 + size
    return out
