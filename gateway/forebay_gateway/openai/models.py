"""/v1/models: ModelService in OpenAI's shape."""

from __future__ import annotations

from typing import Any

from forebay.methods import methods
from forebay.v1 import model_pb2 as pb
from starlette.requests import Request
from starlette.responses import Response

from forebay_gateway.json_codec import dumps
from forebay_gateway.upstream import Upstream

LIST = methods()["/forebay.v1.ModelService/ListModels"]
GET = methods()["/forebay.v1.ModelService/GetModel"]


def list_endpoint(upstream: Upstream) -> Any:
    """GET /v1/models."""

    async def models(request: Request) -> Response:
        message = pb.ListModelsRequest(page_size=1000)
        data, headers = await upstream.unary(LIST, request, message.SerializeToString())
        found = pb.ListModelsResponse.FromString(data).models
        out = {"object": "list", "data": [_model(m) for m in found]}
        return Response(dumps(out), media_type="application/json", headers=headers)

    return models


def get_endpoint(upstream: Upstream) -> Any:
    """GET /v1/models/{model}."""

    async def model(request: Request) -> Response:
        message = pb.GetModelRequest(model=request.path_params["model"])
        data, headers = await upstream.unary(GET, request, message.SerializeToString())
        out = _model(pb.GetModelResponse.FromString(data).model)
        return Response(dumps(out), media_type="application/json", headers=headers)

    return model


def _model(model: pb.Model) -> dict[str, Any]:
    loaded = [v.loaded_at.seconds for v in model.versions if v.HasField("loaded_at")]
    return {
        "id": model.name,
        "object": "model",
        "created": max(loaded, default=0),
        "owned_by": "forebay",
    }
