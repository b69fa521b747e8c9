"""200 schemas from real function signatures: valid JSON each time, on both engines of this machine;
what cannot be enforced is refused with its place."""

from __future__ import annotations

import gzip
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from forebay.v1 import generation_pb2 as pb
from forebay.v1 import generation_pb2_grpc as rpc
from forebay_server.core.structure import UNENFORCED

from tests.conftest import Start
from tests.integration.chats import refused, text_of, user
from tests.integration.language_models import random_openvino, random_vllm, vllm_python

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module", params=["openvino", "vllm"])
def stub(
    request: pytest.FixtureRequest, start: Start, tmp_path_factory: pytest.TempPathFactory
) -> rpc.GenerationServiceStub:
    root = tmp_path_factory.mktemp("models")
    if request.param == "openvino":
        return rpc.GenerationServiceStub(start(random_openvino(root)).channel)
    python = vllm_python()
    live = start(random_vllm(root), generation__vllm_python=python, generation__vllm_cache_gb=1)
    return rpc.GenerationServiceStub(live.channel)


def schemas(data: Path) -> list[dict[str, Any]]:
    """Arguments' schemas of the function signatures, in JSON schema's words."""
    words = {"dict": "object", "float": "number", "tuple": "array", "any": "string"}

    def plain(s: Any) -> Any:
        if not isinstance(s, dict):
            return s
        out = {k: v for k, v in s.items() if k in ("description", "enum", "required")}
        kind = words.get(s.get("type", "string"), s.get("type", "string"))
        out["type"] = kind
        if kind == "object":
            out["properties"] = {k: plain(v) for k, v in s.get("properties", {}).items()}
            out["required"] = sorted(out["properties"])
            out["additionalProperties"] = False
        elif kind == "array":
            out["items"] = plain(s.get("items", {"type": "string"}))
            out["maxItems"] = 2
        elif kind == "string" and "enum" not in out:
            out["maxLength"] = 12
        elif kind == "integer" and "enum" not in out:
            out |= {"minimum": 0, "maximum": 999}
        if out.get("enum") and kind != "array":
            out = {"enum": out["enum"]}
        return out

    lines = gzip.decompress((data / "toolcall/BFCL_v4_simple_python.jsonl.gz").read_bytes())
    found = [json.loads(x)["function"][0]["parameters"] for x in lines.splitlines()]
    return [plain(p) for p in found][:200]


def test_two_hundred_schemas_give_valid_json(stub: rpc.GenerationServiceStub, data: Path) -> None:
    wanted = schemas(data)
    assert len(wanted) == 200

    def one(schema: dict[str, Any]) -> str:
        """Empty when the answer is good. A number may go on for ever: such an answer ends with
        LENGTH, which is no violation, and another seed is tried."""
        reason = 0
        for seed in range(3):
            request = user("Answer in JSON.", max_tokens=1500, temperature=1, seed=seed)
            request.response_format.json_schema = json.dumps(schema)
            choice = stub.Chat(request).choices[0]
            reason = choice.finish_reason
            if reason == pb.FINISH_REASON_STOP:
                jsonschema_rs.validate(schema, json.loads(text_of(choice)))
                return ""
        return f"ended by {reason}"

    with ThreadPoolExecutor(32) as pool:
        assert [x for x in pool.map(one, wanted) if x] == []


def test_the_same_schemas_with_what_cannot_be_enforced_are_refused(
    stub: rpc.GenerationServiceStub, data: Path
) -> None:
    keywords = sorted(UNENFORCED)
    for i, schema in enumerate(schemas(data)):
        keyword = keywords[i % len(keywords)]
        names = list(schema["properties"])
        name = names[i % len(names)] if names else "more"
        schema["properties"].setdefault(name, {})[keyword] = {}
        request = user("Answer in JSON.", max_tokens=10)
        request.response_format.json_schema = json.dumps(schema)
        said = refused(lambda request=request: stub.Chat(request))
        assert f"properties.{name}.{keyword}" in said["response_format.json_schema"]
