"""What a peer is: pinned packages in an environment of its own, a server script, configurations."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from benchmarks.common import ROOT
from benchmarks.peers.doors import Door
from benchmarks.processes import Processes

HERE = Path(__file__).resolve().parent
#: Kept between runs, ignored by git.
ENVIRONMENTS = ROOT / ".venv-peers"
Kind = Literal["forest", "minilm"]
Role = Literal["forebay", "peer", "limit"]
Ports = Mapping[str, int]


class NotInstalled(Exception):
    """A peer's environment cannot be made here."""


@dataclass(frozen=True)
class Candidate:
    """A server in one configuration, ready to be started and measured.

    Attributes:
        start: (ports, an empty folder) to its processes. Ports are free ones, by "grpc" and "http".
        doors: (its folder, the workload's name) to the ways in. The folder may hold a key to send.
        cosine: how near to the reference its answers must be, as vectors.
    """

    name: str
    config: str
    role: Role
    start: Callable[[Ports, Path], Processes]
    doors: Callable[[Path, str], tuple[Door, ...]]
    cosine: float = 0.9999

    @property
    def label(self) -> str:
        """Name and configuration."""
        return f"{self.name} {self.config}".strip()


@dataclass(frozen=True)
class Config:
    """A configuration: arguments of the peer's server script."""

    name: str
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True)
class Peer:
    """A system that Forebay is measured beside.

    Attributes:
        packages: what its environment holds, pinned.
        configs: by model, the ones measured; the best of them counts, door by door.
        tried: by model, others that were tried and lost: `--all-configs` measures them too.
        doors: by model, the ways in.
        python: the version of Python it needs.
    """

    name: str
    packages: tuple[str, ...]
    configs: Mapping[Kind, tuple[Config, ...]]
    doors: Callable[[Kind], tuple[Door, ...]]
    tried: Mapping[Kind, tuple[Config, ...]] = field(default_factory=dict)
    python: str = "3.11"
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def interpreter(self) -> Path:
        """Python of its environment."""
        return ENVIRONMENTS / self.name / "bin" / "python"

    def installed(self) -> bool:
        """Whether its environment holds just these packages."""
        stamp = ENVIRONMENTS / self.name / ".packages"
        return stamp.exists() and stamp.read_text() == "\n".join(self.packages)

    def install(self) -> None:
        """Make its environment, if it is not there.

        Raises:
            NotInstalled: with the installer's last lines.
        """
        if self.installed():
            return
        ENVIRONMENTS.mkdir(exist_ok=True)
        uv = shutil.which("uv", path=os.pathsep.join([str(ROOT / ".venv/bin"), os.environ["PATH"]]))
        if uv is None:
            raise NotInstalled("uv is needed: make .venv/bin/uv")
        folder = ENVIRONMENTS / self.name
        steps = [
            [uv, "venv", "--quiet", "--clear", "--python", _python(self.python), str(folder)],
            [uv, "pip", "install", "--quiet", "--python", str(self.interpreter), *self.packages],
        ]
        for step in steps:
            done = subprocess.run(step, capture_output=True, text=True)
            if done.returncode:
                raise NotInstalled(done.stderr.strip()[-500:])
        (folder / ".packages").write_text("\n".join(self.packages))

    def candidates(self, kind: Kind, model: Path, every: bool = False) -> list[Candidate]:
        """Its configurations for a model's folder (`model.onnx`, `tokenizer.json`)."""
        chosen = self.configs.get(kind, ()) + (self.tried.get(kind, ()) if every else ())
        return [
            Candidate(
                self.name,
                config.name,
                "peer",
                lambda ports, home, c=config: self._start(kind, model, c, ports, home),
                lambda _home, _workload: self.doors(kind),
            )
            for config in chosen
        ]

    def _start(
        self, kind: Kind, model: Path, config: Config, ports: Ports, home: Path
    ) -> Processes:
        command = [str(self.interpreter), str(HERE / self.name / "server.py"), kind, str(model)]
        command += ["--grpc-port", str(ports["grpc"]), "--http-port", str(ports["http"])]
        environment = {
            "PYTHONPATH": str(HERE / "served"),
            "PATH": os.pathsep.join([str(self.interpreter.parent), os.environ["PATH"]]),
            **{k: v.format(root=ROOT) for k, v in self.environment.items()},
        }
        return Processes([*command, *config.arguments], home / "log", environment, home)


def _python(version: str) -> str:
    """An interpreter of this version: this one, one of pyenv's, or what uv finds by its number."""
    if f"{sys.version_info.major}.{sys.version_info.minor}" == version:
        return sys.executable
    kept = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    return str(kept[-1]) if kept else version
