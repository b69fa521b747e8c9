"""Forms of answers: what a caller's schema or expression must not be able to do."""

from __future__ import annotations

from pathlib import Path

import pytest
from forebay.errors import InvalidArgument
from forebay_server.core.structure import check_enforceable


def test_a_schema_makes_the_server_fetch_nothing(tmp_path: Path) -> None:
    outside = tmp_path / "outside.json"
    outside.write_text('{"type": "integer"}')
    schema = {"$ref": "#/hidden", "hidden": {"$ref": outside.as_uri()}}
    with pytest.raises(InvalidArgument, match="is no valid JSON schema"):
        check_enforceable(schema, "s")


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"type": {"a": 1}}, "type"),
        ({"type": [["string"]]}, "type"),
        ({"properties": {"a": {"format": ["date"]}}}, "properties.a.format"),
        ({"anyOf": 5}, "anyOf"),
        ({"allOf": None}, "allOf"),
        ({"items": {"oneOf": {"a": 1}}}, "items.oneOf"),
    ],
)
def test_a_schema_with_values_of_the_wrong_type_is_refused_with_the_place(
    schema: dict[str, object], place: str
) -> None:
    with pytest.raises(InvalidArgument, match=f"s: {place}: "):
        check_enforceable(schema, "s")
