"""An OpenAI-compatible server of somebody else's: it says what its script says."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Script = Callable[[list[dict[str, str]]], str]


class ScriptedUpstream:
    """Answers chats by `script`, which gets the messages; `asked` keeps the last message of each,
    `bodies` the whole requests. With `dies_after` it closes after so many pieces; with `refuses` what it
    says is a refusal, and `then_refuses` is one that comes behind what it says."""

    def __init__(self) -> None:
        self.script: Script = lambda messages: "Hello."
        self.asked: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.pause_s = 0.0
        self.dies_after: int | None = None
        self.refuses = False
        self.then_refuses = ""
        self.cut_off = threading.Event()
        upstream = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                messages = body.get("messages") or [{"content": body["prompt"]}]
                upstream.bodies.append(body)
                upstream.asked.append(messages[-1]["content"])
                text = upstream.script(messages)
                self.send_response(200)
                self.send_header("content-type", "text/event-stream")
                self.send_header("connection", "close")
                self.end_headers()
                self.close_connection = True
                said = "refusal" if upstream.refuses else "content"
                pieces = [(said, text[i : i + 4]) for i in range(0, len(text), 4)]
                if upstream.then_refuses:
                    pieces.append(("refusal", upstream.then_refuses))
                try:
                    for kind, piece in pieces[: upstream.dies_after]:
                        self.event({"delta": {kind: piece}, "text": piece, "finish_reason": None})
                        time.sleep(upstream.pause_s)
                    if upstream.dies_after is not None:
                        return
                    self.event({"delta": {}, "finish_reason": "stop"})
                    usage = {"prompt_tokens": 100, "completion_tokens": len(pieces)}
                    self.event(None, usage={**usage, "total_tokens": 100 + len(pieces)})
                    self.wfile.write(b"data: [DONE]\n\n")
                except (BrokenPipeError, ConnectionResetError):
                    upstream.cut_off.set()

            def event(self, choice: dict[str, Any] | None, usage: Any = None) -> None:
                chunk = {
                    "id": "x",
                    "object": "chat.completion.chunk",
                    "created": 0,
                    "model": "scripted",
                    "choices": [] if choice is None else [{"index": 0, **choice}],
                    "usage": usage,
                }
                self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
                self.wfile.flush()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        """Stop."""
        self._server.shutdown()
        self._server.server_close()
