"""Routes whose requests may go straight to the server: it has the HTTP port, and answers them in batches
with the calls of gRPC (docs/adr/0031). The same functions read and write them as in the gateway itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import orjson
from forebay.methods import Method
from forebay.oip import open_inference_pb2 as oip
from forebay.twin.v1 import embedding_pb2 as twin
from forebay.v1 import rerank_pb2 as pb
from google.rpc import status_pb2

from forebay_gateway import http_errors, open_inference, rest
from forebay_gateway.contract import Binding, bindings
from forebay_gateway.json_codec import dumps, parse_json, response_json
from forebay_gateway.openai import embeddings, rerank
from forebay_gateway.upstream import API_KEY, FORWARDED, RETURNED

Written = tuple[Mapping[str, str], bytes]
#: From a response's bytes and the request's id.
Writer = Callable[[bytes, str], Written]
_ENCODING = "accept-encoding"
#: Headers that become metadata of the calls: the gateway's, and what the Open Inference Protocol reads.
HEADERS = (*FORWARDED.values(), API_KEY, open_inference.HEADER, _ENCODING)
#: Headers whose requests are the gateway's: compressed bodies, and what browsers send with every POST of a
#: page, which the gateway may refuse (`origins.py`).
ASIDE = ("content-encoding", "origin")
JSON: Mapping[str, str] = {"content-type": "application/json"}


def _as_it_is(status: status_pb2.Status) -> status_pb2.Status:
    """The words of doors whose fields are the contract's."""
    return status


class _Json:
    """Errors as the contract's doors have them."""

    def refuse(self, status: status_pb2.Status) -> tuple[int, Mapping[str, str], bytes]:
        """See forebay_server.transport.http_port.Route."""
        error, body = http_errors.error_object(status)
        return error.status, http_errors.headers_of(error), orjson.dumps(body)


class Contract(_Json):
    """A unary method of the contract, as its annotation says."""

    def __init__(self, binding: Binding) -> None:
        self.path = binding.path
        self.method = binding.method
        self._names = re.findall(r"{(\w+)}", binding.path)

    def read(
        self, body: bytes, places: Sequence[str], headers: Mapping[str, str]
    ) -> tuple[bytes, Writer, rest.Rename]:
        """See forebay_server.transport.http_port.Route."""
        named = dict(zip(self._names, places, strict=True))
        message = rest.with_places(self.method, parse_json(body), named)
        return message.SerializeToString(), self._write, _as_it_is

    def _write(self, payload: bytes, request_id: str) -> Written:
        return JSON, response_json(self.method.response, payload)


class Embeddings(_Json):
    """OpenAI's /v1/embeddings."""

    path = "/v1/embeddings"
    method = embeddings.EMBED

    def read(
        self, body: bytes, places: Sequence[str], headers: Mapping[str, str]
    ) -> tuple[bytes, Writer, rest.Rename]:
        """See forebay_server.transport.http_port.Route."""
        value = parse_json(body)
        message, form = embeddings.read(value)

        def write(payload: bytes, request_id: str) -> Written:
            return JSON, dumps(embeddings.listed(twin.EmbedResponse.FromString(payload), form))

        return message.SerializeToString(), write, embeddings.words(value)


class Rerank(_Json):
    """/v1/rerank and /v2/rerank, in Cohere's and Jina's shape."""

    method = rerank.RERANK

    def __init__(self, path: str) -> None:
        self.path = path

    def read(
        self, body: bytes, places: Sequence[str], headers: Mapping[str, str]
    ) -> tuple[bytes, Writer, rest.Rename]:
        """See forebay_server.transport.http_port.Route."""
        message = rerank.read(parse_json(body))

        def write(payload: bytes, request_id: str) -> Written:
            answer = pb.RerankResponse.FromString(payload)
            return JSON, dumps(rerank.listed(answer, message.return_documents, request_id))

        return message.SerializeToString(), write, _as_it_is


class Infer:
    """The Open Inference Protocol's `infer`."""

    method: Method = open_inference.INFER

    def __init__(self, path: str) -> None:
        self.path = path

    def read(
        self, body: bytes, places: Sequence[str], headers: Mapping[str, str]
    ) -> tuple[bytes, Writer, rest.Rename]:
        """See forebay_server.transport.http_port.Route."""
        name, version = (*places, "")[:2]
        size = headers.get(open_inference.HEADER)
        message, wants_binary = open_inference.read_infer(body, size, name, version)
        accepted = headers.get(_ENCODING, "")

        def write(payload: bytes, request_id: str) -> Written:
            answer = oip.ModelInferResponse.FromString(payload)
            return open_inference.write_infer(answer, wants_binary, accepted)

        return message.SerializeToString(), write, _as_it_is

    def refuse(self, status: status_pb2.Status) -> tuple[int, Mapping[str, str], bytes]:
        """See forebay_server.transport.http_port.Route."""
        return open_inference.refused(status)


def routes() -> list[Contract | Embeddings | Rerank | Infer]:
    """All of them: methods whose calls are answered in batches."""
    batched = [b for b in bindings() if b.method.batched and b.method.kind == "unary" and b.body]
    infer = [Infer(f"{base}/infer") for base in open_inference.MODELS]
    return [*map(Contract, batched), Embeddings(), *map(Rerank, rerank.PATHS), *infer]


def returned(name: str) -> bool:
    """Whether a call's trailer becomes a header of the answer."""
    return RETURNED.fullmatch(name) is not None
