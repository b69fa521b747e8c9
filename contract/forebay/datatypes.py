"""Datatypes of the Open Inference Protocol as numpy has them."""

from __future__ import annotations

from collections.abc import Mapping

#: Datatype -> little-endian numpy dtype; BYTES is apart.
DTYPES: Mapping[str, str] = {
    "BOOL": "?",
    "UINT8": "u1",
    "UINT16": "<u2",
    "UINT32": "<u4",
    "UINT64": "<u8",
    "INT8": "i1",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
    "FP16": "<f2",
    "FP32": "<f4",
    "FP64": "<f8",
}
