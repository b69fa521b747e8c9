"""The pages for Go and Node.js, followed from an empty folder: every file written, every command run.

`make test-pages`: they fetch and build packages for minutes, so that `make test` passes them over.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import ROOT, Live, Start, copy_models
from tests.integration.language_models import random_openvino

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        not os.environ.get("FOREBAY_TEST_PAGES"),
        reason="packages of Go and Node.js are fetched and built by `make test-pages` alone",
    ),
]
#: What a page's commands need, and what they say where a package registry cannot be reached.
TOOLS = {"go": "go", "node": "npm"}
TARGET = "localhost:50051"
OFFLINE = re.compile(r"dial tcp|EAI_AGAIN|ENOTFOUND|ECONNREFUSED .*:443|ETIMEDOUT")
BLOCK = re.compile(
    r"(?:`(?P<file>[\w./]+)`[^\n]*\n\n)?```(?P<kind>\w+)\n(?P<text>.*?)```\n", re.DOTALL
)


@dataclass
class Page:
    """A page's files in a folder of their own, its packages installed, its code generated."""

    folder: Path
    environ: dict[str, str]
    #: The commands that call a server, with what they say where the page tells.
    calls: list[tuple[str, str]]

    def run(self, command: str, **environ: str) -> str:
        """What the commands say, in the end's order: all of stdout, then all of stderr."""
        done = subprocess.run(
            ["bash", "-euc", command],
            cwd=self.folder,
            env=self.environ | environ,
            capture_output=True,
            text=True,
        )
        said = done.stdout + done.stderr
        if done.returncode and OFFLINE.search(said):
            pytest.skip("no network to fetch packages")
        assert done.returncode == 0, said
        return said


@pytest.fixture(scope="module", params=["go", "node"])
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Page:
    name = request.param
    if shutil.which(TOOLS[name]) is None:
        pytest.skip(f"no {TOOLS[name]}")
    tree = tmp_path_factory.mktemp(name)
    (tree / "forebay").symlink_to(ROOT)
    tools = tree / "bin"
    tools.mkdir()
    protoc = tools / "protoc"
    protoc.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m grpc_tools.protoc "$@"\n')
    protoc.chmod(0o755)
    (tools / "buf").symlink_to(Path(sys.executable).parent / "buf")
    environ = {k: v for k, v in os.environ.items() if not k.startswith("FOREBAY_")}
    environ |= {"PATH": f"{tools}{os.pathsep}{environ['PATH']}", "GOBIN": str(tools)}
    made = Page(tree, environ, [])
    blocks = list(BLOCK.finditer((ROOT / "docs" / f"{name}.md").read_text()))
    commands = [b for b in blocks if b["kind"] == "sh"]
    made.run(commands[0]["text"])
    made.folder = tree / "app"
    for block in blocks:
        if block["file"] and block["kind"] not in ("sh", "text"):
            path = made.folder / block["file"]
            path.parent.mkdir(exist_ok=True)
            path.write_text(block["text"])
    if name == "node":
        made.run("npm install grpc-health-check")
    answers = {b.start(): b["text"] for b in blocks if b["kind"] == "text"}
    for block in commands[1:]:
        if "FOREBAY_" in block["text"]:
            continue  # a server by TLS
        if TARGET in block["text"]:
            made.calls.append((block["text"], answers.get(block.end() + 1, "")))
        else:
            made.run(block["text"])
    return made


@pytest.fixture(scope="module")
def live(starters: Path, start: Start, tmp_path_factory: pytest.TempPathFactory) -> Live:
    models = copy_models(
        starters, tmp_path_factory.mktemp("m") / "models", "iris", "sentiment", "minilm"
    )
    return start(random_openvino(models))


def test_the_page_is_true(page: Page, live: Live) -> None:
    for command, expected in page.calls:
        said = page.run(command.replace(TARGET, live.target))
        assert said and without_scores(said).endswith(without_scores(expected)), said


def without_scores(text: str) -> str:
    """Scores depend on the engine."""
    return re.sub(r"0\.\d+", "0.", text)
