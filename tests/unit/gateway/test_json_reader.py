"""Compiled readers of JSON say what json_format.ParseDict says, or leave it to say it."""

from __future__ import annotations

import string
from typing import Any

import orjson
import pytest
from forebay.methods import methods
from forebay_gateway import json_reader
from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from hypothesis import given
from hypothesis import strategies as st

REQUESTS = sorted(
    {m.request for m in methods().values()}, key=lambda kind: kind.DESCRIPTOR.full_name
)
TEXTS = st.text(string.printable + "äß漢", max_size=8)
#: JSON of any shape: most of it is wrong where it stands.
ANY: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)


def of_message(descriptor: Descriptor, depth: int = 3) -> st.SearchStrategy[Any]:
    """JSON objects that mostly are such messages."""
    if descriptor.full_name == json_reader.STRUCT or depth == 0:
        return st.dictionaries(TEXTS, ANY, max_size=4)
    names = {f.name: of_field(f, depth) for f in descriptor.fields}
    if not names:
        return st.just({})
    names |= {f.camelcase_name: of_field(f, depth) for f in list(descriptor.fields)[:1]}
    return st.lists(
        st.sampled_from(sorted(names)).flatmap(lambda n: st.tuples(st.just(n), names[n])),
        max_size=5,
    ).map(dict)


def of_field(field: FieldDescriptor, depth: int) -> st.SearchStrategy[Any]:
    """Values that mostly are a field's."""
    if field.message_type is not None:
        one = st.deferred(lambda: of_message(field.message_type, depth - 1))
    elif field.enum_type is not None:
        one = st.sampled_from([v.name for v in field.enum_type.values])
    elif field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        one = st.booleans()
    elif field.type == FieldDescriptor.TYPE_STRING:
        one = TEXTS
    elif field.cpp_type in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        one = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-9, 2**60)
    else:
        one = st.integers(-(2**33), 2**33)
    value = st.lists(one | one | ANY, max_size=3) if field.is_repeated else one
    return st.one_of(value, value, value, value, ANY)


@pytest.mark.parametrize("kind", REQUESTS, ids=lambda kind: kind.DESCRIPTOR.name)
def test_what_is_read_is_what_the_library_reads(kind: Any) -> None:
    @given(of_message(kind.DESCRIPTOR))
    def check(data: dict[str, Any]) -> None:
        data = orjson.loads(orjson.dumps(data, option=orjson.OPT_NON_STR_KEYS, default=str))
        message = kind()
        try:
            json_reader.read(data, message)
        except json_reader.Odd:
            return
        expected = kind()
        json_format.ParseDict(data, expected)  # it has no objection either
        assert message == expected

    check()


PLAIN = {
    FieldDescriptor.CPPTYPE_STRING: "text",
    FieldDescriptor.CPPTYPE_BOOL: True,
    FieldDescriptor.CPPTYPE_FLOAT: 1.5,
    FieldDescriptor.CPPTYPE_DOUBLE: 1.5,
    FieldDescriptor.CPPTYPE_INT32: 7,
    FieldDescriptor.CPPTYPE_INT64: 7,
    FieldDescriptor.CPPTYPE_UINT32: 7,
    FieldDescriptor.CPPTYPE_UINT64: 7,
}


@pytest.mark.parametrize("kind", REQUESTS, ids=lambda kind: kind.DESCRIPTOR.name)
def test_every_plain_field_is_read_here(kind: Any) -> None:
    """Else it would be left to the library, and nothing would be gained."""
    for field in kind.DESCRIPTOR.fields:
        if field.cpp_type not in PLAIN or field.type == FieldDescriptor.TYPE_BYTES:
            continue
        value = PLAIN[field.cpp_type]
        data = {field.name: [value, value] if field.is_repeated else value}
        message, expected = kind(), kind()
        json_reader.read(data, message)
        json_format.ParseDict(data, expected)
        assert message == expected and message.ByteSize()


def test_the_plain_shapes_are_read_here() -> None:
    by_name = {kind.DESCRIPTOR.name: kind for kind in REQUESTS}
    for name, data in {
        "PredictRequest": {"model": "m", "rows": [{"a": 1, "b": 2.5, "c": "x", "d": None}]},
        "EmbedRequest": {"texts": ["a", "b"], "dimensions": 8, "truncation": "TRUNCATION_END"},
        "RerankRequest": {"query": "q", "documents": ["a"], "top_n": 1},
    }.items():
        json_reader.read(data, by_name[name]())
