"""vLLM in a process of its own: AsyncLLM behind a Unix socket.

Started by path, in the Python that has vLLM, which need not have Forebay: it imports nothing of it.
Frames are a 4-byte length and a MessagePack object. In: `generate`, `abort`, `stats`. Out: `ready`
or `failed`, then one `step` frame per engine step with what it brought to all requests together.

Tool calls and reasoning are read by vLLM's own parsers, with vLLM's own grammars for them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import sys
from typing import Any

import msgspec

MAX_FRAME = 256 << 20
ENGINE_NICENESS = 5


class Outbox:
    """Gathers what one turn of the loop brings, and writes it as one frame."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._deltas: list[Any] = []
        self._scheduled = False
        self._encoder = msgspec.msgpack.Encoder()

    def delta(self, delta: list[Any]) -> None:
        """Add a delta to the next step frame."""
        self._deltas.append(delta)
        if not self._scheduled:
            self._scheduled = True
            # All requests that an engine step wakes run before this does.
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._scheduled = False
        deltas, self._deltas = self._deltas, []
        self.send({"op": "step", "deltas": deltas})

    def send(self, message: dict[str, Any]) -> None:
        """Write one frame."""
        data = self._encoder.encode(message)
        self._writer.write(struct.pack("<I", len(data)) + data)


