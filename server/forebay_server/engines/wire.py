"""Messages between the server and an engine's process: a JSON header and raw array buffers.

No pickle: a frame is `length of header | header | buffers`. Strings travel as lengths and bytes.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Mapping
from typing import Any, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

_HEAD = struct.Struct("<IQ")
#: Bounds that no honest frame reaches; a broken peer must not make us allocate the world.
MAX_HEADER, MAX_BODY = 64 << 20, 8 << 30

Arrays = Mapping[str, NDArray[Any]]


def send(sock: socket.socket, header: Mapping[str, Any], arrays: Arrays) -> None:
    """Send one frame. Blocks; the GIL is released in the socket."""
    described = []
    buffers: list[memoryview | bytes] = []
    for name, array in arrays.items():
        if array.dtype == object:
            parts = [v if isinstance(v, bytes) else str(v).encode() for v in array.reshape(-1)]
            data = b"".join(struct.pack("<I", len(p)) + p for p in parts)
            described.append((name, "BYTES", array.shape, len(data)))
            buffers.append(data)
        else:
            flat = np.ascontiguousarray(array)  # which gives a scalar a dimension
            described.append((name, flat.dtype.str, array.shape, flat.nbytes))
            if flat.nbytes:
                buffers.append(memoryview(cast(Any, flat)).cast("B"))
    head = msgspec.json.encode({**header, "arrays": described})
    body = sum(d[3] for d in described)
    sock.sendall(_HEAD.pack(len(head), body) + head)
    for buffer in buffers:
        sock.sendall(buffer)


def receive(sock: socket.socket) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """The next frame. Raises EOFError when the peer is gone."""
    head_size, body_size = _HEAD.unpack(_exactly(sock, _HEAD.size))
    if head_size > MAX_HEADER or body_size > MAX_BODY:
        raise EOFError("the peer sent a frame beyond all bounds")
    header = msgspec.json.decode(_exactly(sock, head_size))
    body = memoryview(_exactly(sock, body_size))
    arrays: dict[str, NDArray[Any]] = {}
    at = 0
    for name, dtype, shape, size in header.pop("arrays"):
        data = body[at : at + size]
        at += size
        if dtype == "BYTES":
            arrays[name] = np.array(_strings(data), object).reshape(shape)
        else:
            arrays[name] = np.frombuffer(data, np.dtype(dtype)).reshape(shape)
    return header, arrays


def _strings(data: memoryview) -> list[bytes]:
    out, at = [], 0
    while at < len(data):
        (size,) = struct.unpack_from("<I", data, at)
        out.append(bytes(data[at + 4 : at + 4 + size]))
        at += 4 + size
    return out


def _exactly(sock: socket.socket, size: int) -> bytearray:
    out = bytearray(size)
    view = memoryview(out)
    got = 0
    while got < size:
        n = sock.recv_into(view[got:])
        if n == 0:
            raise EOFError("the peer is gone")
        got += n
    return out
