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
