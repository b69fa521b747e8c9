"""The Dockerfiles' install steps as far as a shell without a container engine can go."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
FILES = ("Dockerfile", "Dockerfile.gpu")


def instructions(name: str) -> list[tuple[str, str]]:
    """(instruction, arguments) with continued lines joined and comments dropped."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / name).read_text(), flags=re.MULTILINE)
    joined = text.replace("\\\n", " ")
    return [
        (line.split()[0], line.partition(" ")[2].strip()) for line in joined.splitlines() if line
    ]


def copied(name: str) -> list[str]:
    """What the build stage takes from the checkout."""
    out: list[str] = []
    for instruction, arguments in instructions(name):
        if instruction == "COPY" and "--from" not in arguments:
            out += arguments.split()[:-1]
    return out


def steps(name: str, tool: str) -> list[list[str]]:
    """The commands of RUN whose words contain `tool`, as words."""
    commands = (a.split("&&") for i, a in instructions(name) if i == "RUN")
    words = [shlex.split(one) for group in commands for one in group]
    return [w for w in words if tool in " ".join(w)]


@pytest.mark.parametrize("name", FILES)
def test_what_is_copied_is_there_and_not_ignored(name: str) -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    for path in copied(name):
        assert (ROOT / path).exists(), path
        assert path not in ignored, path


@pytest.mark.parametrize("name", FILES)
def test_extras_are_known(name: str) -> None:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = [
        extra
        for words in steps(name, "uv pip install")
        for word in words
        if word.startswith(".[")
        for extra in word[2:-1].split(",")
    ]
    assert asked
    assert set(asked) <= set(known)


@pytest.mark.parametrize("name", FILES)
def test_the_images_have_what_deploy_needs(name: str) -> None:
    """Databases and caches that replicas share."""
    installed = next(w for words in steps(name, "uv pip install") for w in words if "[" in w)
    assert {"postgres", "redis"} <= set(installed[2:-1].split(","))
    pinned = (ROOT / "constraints.txt").read_text()
    assert re.search(r"^asyncpg==", pinned, flags=re.MULTILINE)


@pytest.mark.parametrize("name", FILES)
def test_it_does_not_run_as_root(name: str) -> None:
    users = [a for i, a in instructions(name) if i == "USER"]
    assert users and users[-1].isdigit() and int(users[-1]) > 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_cpu_images_install_gives_a_command_that_runs(tmp_path: Path) -> None:
    """The build stage's own commands on the files that it copies, in another place."""
    source, target = tmp_path / "src", tmp_path / "forebay"
    source.mkdir()
    for path in copied("Dockerfile"):
        if (ROOT / path).is_dir():
            tracked = subprocess.run(
                ["git", "ls-files", path], cwd=ROOT, capture_output=True, text=True, check=True
            ).stdout.split()
        else:
            tracked = [path]
        for file in tracked:
            (source / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, source / file)
    environment = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH")}
    uv = str(Path(sys.executable).parent / "uv")
    commands = [w for w in steps("Dockerfile", "uv") if w[0] == "uv"]
    assert [w[1] for w in commands] == ["venv", "pip"]
    for words in commands:
        # The cache of this machine is used: an image's layer has no use for one.
        command = [w.replace("/opt/forebay", str(target)) for w in words[1:] if w != "--no-cache"]
        done = subprocess.run(
            [uv, *command], cwd=source, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
    shutil.rmtree(source)  # nothing of the image may need the sources
    command = next(a for i, a in instructions("Dockerfile") if i == "CMD")
    assert command == '["forebay", "up"]'
    for words in (["config"], ["export", "tune", "--help"]):
        done = subprocess.run(
            [target / "bin" / "forebay", *words],
            cwd=tmp_path,
            env=environment | {"FOREBAY_HOME": str(tmp_path / "home")},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    imports = (
        "import asyncpg, openvino, faiss, onnxruntime, forebay_gateway, forebay_exporters.starters"
    )
    python = [str(target / "bin" / "python"), "-c", imports]
    done = subprocess.run(python, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
