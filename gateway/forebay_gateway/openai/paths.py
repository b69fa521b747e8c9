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


def _post(
    summary: str, properties: dict[str, Any], required: list[str], more: bool = False
) -> dict[str, Any]:
    """A door's POST; `more`: it has fields that are not written here."""
    schema = {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": more,
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

_MESSAGES: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"type": "object"}}
_LIMIT = {"name": "limit", "in": "query", "schema": {"type": "integer", "minimum": 1}}
_AFTER = {"name": "after", "in": "query", "schema": {"type": "string"}}


def _named(name: str) -> list[dict[str, Any]]:
    """The parameter of a path."""
    schema = {"type": "string", "minLength": 1}
    return [{"name": name, "in": "path", "required": True, "schema": schema}]


def _of_one(name: str, what: str, verbs: dict[str, str]) -> dict[str, Any]:
    """Operations on one thing: by verb, what each does to it."""
    out: dict[str, Any] = {}
    for verb, does in verbs.items():
        out[verb] = {**_get(f"{does} {what}", _named(name))["get"]}
    return out


_BATCH = {
    "input_file_id": {"type": "string"},
    "endpoint": {
        "type": "string",
        "enum": ["/v1/chat/completions", "/v1/completions", "/v1/embeddings"],
    },
    "completion_window": {"type": "string", "description": "A number and m, h or d: 24h."},
    "metadata": {"type": "object", "additionalProperties": {"type": "string"}},
}
_FILE = {
    "post": {
        **_post("Store a file", {}, [])["post"],
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "properties": {
                            "file": {"type": "string", "format": "binary"},
                            "purpose": {"type": "string"},
                        },
                        "required": ["file", "purpose"],
                    }
                }
            },
        },
    },
    **_get("List files", [_LIMIT, _AFTER]),
}

#: Doors with many more fields than are written here: docs/openai.md has them.
_LANGUAGE: dict[str, Any] = {
    "/v1/chat/completions": _post(
        "Answer a conversation",
        {
            "model": {"type": "string"},
            "messages": _MESSAGES,
            "temperature": {"type": "number"},
            "max_tokens": {"type": "integer"},
            "stream": {"type": "boolean"},
        },
        ["model", "messages"],
        more=True,
    ),
    "/v1/completions": _post(
        "Continue a text",
        {
            "model": {"type": "string"},
            "prompt": _STRINGS,
            "temperature": {"type": "number"},
            "max_tokens": {"type": "integer"},
            "stream": {"type": "boolean"},
        },
        ["model", "prompt"],
        more=True,
    ),
    "/v1/messages": _post(
        "Answer a conversation (Anthropic's shape)",
        {
            "model": {"type": "string"},
            "messages": _MESSAGES,
            "max_tokens": {"type": "integer"},
            "stream": {"type": "boolean"},
        },
        ["model", "messages", "max_tokens"],
        more=True,
    ),
    "/v1/messages/count_tokens": _post(
        "Count the tokens of a conversation (Anthropic's shape)",
        {"model": {"type": "string"}, "messages": _MESSAGES},
        ["model", "messages"],
        more=True,
    ),
    "/v1/responses": _post(
        "Answer, and keep the conversation",
        {
            "model": {"type": "string"},
            "input": {
                "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]
            },
            "instructions": {"type": "string"},
            "previous_response_id": {"type": "string"},
            "store": {"type": "boolean"},
            "stream": {"type": "boolean"},
        },
        ["model"],
        more=True,
    ),
    "/v1/responses/{response}": _of_one(
        "response", "a response", {"get": "Get", "delete": "Delete"}
    ),
    "/v1/responses/{response}/input_items": _get("List what it was given", _named("response")),
    "/v1/responses/{response}/cancel": _of_one("response", "a response", {"post": "Cancel"}),
    "/v1/files": _FILE,
    "/v1/files/{file}": _of_one("file", "a file", {"get": "Get", "delete": "Delete"}),
    "/v1/files/{file}/content": _get("Get a file's bytes", _named("file")),
    "/v1/batches": {
        **_post(
            "Run a file's requests", _BATCH, ["input_file_id", "endpoint", "completion_window"]
        ),
        **_get("List batches", [_LIMIT, _AFTER]),
    },
    "/v1/batches/{batch}": _get("Get a batch", _named("batch")),
    "/v1/batches/{batch}/cancel": _of_one("batch", "a batch", {"post": "Cancel"}),
}

PATHS: dict[str, Any] = {
    **_LANGUAGE,
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
            "truncation": {
                "type": "string",
                "enum": ["end", "start", "none"],
                "default": "end",
                "description": "Where inputs beyond the model's limit are cut; none: 400.",
            },
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
