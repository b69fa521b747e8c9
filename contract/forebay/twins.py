"""Twins: messages that are the same bytes on the wire as the contract's, with vectors as `bytes`.

The server reads requests by their twins, and gateway and server write and read answers by theirs, so
that no number of a vector becomes a Python float. docs/adr/0004.
"""

from __future__ import annotations

from typing import cast

from google.protobuf.message import Message

from forebay.twin.v1 import collection_pb2, embedding_pb2

#: Twins of requests, by the original's full name.
REQUESTS: dict[str, type[Message]] = {
    f"forebay.v1.{kind.__name__}": kind
    for kind in (
        collection_pb2.UpsertPointsRequest,
        collection_pb2.UpsertStreamRequest,
        collection_pb2.SearchRequest,
        collection_pb2.SearchStreamRequest,
    )
}
#: Twins that the gateway reads answers by. Their `bytes` stand for packed little-endian float32.
ANSWERS: dict[str, type[Message]] = {
    "forebay.v1.EmbedResponse": embedding_pb2.EmbedResponse,
    "forebay.v1.GetPointsResponse": collection_pb2.GetPointsResponse,
}


def read_request(kind: type[Message], data: bytes) -> Message:
    """The request of these bytes, as its twin where it has one. Raises DecodeError.

    A client may send floats unpacked, or packed in several pieces: both are right on the wire and
    would be lost on a field of `bytes`. The original reads them all and writes one packed field.
    """
    message = cast(Message, kind.FromString(data))
    twin = REQUESTS.get(kind.DESCRIPTOR.full_name)
    return message if twin is None else twin.FromString(message.SerializeToString())
