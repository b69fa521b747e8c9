"""The worker for TensorRT-LLM in its process, on a stand-in for the package (stand_ins/): requests,
streams, aborts and refusals pass through the real loop and socket. The real package: tests/gpu."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest
from forebay.errors import FailedPrecondition, InvalidArgument
from forebay_server.core.generation import (
    ChatContext,
    GenerationRequest,
    GenerationSpec,
    SamplingParameters,
    Structure,
    ToolSpec,
)
from forebay_server.generation.process import WORKERS
from forebay_server.generation.trtllm import TensorRtEngine

STAND_INS = Path(__file__).with_name("stand_ins")


def made(folder: Path, **options: object) -> TensorRtEngine:
    spec = GenerationSpec(
        "m", 1, "tensorrt_llm", str(folder), 128, tool_parser="hermes", options=options
    )
    engine = TensorRtEngine(spec, sys.executable)
    engine._extra["PYTHONPATH"] = os.pathsep.join([str(WORKERS), str(STAND_INS)])
    return engine


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[TensorRtEngine]:
    running = made(tmp_path)
    running.load()
    yield running
    await asyncio.to_thread(running.close)  # it waits for what this loop does


def request(number: int, tokens: int, **kwargs: object) -> GenerationRequest:
    sampling = SamplingParameters(max_tokens=tokens, temperature=0, n=kwargs.pop("n", 1))  # type: ignore[arg-type]
    return GenerationRequest(f"r{number}", sampling, prompt_ids=[1, 2, 3], **kwargs)  # type: ignore[arg-type]


async def test_answers_stream_and_are_counted(engine: TensorRtEngine) -> None:
    asked = request(1, 5, n=2)
    texts, finish = {0: "", 1: ""}, []
    async for delta in engine.generate(asked):
        texts[delta.index] += delta.text
        finish += [delta.finish_reason] if delta.finish_reason else []
    assert texts == {0: "1 2 3 4 5 ", 1: "1 2 3 4 5 "}
    assert finish == ["length", "length"]
    assert (asked.tally.prompt, asked.tally.completion) == (3, 10)


async def test_an_aborted_request_is_counted_as_far_as_it_was_read(engine: TensorRtEngine) -> None:
    asked = request(2, 10_000)
    tokens = 0
    async with aclosing(engine.generate(asked)) as deltas:
        async for delta in deltas:
            tokens += delta.tokens
            if tokens >= 7:
                break
    assert tokens <= asked.tally.completion < 10_000
    after = request(3, 3)
    assert [d async for d in engine.generate(after)]


async def test_what_the_package_refuses_is_the_callers_error(engine: TensorRtEngine) -> None:
    asked = request(4, 5, structure=Structure("regex", "a+"))
    with pytest.raises(InvalidArgument, match="no grammar engine"):
        _ = [d async for d in engine.generate(asked)]
    chat = ChatContext([], [ToolSpec("f")], tool_mode="required")
    with pytest.raises(InvalidArgument, match="cannot enforce calls"):
        engine.generate(request(5, 5, chat=chat))


def test_a_model_that_does_not_load_is_refused_with_the_packages_words(tmp_path: Path) -> None:
    engine = made(tmp_path, unknown=True)
    with pytest.raises(FailedPrecondition, match="unknown option"):
        engine.load()
    engine.close()
