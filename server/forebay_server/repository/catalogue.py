"""What the repository's folders say: models, versions, model.yaml, tasks. Loads nothing."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from pathlib import Path

from forebay.errors import ForebayError, NotFound

from forebay_server.repository.manifest import ModelConfig, read_config, read_manifest, rejected
from forebay_server.repository.routing import nearest, some
from forebay_server.repository.scan import NAME, FolderModel, scan

log = logging.getLogger("forebay.repository")


class Catalogue:
    """See the module. Other threads read it: its dictionaries are replaced as a whole.

    Attributes:
        folders: by model.
        configs: what each model.yaml says, where it can be read.
        faults: why the others cannot.
        tasks: by model, as far as its files say or it has been loaded.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folders: dict[str, FolderModel] = {}
        self.configs: dict[str, ModelConfig] = {}
        self.faults: dict[str, str] = {}
        self.tasks: dict[str, str] = {}

    async def read(self) -> None:
        """See what is new in the folders."""
        found = await asyncio.to_thread(scan, self.root)
        configs: dict[str, ModelConfig] = {}
        faults: dict[str, str] = {}
        for name, folder in found.items():
            try:
                configs[name] = read_config(folder.folder / "model.yaml")
            except ForebayError as e:
                if self.faults.get(name) != e.message:  # said once, not at every look
                    log.error("model %s: %s", name, e.message)
                faults[name] = e.message
        new = {n: f for n, f in found.items() if n not in self.tasks}
        said = await asyncio.to_thread(_tasks, new)
        self.tasks = {n: t for n, t in {**said, **self.tasks}.items() if n in found}
        self.folders, self.configs, self.faults = found, configs, faults

    def folder(self, name: str) -> FolderModel:
        """A model's folder. Raises NotFound; names the nearest."""
        folder = self.folders.get(name)
        if folder is None:
            if NAME.fullmatch(name) and (self.root / name).is_dir():
                text = (
                    f"model {name!r} was not found: its folder has no version folder, named by a "
                    "number from 1, and no model file"
                )
                raise NotFound("model", name, message=text)
            raise NotFound(
                "model", name, nearest=nearest(name, self.folders), known=some(self.folders)
            )
        return folder

    def config(self, name: str) -> ModelConfig:
        """A model's model.yaml. Raises FailedPrecondition (MODEL_REJECTED) naming its fault."""
        if name in self.faults:
            raise rejected(self.faults[name])
        return self.configs[name]

    def task_of(self, name: str) -> str:
        """A model's task; empty where it is not known."""
        return self.tasks.get(name, "")

    def learn(self, name: str, task: str) -> None:
        """Keep in mind what a model does: not every folder says it before it is loaded."""
        self.tasks = {**self.tasks, name: task}


def _tasks(folders: Mapping[str, FolderModel]) -> dict[str, str]:
    """Tasks of models whose newest version has a manifest that can be read."""
    out: dict[str, str] = {}
    for name, folder in folders.items():
        manifest = folder.versions[max(folder.versions)] / "manifest.json"
        with contextlib.suppress(ForebayError, OSError):
            if manifest.exists():
                out[name] = read_manifest(manifest).task
    return out
