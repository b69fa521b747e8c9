"""TensorRT-LLM by its LLM API: `python -m forebay_worker.trtllm SOCKET`, in the Python that has it.

Written against the documented interface of tensorrt_llm 1.x (LLM.generate_async, RequestOutput,
SamplingParams); NOT RUN YET: it needs an NVIDIA GPU and the package. tests/gpu/test_trtllm.py runs
it where both are there.

A folder with `engine/` holds a built engine (forebay export tensorrt-llm), which the TensorRT
backend runs; any other is a Hugging Face folder for the PyTorch backend.
"""

from __future__ import annotations

import asyncio
import queue
import sys
import threading
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from forebay_worker.loop import Refused, Row, failure, main, trimmed

#: Seconds that a step waits for tokens; commands that come meanwhile wait as long.
STEP_S = 0.002
START_S = 60.0
#: What stops an answer; the others are faults.
FINISH = {"stop": "stop", "length": "length"}


class TensorRtStepper:
    """See loop.Stepper. The library drives its own loop: a step hands on what has come since the
    last one."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self._spec = spec
        self._llm = _llm(spec)
        self._tokenizer: Any = self._llm.tokenizer
        self._results: dict[str, Any] = {}
        self._open: dict[str, int] = {}  # answers that go on
        self._rows: queue.SimpleQueue[Row] = queue.SimpleQueue()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    @property
    def busy(self) -> bool:
        """See Stepper."""
        return bool(self._results)

    def facts(self) -> dict[str, Any]:
        """See Stepper."""
        return {}

    def add(self, request: dict[str, Any]) -> list[Row]:
        """See Stepper."""
        try:
            params = self._sampling(request)
            result = self._on_loop(self._start(request, params))
        except (ValueError, TypeError) as e:
            raise Refused(str(e)) from e
        self._results[request["id"]] = result
        self._open[request["id"]] = request["sampling"]["n"]
        return []

    async def _start(self, request: dict[str, Any], params: Any) -> Any:
        # On the loop: the result's queue belongs to the loop that makes it.
        result = self._llm.generate_async(
            {"prompt_token_ids": request["prompt_ids"]},
            sampling_params=params,
            lora_request=self._adapter(request["adapter"]),
            streaming=True,
        )
        self._loop.create_task(self._read(request, result))
        return result

    def _on_loop(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(START_S)

    async def _read(self, request: dict[str, Any], result: Any) -> None:
        answers = [_Answer(request, i, self._tokenizer) for i in range(request["sampling"]["n"])]
        first = True
        try:
            async for out in result:
                if first:
                    first = False
                    self._rows.put([request["id"], "prompt", getattr(out, "cached_tokens", 0) or 0])
                for answer in out.outputs:
                    row = answers[answer.index].row(answer)
                    if row is not None:
                        self._rows.put(row)
        except Exception as e:
            self._rows.put(failure(request["id"], e))

    def abort(self, identifier: str) -> list[Row]:
        """See Stepper."""
        rows = self._drain()
        result = self._end(identifier)
        if result is not None:
            self._loop.call_soon_threadsafe(result.abort)
        return [*rows, [identifier, "aborted"]]

    def _end(self, identifier: str) -> Any:
        self._open.pop(identifier, None)
        return self._results.pop(identifier, None)

    def step(self) -> list[Row]:
        """See Stepper."""
        rows = self._drain()
        if not rows:
            time.sleep(STEP_S)
            rows = self._drain()
        return rows

    def _drain(self) -> list[Row]:
        rows = []
        while not self._rows.empty():
            row = self._rows.get()
            if row[0] not in self._results:
                continue
            rows.append(row)
            if row[1] == "delta" and len(row) > 8 and row[8]:
                self._open[row[0]] -= 1
            if row[1] == "error" or self._open[row[0]] == 0:
                self._end(row[0])
        return rows

    def stats(self) -> dict[str, Any]:
        """See Stepper."""
        return {"running": len(self._results)}

    def _adapter(self, name: str) -> Any:
        if not name:
            return None
        from tensorrt_llm.executor import LoRARequest

        names = sorted(self._spec["adapters"])
        return LoRARequest(name, names.index(name) + 1, self._spec["adapters"][name])

    def _sampling(self, request: dict[str, Any]) -> Any:
        from tensorrt_llm import SamplingParams
        from tensorrt_llm.llmapi import GuidedDecodingParams

        s = request["sampling"]
        guided = None
        if request["structure"] is not None:
            kind, value = request["structure"]
            guided = GuidedDecodingParams(**_guide(kind, value))
        greedy = s["temperature"] == 0
        return SamplingParams(
            max_tokens=s["max_tokens"],
            min_tokens=s["min_tokens"] or None,
            n=s["n"],
            # Nothing set is greedy here; temperature 0 is not taken.
            temperature=None if greedy else s["temperature"],
            top_p=None if greedy else s["top_p"],
            top_k=None if greedy else s["top_k"],
            min_p=s["min_p"] or None,
            seed=s["seed"],
            frequency_penalty=s["frequency_penalty"] or None,
            presence_penalty=s["presence_penalty"] or None,
            repetition_penalty=s["repetition_penalty"],
            stop=list(s["stop"]) or None,
            stop_token_ids=list(s["stop_token_ids"]) or None,
            ignore_eos=s["ignore_eos"],
            logprobs=s["logprobs"],
            guided_decoding=guided,
        )


def _llm(spec: dict[str, Any]) -> Any:
    folder = Path(spec["folder"])
    options = dict(spec["options"])
    options.setdefault("max_batch_size", spec["max_running"])
    options.setdefault("max_seq_len", spec["context_length"])
    options.setdefault("guided_decoding_backend", "xgrammar")
    if spec["adapters"]:
        from tensorrt_llm.lora_manager import LoraConfig

        options.setdefault("lora_config", LoraConfig(lora_dir=list(spec["adapters"].values())))
    if (folder / "engine").is_dir():
        from tensorrt_llm._tensorrt_engine import LLM
    else:
        from tensorrt_llm import LLM
    model = folder / "engine" if (folder / "engine").is_dir() else folder
    return LLM(model=str(model), tokenizer=str(folder), trust_remote_code=False, **options)


def _guide(kind: str, value: Any) -> dict[str, Any]:
    """GuidedDecodingParams' one field."""
    if kind == "json_object":
        return {"json_object": True}
    if kind == "choice":
        import json

        options = " | ".join(json.dumps(c, ensure_ascii=False) for c in value)
        return {"grammar": f"root ::= {options}"}
    return {{"json_schema": "json"}.get(kind, kind): value}


