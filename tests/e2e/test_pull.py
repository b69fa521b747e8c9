"""`forebay pull` by the real huggingface_hub client, against a local server of the hub's file API."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A hub whose repositories are the folders of a directory; gives its address and the directory."""
    root = tmp_path / "hub"
    root.mkdir()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            parts = self.path.partition("?")[0].strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                return self._info("/".join(parts[2:4]))
            if len(parts) > 4 and parts[2] == "resolve":
                return self._file(root / parts[0] / parts[1] / "/".join(parts[4:]))
            return self._send(404, b"")

        def _info(self, repo: str) -> None:
            folder = root / repo
            if not folder.is_dir():
                return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            files = [p for p in folder.rglob("*") if p.is_file()]
            names = [{"rfilename": str(p.relative_to(folder))} for p in files]
            body = {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": names, "tags": []}
            return self._send(200, json.dumps(body).encode())

        def _file(self, path: Path) -> None:
            if not path.is_file():
                return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            data = path.read_bytes()
            etag = hashlib.sha1(data).hexdigest()
            return self._send(200, data, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

        def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", root
    server.shutdown()


def pull(address: str, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {
        **os.environ,
        "HF_ENDPOINT": address,
        "HF_HOME": str(home / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "FOREBAY_HOME": str(home),
    }
    env.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-m", "forebay_cli", "pull", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)


def test_an_onnx_file_of_the_hub_is_served_as_it_is(hub, starters: Path, tmp_path: Path) -> None:
    address, root = hub
    repo = root / "org" / "encoder"
    (repo / "onnx").mkdir(parents=True)
    os.link(starters / "minilm" / "1" / "model.onnx", repo / "onnx" / "model.onnx")
    os.link(starters / "minilm" / "1" / "tokenizer.json", repo / "tokenizer.json")
    config = {"architectures": ["BertModel"], "hidden_size": 384, "max_position_embeddings": 512}
    (repo / "config.json").write_text(json.dumps(config))
    done = pull(address, tmp_path / "home", "org/encoder", "--name", "enc")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "home" / "models" / "enc" / "1"
    assert COMMIT in (folder / "PULLED").read_text()
    from forebay_server.repository.inspect import describe

    manifest = describe(folder)
    assert manifest.task == "embedding"
    assert manifest.embedding_head.dimensions == 384


def test_what_is_there_already_is_said_before_anything_is_fetched(hub, tmp_path: Path) -> None:
    (tmp_path / "home" / "models" / "enc" / "1").mkdir(parents=True)
    done = pull(hub[0], tmp_path / "home", "org/nothing", "--name", "enc")
    assert done.returncode == 1
    assert "is there already" in done.stderr


def test_another_precision_is_not_taken_from_an_fp32_file(
    hub, starters: Path, tmp_path: Path
) -> None:
    address, root = hub
    repo = root / "org" / "encoder"
    repo.mkdir(parents=True)
    os.link(starters / "minilm" / "1" / "model.onnx", repo / "model.onnx")
    os.link(starters / "minilm" / "1" / "tokenizer.json", repo / "tokenizer.json")
    done = pull(address, tmp_path / "home", "org/encoder", "--precision", "int8")
    assert done.returncode == 1
    assert "safetensors" in done.stderr
    assert not (tmp_path / "home" / "models" / "encoder").exists()


def test_pickles_alone_are_refused(hub, tmp_path: Path) -> None:
    address, root = hub
    repo = root / "org" / "old"
    repo.mkdir(parents=True)
    (repo / "pytorch_model.bin").write_bytes(b"x")
    (repo / "tokenizer.json").write_text("{}")
    done = pull(address, tmp_path / "home", "org/old")
    assert done.returncode == 1
    assert "pytorch_model.bin" in done.stderr
    assert not (tmp_path / "home" / "models" / "old").exists()


def test_a_model_that_is_not_there_is_said(hub, tmp_path: Path) -> None:
    done = pull(hub[0], tmp_path / "home", "org/nothing")
    assert done.returncode == 1
    assert "not on the hub" in done.stderr


def test_a_hub_that_is_away_is_said_in_one_line(tmp_path: Path) -> None:
    done = pull("http://127.0.0.1:9", tmp_path / "home", "org/model")
    assert done.returncode == 1
    assert done.stderr.startswith("forebay: the hub cannot be reached"), done.stderr
    assert "Traceback" not in done.stderr
