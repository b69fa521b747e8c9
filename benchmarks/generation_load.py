"""Load on a language model, in a process of its own: streams that start together, by gRPC or SSE."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

Shot = tuple[int, float]


async def grpc_stream(stub: Any, ids: list[int], a: dict[str, Any]) -> Shot:
    """Tokens, and seconds to the first one."""
    from forebay.v1 import generation_pb2 as pb

    sampling = pb.Sampling(temperature=0, max_tokens=a["tokens"], ignore_eos=True)
    request = pb.CompleteRequest(model=a["model"], token_ids=[{"ids": ids}], sampling=sampling)
    started, first, tokens = time.perf_counter(), 0.0, 0
    async for event in stub.CompleteStream(pb.CompleteStreamRequest(request=request)):
        if event.HasField("text"):
            first = first or time.perf_counter() - started
        elif event.HasField("usage"):
            tokens = event.usage.completion_tokens
    return tokens, first


async def sse_stream(client: Any, ids: list[int], a: dict[str, Any]) -> Shot:
    """The same by /v1/completions."""
    body = {
        "model": a["model"],
        "prompt": ids,
        "max_tokens": a["tokens"],
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started, first, tokens = time.perf_counter(), 0.0, 0
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            first = first or time.perf_counter() - started
            if '"usage":{' in line or '"usage": {' in line:
                tokens = json.loads(line[6:])["usage"]["completion_tokens"]
    return tokens, first


async def main() -> None:
    """Arguments as one JSON object; the result as one JSON line."""
    a = json.loads(sys.argv[1])
    if a["kind"] == "grpc":
        from forebay.v1 import generation_pb2_grpc
        from grpc import aio

        stub = generation_pb2_grpc.GenerationServiceStub(aio.insecure_channel(a["target"]))
        one: Any = lambda ids: grpc_stream(stub, ids, a)  # noqa: E731
    else:
        import httpx

        limits = httpx.Limits(max_connections=200)
        client = httpx.AsyncClient(base_url=a["target"], timeout=600, limits=limits)
        one = lambda ids: sse_stream(client, ids, a)  # noqa: E731
    out = {}
    for streams in a["streams"]:
        rates, firsts = [], []
        for r in range(a["rounds"] + 1):
            started = time.perf_counter()
            shots = await asyncio.gather(*(one(ids) for ids in a["prompts"][str(streams)][r]))
            seconds = time.perf_counter() - started
            if r:
                rates.append(sum(t for t, _ in shots) / seconds)
                firsts += [f * 1e3 for _, f in shots]
        out[streams] = {"rates": rates, "first_ms": sorted(firsts)[len(firsts) // 2]}
    print("RESULT " + json.dumps(out), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
