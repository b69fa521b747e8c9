"""Lines of batches' files: OpenAI's requests to the contract's items, and results back."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import orjson
from forebay.errors import (
    HTTP_BY_CODE,
    HTTP_BY_REASON,
    FieldViolation,
    ForebayError,
    InvalidArgument,
    http_error,
)
from forebay.twin.v1 import embedding_pb2 as twin
from forebay.v1 import batch_pb2 as pb

from forebay_gateway import http_errors, rest
from forebay_gateway.json_codec import dumps
from forebay_gateway.openai import chat, completions, embeddings, fields, generation

#: Bytes of one line: its item must fit into a message.
MAX_LINE = 8 << 20
ENDPOINTS: Mapping[str, str] = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "complete",
    "/v1/embeddings": "embed",
}
_WORDS: Mapping[str, Callable[[dict[str, Any]], rest.Rename]] = {
    "/v1/chat/completions": chat.words,
    "/v1/completions": completions.words,
    "/v1/embeddings": embeddings.words,
}
_KNOWN = ("custom_id", "method", "url", "body")
#: Reasons that OpenAI's own files name in a way of their own.
_NOT_RUN = {"BATCH_EXPIRED": "batch_expired"}


async def split(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Lines of a file that comes in pieces; empty ones are left out. A line that is too long comes
    as its beginning, which is no JSON."""
    rest, skipping = b"", False
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for one in lines:
            if skipping:
                skipping = False
            elif one.strip():
                yield one
        if len(rest) > MAX_LINE:
            if not skipping:
                yield rest[:1000]
            rest, skipping = b"", True
    if rest.strip() and not skipping:
        yield rest


def read(line: bytes, number: int, endpoint: str) -> pb.BatchItem:
    """The item of a line; a bad line is an item that has failed."""
    item = pb.BatchItem()
    try:
        _read(line, number, endpoint, item)
    except ForebayError as e:
        error, _ = http_errors.error_object(generation.renamed(e.to_status()))
        name = item.custom_id
        item.Clear()
        item.custom_id = name
        item.invalid.code, item.invalid.reason = e.code, e.reason
        item.invalid.message = error.message[:4000]
        item.invalid.field = (error.param or "")[:256]
    return item


def _read(line: bytes, number: int, endpoint: str, item: pb.BatchItem) -> None:
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as e:
        raise InvalidArgument.at(f"line {number}", f"is not JSON: {e}") from None
    if not isinstance(value, dict):
        raise InvalidArgument.at(f"line {number}", "is no JSON object")
    item.custom_id = fields.text(value, "custom_id")[:512]
    fields.only(value, _KNOWN)
    if value.get("method") != "POST":
        raise InvalidArgument.at("method", f"is {value.get('method')!r:.20}; POST is needed")
    if value.get("url") != endpoint:
        raise InvalidArgument.at(
            "url", f"is {value.get('url')!r:.60}; this batch's endpoint is {endpoint}"
        )
    body = value.get("body")
    if not isinstance(body, dict):
        raise InvalidArgument.at("body", "an object is needed")
    for name in ("stream", "stream_options"):
        if body.pop(name, None):
            raise InvalidArgument.at(name, "has no meaning in a batch")
    kind, form = ENDPOINTS[endpoint], ""
    if kind == "chat":
        item.chat.CopyFrom(chat.read(body))
    elif kind == "complete":
        item.complete.CopyFrom(completions.read(body))
    else:
        request, form = embeddings.read(body)
        item.embed.CopyFrom(request)
    item.note = _note(endpoint, body, form)


def _note(endpoint: str, body: Mapping[str, Any], form: str) -> str:
    """What a result's line needs of its request: where it was sent, the form of its vectors, and which
    of several words its caller used, as the doors' `words` ask for it."""
    said = [n for n in ("max_completion_tokens", "structured_outputs") if body.get(n) is not None]
    for name in ("prompt", "input"):
        value = body.get(name)
        if isinstance(value, list) and isinstance(value[0], (str, list)):
            said.append(name)
    return orjson.dumps({"endpoint": endpoint, "form": form, "said": said}).decode()


def _noted(note: str) -> tuple[str, rest.Rename]:
    """The form of the vectors, and the words of the request; of notes that are not this door's, too:
    callers by gRPC write their own."""
    try:
        value = orjson.loads(note)
    except orjson.JSONDecodeError:
        value = None
    found = value if isinstance(value, dict) else {}
    make, said = fields.named(_WORDS, found.get("endpoint")), found.get("said")
    if make is None or not isinstance(said, list):
        return ("base64" if note == "base64" else "float"), generation.renamed
    form = "base64" if found.get("form") == "base64" else "float"
    return form, make({name: [""] for name in said if isinstance(name, str)})


def line(result: pb.BatchResult) -> bytes:
    """The line of a result."""
    out: dict[str, Any] = {
        "id": f"batch_req_{result.request_id.removeprefix('batch_')}",
        "custom_id": result.custom_id or None,
        "response": None,
        "error": None,
    }
    kind = result.WhichOneof("outcome")
    if kind == "error" and result.error.reason in _NOT_RUN:
        code = _NOT_RUN[result.error.reason]
        out["error"] = {"code": code, "message": result.error.message}
    else:
        status, body = _body(result, kind or "")
        out["response"] = {"status_code": status, "request_id": result.request_id, "body": body}
    return dumps(out) + b"\n"


def _body(result: pb.BatchResult, kind: str) -> tuple[int, dict[str, Any]]:
    created, (form, words) = result.ended_at.seconds, _noted(result.note)
    if kind == "chat":
        return 200, chat.completion(result.chat, created)
    if kind == "complete":
        return 200, completions.completion(result.complete, created)
    if kind == "embed":
        # The same bytes, read without a Python float for each number.
        answer = twin.EmbedResponse.FromString(result.embed.SerializeToString())
        return 200, embeddings.listed(answer, form)
    e = result.error
    status, word = HTTP_BY_CODE.get(e.code, HTTP_BY_CODE["INTERNAL"])
    message, param = e.message, None
    if e.field:
        named = InvalidArgument(FieldViolation(e.field, ""), message=e.message).to_status()
        told = http_error(words(named))
        message, param = told.message, told.param
    error = {"message": message, "type": word, "code": e.reason.lower(), "param": param}
    return HTTP_BY_REASON.get(e.reason, status), {"error": error}
