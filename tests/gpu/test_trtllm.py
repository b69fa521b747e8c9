"""TensorRT-LLM, where an NVIDIA GPU and the package are. Has not run yet: no such machine was there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from forebay.v1 import generation_pb2 as pb
from forebay.v1 import generation_pb2_grpc as rpc

from tests.conftest import Live, Start
from tests.integration.chats import text_of, user
from tests.integration.language_models import TINY

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.timeout(1200)]


def trtllm_python() -> Path:
    """FOREBAY_TEST_TRTLLM_PYTHON, else this Python. Skips where a GPU or the package is missing."""
    if shutil.which("nvidia-smi") is None or subprocess.run(["nvidia-smi", "-L"]).returncode:
        pytest.skip("no NVIDIA GPU")
    python = Path(os.environ.get("FOREBAY_TEST_TRTLLM_PYTHON", sys.executable))
    probe = "import importlib.util as u, sys; sys.exit(u.find_spec('tensorrt_llm') is None)"
    if subprocess.run([str(python), "-c", probe]).returncode:
        pytest.skip(f"no tensorrt_llm in {python}: set FOREBAY_TEST_TRTLLM_PYTHON")
    if not TINY.is_dir():
        pytest.skip("the tiny language model was not made: `make tiny-lm`")
    return python


@pytest.fixture(scope="module", params=["pytorch", "engine"])
def model(
    request: pytest.FixtureRequest, start: Start, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Live]:
    """The tiny model by the PyTorch backend, and as an engine that was built."""
    python = trtllm_python()
    root = tmp_path_factory.mktemp("models")
    if request.param == "engine":
        from forebay_exporters.tensorrt_llm_export import export_tensorrt_llm

        limits = {"max_batch_size": 64, "max_seq_len": 2048}
        export_tensorrt_llm(TINY, root, "tiny", 1, python, limits)
    else:
        shutil.copytree(TINY, root / "tiny" / "1")
    settings = "engine: tensorrt_llm\ngeneration: {tool_parser: hermes}\n"
    (root / "tiny" / "model.yaml").write_text(settings)
    live = start(root, generation__trtllm_python=python)
    yield live
    live.stop()


def test_it_answers_streams_counts_and_keeps_to_a_form(model: Live) -> None:
    stub = rpc.GenerationServiceStub(model.channel)
    whole = stub.Chat(user("Who are you?"))
    events = list(stub.ChatStream(pb.ChatStreamRequest(request=user("Who are you?"))))
    streamed = "".join(e.text.text for e in events if e.HasField("text"))
    assert streamed == text_of(whole.choices[0])
    assert events[-1].usage.completion_tokens == whole.generation_usage.completion_tokens
    request = user("Hello")
    request.response_format.choices.extend(["yes", "no"])
    assert text_of(stub.Chat(request).choices[0]) in ("yes", "no")


def test_a_cancelled_stream_is_given_back(model: Live) -> None:
    stub = rpc.GenerationServiceStub(model.channel)
    request = user("Count to 30", max_tokens=1900, ignore_eos=True)
    call = stub.ChatStream(pb.ChatStreamRequest(request=request))
    next(e for e in call if e.HasField("text"))
    call.cancel()
    with pytest.raises(grpc.RpcError):
        list(call)
    assert text_of(stub.Chat(user("Who are you?"), timeout=60).choices[0])
