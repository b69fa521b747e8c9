"""The Go example, built from the contract and run: ChatStream by grpc-go with generated code."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from forebay.v1 import generation_pb2_grpc

from tests.conftest import ROOT, Start
from tests.integration.chats import text_of, user
from tests.integration.language_models import random_openvino, random_vllm, vllm_python

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
PLUGINS = (
    "google.golang.org/protobuf/cmd/protoc-gen-go@v1.36.10",
    "google.golang.org/grpc/cmd/protoc-gen-go-grpc@v1.5.1",
)


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's program."""
    if shutil.which("go") is None:
        pytest.skip("no Go toolchain: https://go.dev/dl")
    tree = tmp_path_factory.mktemp("go")
    source = tree / "examples" / "go" / "chat"
    ignored = shutil.ignore_patterns("gen", "go.sum")
    shutil.copytree(ROOT / "examples" / "go" / "chat", source, ignore=ignored)
    shutil.copytree(ROOT / "protos", tree / "protos")
    tools = str(tree / "bin")
    path = os.pathsep.join([tools, str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "GOBIN": tools, "PATH": path, "GOFLAGS": "-mod=mod"}

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=source, env=env, capture_output=True, text=True)
        if done.returncode and "dial tcp" in done.stderr:
            pytest.skip("no network to fetch the Go modules")
        assert done.returncode == 0, done.stderr
        return done.stdout

    for plugin in PLUGINS:
        run("go", "install", plugin)
    run("go", "generate", "./...")
    assert run("gofmt", "-l", "main.go") == ""
    run("go", "vet", "./...")
    run("go", "build", "-o", tools + "/chat", ".")
    return Path(tools, "chat")


@pytest.mark.parametrize("engine", ["openvino", "vllm"])
def test_go_streams_a_chat(
    chat: Path, engine: str, start: Start, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("models")
    if engine == "vllm":
        python = vllm_python()
        live = start(random_vllm(root), generation__vllm_python=python, generation__vllm_cache_gb=1)
    else:
        live = start(random_openvino(root))
    stub = generation_pb2_grpc.GenerationServiceStub(live.channel)
    alone = stub.Chat(user("Who are you?", max_tokens=512)).choices[0]
    command = [str(chat), live.target, "tiny", "Who are you?"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    text, _, end = done.stdout.rpartition("\n[")
    assert text and text == text_of(alone)
    assert end.startswith("FINISH_REASON_") and " tokens in, " in end
    command[2] = "tyni"
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "NotFound" in done.stderr and "tiny" in done.stderr
