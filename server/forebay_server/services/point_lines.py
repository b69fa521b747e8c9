"""Points of NDJSON files, one a line, that come in pieces."""

from __future__ import annotations

from typing import NamedTuple

import orjson
from forebay import proto_json
from forebay.constraints import Validator
from forebay.errors import InvalidArgument
from forebay.twin.v1 import collection_pb2 as twin
from forebay.v1 import collection_pb2 as pb

from forebay_server.dataplane.collections import NewPoint
from forebay_server.services.collection_messages import new_point

#: Points that are written together.
NDJSON_POINTS = 1000
#: Bytes of one line.
MAX_LINE = 4 << 20


class Group(NamedTuple):
    """Points that are written together, with the line that each stood in."""

    points: list[NewPoint]
    places: list[str]


class PointLines:
    """See the module."""

    def __init__(self, validator: Validator) -> None:
        self._validator = validator
        self._rest = b""
        self._path = ""
        self._line = 0
        self._group = Group([], [])

    def feed(self, path: str, data: bytes) -> list[Group]:
        """Full groups of points after one more piece."""
        out: list[Group] = []
        if path != self._path:
            self._take(self._rest, out)
            self._path, self._line, self._rest = path, 0, b""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._take(line, out)
        if len(self._rest) > MAX_LINE:
            where = f"{self._path}:{self._line + 1}"
            raise InvalidArgument.at(where, f"is a line of more than {MAX_LINE} bytes")
        return out

    def end(self) -> list[Group]:
        """What is left."""
        out: list[Group] = []
        self._take(self._rest, out)
        self._rest = b""
        if self._group.points:
            out.append(self._group)
            self._group = Group([], [])
        return out

    def _take(self, line: bytes, out: list[Group]) -> None:
        self._line += 1
        if not line.strip():
            return
        where = f"{self._path}:{self._line}"
        message = pb.Point()
        try:
            proto_json.parse(orjson.loads(line), message)
            self._validator.check(message)
        except orjson.JSONDecodeError as e:
            raise InvalidArgument.at(where, f"is no point: {e}"[:300]) from None
        except InvalidArgument as e:
            raise InvalidArgument.at(where, e.message) from None
        double = twin.Point.FromString(message.SerializeToString())
        self._group.points.append(new_point(double, where))
        self._group.places.append(where)
        if len(self._group.points) >= NDJSON_POINTS:
            out.append(self._group)
            self._group = Group([], [])