class _Answer:
    """One answer: its outputs grow, rows have what is new."""

    def __init__(self, request: dict[str, Any], index: int, tokenizer: Any) -> None:
        self._id = request["id"]
        self._index = index
        self._tokenizer = tokenizer
        self._text = self._tokens = self._logprobs = 0
        self._ended = False

    def row(self, out: Any) -> Row | None:
        """The row of what is new in an output; None when nothing is."""
        if self._ended:
            return None
        text, tokens = out.text[self._text :], len(out.token_ids) - self._tokens
        finish = out.finish_reason
        if not text and tokens <= 0 and finish is None:
            return None
        if finish is not None and finish not in FINISH:
            raise RuntimeError(f"TensorRT-LLM ended the request with {finish!r}")
        self._ended = finish is not None
        found = list(out.logprobs or ())[self._logprobs :]
        rows = [
            self._likely(token, one)
            for token, one in zip(
                out.token_ids[len(out.token_ids) - len(found) :], found, strict=False
            )
        ]
        self._text, self._tokens = len(out.text), len(out.token_ids)
        self._logprobs += len(found)
        stop = out.stop_reason if isinstance(out.stop_reason, str) else ""
        kind = FINISH[finish] if finish is not None else None
        return trimmed(
            [self._id, "delta", self._index, text, max(0, tokens), "", [], rows, kind, stop, 0]
        )

    def _likely(self, token: int, found: Any) -> list[Any]:
        ranked = sorted(found.items(), key=lambda kv: kv[1].rank or 0)
        own = found.get(token) or ranked[0][1]
        return [self._one(token, own), [self._one(t, p) for t, p in ranked]]

    def _one(self, token: int, found: Any) -> list[Any]:
        return [token, self._tokenizer.decode([token]), found.logprob]


if __name__ == "__main__":
    main(int(sys.argv[1]), TensorRtStepper)
