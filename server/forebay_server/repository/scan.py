"""Which models and versions a repository folder holds, and which of them are wanted."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from forebay.errors import NotFound

from forebay_server.repository.manifest import ModelConfig, rejected
from forebay_server.repository.state import Routing

#: As the contract has them.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
MAX_VERSION = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class FolderModel:
    """A model's folder with its versions' folders."""

    name: str
    folder: Path
    versions: dict[int, Path]

    def require(self, version: int) -> None:
        """Raises NotFound when there is no such version; names the newest."""
        if version not in self.versions:
            newest = [f"{self.name}@{v}" for v in sorted(self.versions)[-3:]]
            raise NotFound("model version", f"{self.name}@{version}", nearest=newest)

    def wanted(self, config: ModelConfig, routing: Routing) -> list[int]:
        """Versions that should be loaded, by policy and by what points to them."""
        have = sorted(self.versions)
        policy = config.version_policy
        if policy == "all":
            wanted = set(have)
        elif policy == "latest":
            wanted = {have[-1]}
        else:
            wanted = {v for v in policy if v in self.versions}
        return sorted(wanted | (routing.versions & set(have)))

    def served(self, config: ModelConfig, routing: Routing) -> list[int]:
        """As `wanted`. Raises FailedPrecondition (MODEL_REJECTED) when it wants none that is there."""
        wanted = self.wanted(config, routing)
        if not wanted:
            have = ", ".join(map(str, sorted(self.versions)))
            raise rejected(
                f"model.yaml: version_policy is {config.version_policy}; "
                f"the versions of {self.name} are {have}"
            )
        return wanted


def scan(root: Path) -> dict[str, FolderModel]:
    """Models by name. A folder without numbered ones is itself version 1.

    Names with a leading dot (uploads that are not done) are left out, as are empty folders.
    """
    out: dict[str, FolderModel] = {}
    if not root.is_dir():
        return out
    for folder in sorted(root.iterdir()):
        if not folder.is_dir() or not NAME.fullmatch(folder.name):
            continue
        versions = {
            int(p.name): p
            for p in folder.iterdir()
            if p.is_dir()
            and p.name.isascii()
            and p.name.isdigit()
            and 0 < int(p.name) <= MAX_VERSION
        }
        if not versions and _is_artefact(folder):
            versions = {1: folder}
        if versions:
            out[folder.name] = FolderModel(folder.name, folder, versions)
    return out


def _is_artefact(folder: Path) -> bool:
    """Also what cannot be served: it is then in the index, with the reason."""
    return (
        (folder / "manifest.json").exists()
        or (folder / "config.json").exists()
        or (folder / "onnx" / "model.onnx").exists()
        or any(folder.glob("*.onnx"))
        or (folder / "openvino_model.xml").exists()
        or any(folder.glob("*.safetensors"))
        or any(p.suffix in (".pkl", ".joblib", ".bin", ".pt") for p in folder.iterdir())
    )