class Worker:
    """One model."""

    def __init__(self, spec: dict[str, Any], outbox: Outbox) -> None:
        self._spec = spec
        self._out = outbox
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._stats: dict[str, float] = {}

    async def load(self) -> dict[str, Any]:
        """Start the engine; facts about it."""
        from vllm import AsyncEngineArgs
        from vllm.config import StructuredOutputsConfig
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.metrics.loggers import StatLoggerBase

        stats = self._stats

        class Gauges(StatLoggerBase):
            def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
                pass

            def record(
                self,
                scheduler_stats: Any,
                iteration_stats: Any,
                mm_cache_stats: Any = None,
                engine_idx: int = 0,
            ) -> None:
                if scheduler_stats is not None:
                    stats["running"] = scheduler_stats.num_running_reqs
                    stats["waiting"] = scheduler_stats.num_waiting_reqs
                    stats["kv_use"] = scheduler_stats.kv_cache_usage
                if iteration_stats is not None:
                    for name in ("num_generation_tokens", "num_prompt_tokens"):
                        stats[name] = stats.get(name, 0) + getattr(iteration_stats, name)

            def log_engine_initialized(self) -> None:
                pass

        spec = self._spec
        options = dict(spec["options"])
        if spec["adapters"]:
            options.setdefault("enable_lora", True)
            options.setdefault("max_loras", len(spec["adapters"]))
        # Else a model may say line breaks for ever between two names of a JSON object.
        structured = StructuredOutputsConfig(backend="xgrammar", disable_any_whitespace=True)
        options.setdefault("structured_outputs_config", structured)
        args = AsyncEngineArgs(
            model=spec["folder"],
            max_model_len=spec["context_length"],
            max_num_seqs=spec["max_running"],
            **options,
        )
        config = args.create_engine_config()
        self.llm = AsyncLLM.from_vllm_config(config, stat_loggers=[Gauges])
        self._tokenizer = self.llm.get_tokenizer()
        self._model_config = config.model_config
        self._parser = None
        if spec["tool_parser"] or spec["reasoning_parser"]:
            from vllm.parser import ParserManager

            self._parser = ParserManager.get_parser(
                tool_parser_name=spec["tool_parser"] or None,
                reasoning_parser_name=spec["reasoning_parser"] or None,
                enable_auto_tools=bool(spec["tool_parser"]),
                model_name=spec["folder"],
                tokenizer=self._tokenizer,
            )
        _yield_to_front()
        blocks = config.cache_config.num_gpu_blocks
        return {"kv_blocks": blocks or 0, "pid": os.getpid()}

    def start(self, request: dict[str, Any]) -> None:
        """Begin to generate."""
        self._tasks[request["id"]] = asyncio.create_task(self._generate(request))

    async def abort(self, identifier: str) -> None:
        """Stop a request; its last delta says so, with exact counts."""
        task = self._tasks.get(identifier)
        if task is None:
            self._out.delta([identifier, "aborted", 0, 0])
            return
        task.cancel()

    async def _generate(self, request: dict[str, Any]) -> None:
        from vllm.exceptions import VLLMClientError

        identifier = request["id"]
        try:
            await self._run(request)
        except asyncio.CancelledError:
            self._out.delta([identifier, "aborted"])
        except (ValueError, VLLMClientError) as e:
            self._out.delta([identifier, "error", "invalid", str(e)[:500]])
        except Exception as e:
            from vllm.v1.engine.exceptions import EngineDeadError

            kind = "dead" if isinstance(e, EngineDeadError) else "internal"
            self._out.delta([identifier, "error", kind, f"{type(e).__name__}: {e}"[:500]])
            if kind == "dead":
                os._exit(70)  # the server starts a new process
        finally:
            self._tasks.pop(identifier, None)

    async def _run(self, request: dict[str, Any]) -> None:
        from vllm.inputs import TokensPrompt

        chat = self._chat(request)
        params = self._sampling(request, chat)
        prompt = TokensPrompt(prompt_token_ids=request["prompt_ids"])
        answers = [_Answer(self, request, chat, i) for i in range(request["sampling"]["n"])]
        # Not by generate(): it throws away what it holds when it is cancelled, and with it the count.
        queue = await self.llm.add_request(
            request["id"],
            prompt,
            params,
            lora_request=self._lora(request["adapter"]),
            priority=-request["priority"],
        )
        first, finished = True, False
        try:
            while not finished:
                out = queue.get_nowait() or await queue.get()
                finished = out.finished
                if first:
                    first = False
                    self._out.delta([request["id"], "prompt", out.num_cached_tokens or 0])
                for answer in out.outputs:
                    self._out.delta(answers[answer.index].delta(answer))
        except BaseException:
            await self.llm.abort(queue.request_id, internal=True)
            rest = queue.get_nowait()
            tokens = sum(len(o.token_ids) for o in rest.outputs) if rest is not None else 0
            if tokens:
                self._out.delta([request["id"], "prompt" if first else "more", 0, tokens])
            raise
        finally:
            queue.close()

    def _lora(self, name: str) -> Any:
        if not name:
            return None
        from vllm.lora.request import LoRARequest

        names = sorted(self._spec["adapters"])
        return LoRARequest(name, names.index(name) + 1, self._spec["adapters"][name])

    def _chat(self, request: dict[str, Any]) -> Any:
        """vLLM's view of a conversation, for its parsers; None where none is needed."""
        chat = request["chat"]
        if chat is None or self._parser is None:
            return None
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

        choice: Any = chat["tool_mode"]
        if choice == "named":
            choice = {"type": "function", "function": {"name": chat["tool_name"]}}
        body: dict[str, Any] = {"model": "model", "messages": chat["messages"]}
        if chat["tools"]:
            body |= {
                "tools": chat["tools"],
                "tool_choice": choice,
                "parallel_tool_calls": chat["parallel_tool_calls"],
            }
        return ChatCompletionRequest(**body)

    def parser(self, chat: Any) -> Any:
        """A parser for one answer."""
        if chat is None or self._parser is None:
            return None
        return self._parser(self._tokenizer, chat.tools, model_config=self._model_config)

    def _sampling(self, request: dict[str, Any], chat: Any) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        s = request["sampling"]
        structured = None
        skip_special = True
        if request["structure"] is not None:
            kind, value = request["structure"]
            names = {"json_schema": "json", "choice": "choice", "regex": "regex"}
            structured = StructuredOutputsParams(
                **{names.get(kind, kind): True if kind == "json_object" else value}
            )
        elif chat is not None:
            adjusted = self.parser(chat).adjust_request(chat)
            structured = adjusted.extract_structured_outputs()
            skip_special = adjusted.skip_special_tokens
        return SamplingParams(
            n=s["n"],
            max_tokens=s["max_tokens"],
            min_tokens=s["min_tokens"],
            temperature=s["temperature"],
            top_p=s["top_p"],
            top_k=s["top_k"],
            min_p=s["min_p"],
            frequency_penalty=s["frequency_penalty"],
            presence_penalty=s["presence_penalty"],
            repetition_penalty=s["repetition_penalty"],
            seed=s["seed"],
            stop=s["stop"] or None,
            stop_token_ids=s["stop_token_ids"] or None,
            ignore_eos=s["ignore_eos"],
            logprobs=s["logprobs"],
            logit_bias={int(k): v for k, v in s["logit_bias"].items()} or None,
            structured_outputs=structured,
            skip_special_tokens=skip_special,
            output_kind=RequestOutputKind.DELTA,
        )

    def stats(self) -> dict[str, Any]:
        """vLLM's own statistics."""
        return {"op": "stats", "stats": self._stats, "open": len(self._tasks)}


