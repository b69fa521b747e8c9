"""The OpenAPI page's part for routes that are not in the contract."""

from __future__ import annotations

from typing import Any

from forebay_gateway.schema import error_responses

_STRINGS: dict[str, Any] = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
    ]
}
_IDS: dict[str, Any] = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}


def _post(summary: str, properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    schema = {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }
    return {
        "post": {
            "tags": ["OpenAI-compatible"],
            "summary": summary,
            "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
            "responses": {
                "200": {
                    "description": "The answer.",
                    "content": {"application/json": {"schema": {"type": "object"}}},
                },
                **error_responses(),
            },
        }
    }


def _get(summary: str, parameters: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    return {
        "get": {
            "tags": ["OpenAI-compatible"],
            "summary": summary,
            "parameters": parameters or [],
            "responses": {
                "200": {
                    "description": "The answer.",
                    "content": {"application/json": {"schema": {"type": "object"}}},
                },
                **error_responses(),
            },
        }
    }


_RERANK = _post(
    "Rerank documents (Cohere's and Jina's shape)",
    {
        "model": {"type": "string"},
        "query": {"type": "string", "minLength": 1},
        "documents": {
            "type": "array",
            "minItems": 1,
            "items": {
                "anyOf": [
                    {"type": "string"},
                    {
                        "type": "object",
                        "properties": {"text": {"type": "string"}},
                        "required": ["text"],
                    },
                ]
            },
        },
        "top_n": {"type": "integer", "minimum": 1},
        "return_documents": {"type": "boolean"},
    },
    ["query", "documents"],
)

PATHS: dict[str, Any] = {
    "/v1/embeddings": _post(
        "Create embeddings",
        {
            "model": {"type": "string"},
            "input": {
                "anyOf": [
                    *_STRINGS["anyOf"],
                    _IDS,
                    {"type": "array", "items": _IDS, "minItems": 1},
                ]
            },
            "encoding_format": {"type": "string", "enum": ["float", "base64"]},
            "dimensions": {"type": "integer", "minimum": 1},
            "user": {"type": "string", "description": "Accepted; usage is by API key."},
        },
        ["model", "input"],
    ),
    "/v1/models": _get("List models"),
    "/v1/models/{model}": _get(
        "Get a model",
        [
            {
                "name": "model",
                "in": "path",
                "required": True,
                "schema": {"type": "string", "minLength": 1},
            }
        ],
    ),
    "/v1/rerank": _RERANK,
    "/v1/moderations": _post(
        "Flag texts by a classifier's labels",
        {"model": {"type": "string"}, "input": _STRINGS},
        ["input"],
    ),
}
