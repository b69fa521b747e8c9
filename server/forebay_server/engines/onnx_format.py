"""ONNX's files: the few messages of the format that the server reads by itself, without `onnx`."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2 as d
from google.protobuf import descriptor_pool, message_factory


def model_of(data: bytes) -> Any:
    """A model's message. Raises google.protobuf.message.DecodeError."""
    return _message("ModelProto").FromString(data)


def of_any_rank(path: Path, scalars: Iterable[str]) -> frozenset[str]:
    """Those inputs of a file of which it does not say how many dimensions they have. ONNX Runtime
    shows them as scalars: `scalars` are what it shows so, and a file without any is not read."""
    wanted = frozenset(scalars)
    if not wanted:
        return wanted
    inputs = model_of(path.read_bytes()).graph.input
    return wanted & {i.name for i in inputs if not i.type.tensor_type.HasField("shape")}


@cache
def _message(name: str) -> Any:
    """A message of ONNX's format: those of its fields that matter here, all others are kept unread."""
    f = d.FieldDescriptorProto
    optional, repeated = f.LABEL_OPTIONAL, f.LABEL_REPEATED
    messages: dict[str, list[tuple[str, int, int, int, str]]] = {
        "ModelProto": [
            ("graph", 7, optional, f.TYPE_MESSAGE, "GraphProto"),
            ("opset_import", 8, repeated, f.TYPE_MESSAGE, "OperatorSetIdProto"),
            ("functions", 25, repeated, f.TYPE_MESSAGE, "FunctionProto"),
        ],
        "FunctionProto": [("node", 7, repeated, f.TYPE_MESSAGE, "NodeProto")],
        "OperatorSetIdProto": [
            ("domain", 1, optional, f.TYPE_STRING, ""),
            ("version", 2, optional, f.TYPE_INT64, ""),
        ],
        "GraphProto": [
            ("node", 1, repeated, f.TYPE_MESSAGE, "NodeProto"),
            ("initializer", 5, repeated, f.TYPE_MESSAGE, "TensorProto"),
            ("input", 11, repeated, f.TYPE_MESSAGE, "ValueInfoProto"),
            ("output", 12, repeated, f.TYPE_MESSAGE, "ValueInfoProto"),
        ],
        "ValueInfoProto": [
            ("name", 1, optional, f.TYPE_STRING, ""),
            ("type", 2, optional, f.TYPE_MESSAGE, "TypeProto"),
        ],
        "TypeProto": [("tensor_type", 1, optional, f.TYPE_MESSAGE, "TensorTypeProto")],
        "TensorTypeProto": [("shape", 2, optional, f.TYPE_BYTES, "")],
        "TensorProto": [
            ("dims", 1, repeated, f.TYPE_INT64, ""),
            ("data_type", 2, optional, f.TYPE_INT32, ""),
            ("string_data", 6, repeated, f.TYPE_BYTES, ""),
            ("name", 8, optional, f.TYPE_STRING, ""),
        ],
        "NodeProto": [
            ("input", 1, repeated, f.TYPE_STRING, ""),
            ("output", 2, repeated, f.TYPE_STRING, ""),
            ("op_type", 4, optional, f.TYPE_STRING, ""),
            ("attribute", 5, repeated, f.TYPE_MESSAGE, "AttributeProto"),
            ("domain", 7, optional, f.TYPE_STRING, ""),
        ],
        "AttributeProto": [
            ("name", 1, optional, f.TYPE_STRING, ""),
            ("i", 3, optional, f.TYPE_INT64, ""),
            ("s", 4, optional, f.TYPE_BYTES, ""),
            ("g", 6, optional, f.TYPE_MESSAGE, "GraphProto"),
            ("floats", 7, repeated, f.TYPE_FLOAT, ""),
            ("ints", 8, repeated, f.TYPE_INT64, ""),
            ("strings", 9, repeated, f.TYPE_BYTES, ""),
            ("graphs", 11, repeated, f.TYPE_MESSAGE, "GraphProto"),
            ("type", 20, optional, f.TYPE_INT32, ""),
        ],
    }
    file = d.FileDescriptorProto(
        name="forebay/onnx_subset.proto", package="forebay.onnx", syntax="proto2"
    )
    for message, fields in messages.items():
        made = file.message_type.add(name=message)
        for field, number, label, kind, of in fields:
            made.field.add(
                name=field,
                number=number,
                label=label,
                type=kind,
                type_name=f".forebay.onnx.{of}" if of else None,
            )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"forebay.onnx.{name}"))