def _yield_to_front() -> None:
    """Let the engine's computing threads give way to those that hand its tokens on.

    On a CPU they fill all cores, and a thread that has to pass 32 tokens on would wait for a whole
    slice of each. It needs a hundredth of the time: giving way costs the engine next to nothing.
    """
    queue = [os.getpid()]
    while queue:
        pid = queue.pop()
        with contextlib.suppress(OSError, ValueError):
            for task in os.listdir(f"/proc/{pid}/task"):
                if pid != os.getpid():
                    os.setpriority(os.PRIO_PROCESS, int(task), ENGINE_NICENESS)
                with open(f"/proc/{pid}/task/{task}/children") as file:
                    queue += [int(c) for c in file.read().split()]


class _Answer:
    """One answer: text to typed deltas."""

    def __init__(self, worker: Worker, request: dict[str, Any], chat: Any, index: int) -> None:
        self._id = request["id"]
        self._index = index
        self._chat = chat
        self._prompt_ids = request["prompt_ids"]
        self._tokenizer = worker._tokenizer
        self._parser = None if request["structure"] is not None else worker.parser(chat)
        self._calls = False
        self._ids: list[int] = []
        self._reasoning = 0

    def delta(self, out: Any) -> list[Any]:
        """[id, "delta", index, text, tokens, reasoning, calls, logprobs, finish, stop, reasoning
        tokens]; trailing empty ones are left out."""
        text, reasoning, calls = out.text, "", []
        if self._parser is not None:
            text, reasoning, calls = self._parse(out)
        finish = out.finish_reason
        if finish is not None and finish not in ("stop", "length"):
            raise RuntimeError(f"vLLM ended the request with {finish!r}")
        if finish == "stop" and self._calls:
            finish = "tool_calls"
        stop = out.stop_reason if isinstance(out.stop_reason, str) else ""
        logprobs = self._logprobs(out) if out.logprobs else []
        row = [
            self._id,
            "delta",
            self._index,
            text,
            len(out.token_ids),
            reasoning,
            calls,
            logprobs,
            finish,
            stop,
            self._reasoning,
        ]
        while not row[-1]:
            row.pop()
        return row

    def _parse(self, out: Any) -> tuple[str, str, list[Any]]:
        ids = list(out.token_ids)
        message = self._parser.parse_delta(
            delta_text=out.text,
            delta_token_ids=ids,
            request=self._chat,
            prompt_token_ids=self._prompt_ids,
            finished=out.finish_reason is not None,
        )
        self._ids += ids
        if out.finish_reason is not None:
            self._reasoning = self._parser.count_reasoning_tokens(tuple(self._ids))
        if message is None:
            return "", "", []
        calls = []
        for call in message.tool_calls or []:
            self._calls = True
            function = call.function
            name = (function.name if function else "") or ""
            arguments = (function.arguments if function else "") or ""
            calls.append([call.index, (call.id if name else "") or "", name, arguments])
        return message.content or "", message.reasoning or "", calls

    def _logprobs(self, out: Any) -> list[Any]:
        rows = []
        for token, found in zip(out.token_ids, out.logprobs, strict=True):
            ranked = sorted(found.items(), key=lambda kv: kv[1].rank or 0)
            rows.append([self._one(token, found[token]), [self._one(t, p) for t, p in ranked]])
        return rows

    def _one(self, token: int, found: Any) -> list[Any]:
        text = found.decoded_token
        if text is None:
            text = self._tokenizer.decode([token])
        return [token, text, found.logprob]


async def serve(sock: socket.socket) -> None:
    """Until the server closes the socket."""
    reader, writer = await asyncio.open_connection(sock=sock)

    async def read() -> dict[str, Any]:
        (size,) = struct.unpack("<I", await reader.readexactly(4))
        if size > MAX_FRAME:
            raise ValueError("frame too large")
        return msgspec.msgpack.decode(await reader.readexactly(size))

    outbox = Outbox(writer)
    worker = Worker((await read())["spec"], outbox)
    try:
        facts = await worker.load()
    except BaseException as e:
        outbox.send({"op": "failed", "message": f"{type(e).__name__}: {e}"[:2000]})
        await writer.drain()
        raise
    outbox.send({"op": "ready", **facts})
    try:
        while True:
            message = await read()
            if message["op"] == "generate":
                worker.start(message["request"])
            elif message["op"] == "abort":
                await worker.abort(message["id"])
            elif message["op"] == "stats":
                outbox.send(worker.stats())
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        with contextlib.suppress(Exception):
            worker.llm.shutdown(timeout=2)


if __name__ == "__main__":
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    run: Any = asyncio.run
    with contextlib.suppress(ImportError):
        import uvloop

        run = uvloop.run
    run(serve(socket.socket(fileno=int(sys.argv[1]))))
    os._exit(0)  # nothing is left to do; interpreters with torch take seconds to say goodbye
