"""Writes version folders: files, manifest with hashes, atomically. The format is in docs/models.md."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import forebay

#: ONNX element types -> the Open Inference Protocol's names.
DATATYPES = {
    1: "FP32",
    2: "UINT8",
    3: "INT8",
    6: "INT32",
    7: "INT64",
    8: "BYTES",
    9: "BOOL",
    10: "FP16",
    11: "FP64",
}


class ExportError(Exception):
    """An export that failed; the message says why and what to do. `report` is kept when it is set."""

    report: dict[str, Any] | None = None


@contextlib.contextmanager
def version_folder(root: Path, model: str, version: int) -> Iterator[Path]:
    """A hidden folder that becomes `<root>/<model>/<version>` when the block ends well.

    A report of a failed export goes to `<root>/.failed/<model>-<version>.json`.

    Raises:
        ExportError: the version is there already.
    """
    final = must_be_new(root, model, version)
    folder = root / model / f".export-{version}-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
        folder.rename(final)
    except ExportError as e:
        shutil.rmtree(folder, ignore_errors=True)
        if e.report is None:
            raise
        kept = root / ".failed" / f"{model}-{version}.json"
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(json.dumps(e.report, indent=2) + "\n")
        raise ExportError(f"{e}; the report is {kept}") from e
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def is_whole(version: Path) -> bool:
    """Whether the files that a version's manifest names are there, in their sizes."""
    try:
        files = json.loads((version / "manifest.json").read_bytes())["files"]
        return all((version / n).stat().st_size == f["bytes"] for n, f in files.items())
    except (OSError, ValueError, LookupError, TypeError):
        return False


def must_be_new(root: Path, model: str, version: int) -> Path:
    """The version's folder. Raises ExportError when it is there already."""
    final = root / model / str(version)
    if final.exists():
        raise ExportError(f"{model}@{version} is there already; choose another version")
    return final


def sha256(path: Path) -> str:
    """Hash of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def signature(model: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Inputs and outputs of an ONNX file, as the manifest has them."""
    import onnx

    graph = onnx.load(str(model), load_external_data=False).graph
    constants = {i.name for i in graph.initializer}

    def describe(values: Any) -> list[dict[str, Any]]:
        out = []
        for value in values:
            tensor = value.type.tensor_type
            shape = [
                d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else -1
                for d in tensor.shape.dim
            ]
            out.append({"name": value.name, "dtype": DATATYPES[tensor.elem_type], "shape": shape})
        return out

    return describe([i for i in graph.input if i.name not in constants]), describe(graph.output)


def versions_of(packages: Sequence[str]) -> dict[str, str]:
    """Versions of installed packages, for the manifest."""
    return {p: metadata.version(p) for p in packages}


def write_manifest(
    folder: Path, task: str, *, libraries: Sequence[str] = (), **blocks: Any
) -> None:
    """Write manifest.json over all files of the folder. `blocks` are the manifest's other keys."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json")
    inputs, outputs = signature(folder / blocks.get("model_file", "model.onnx"))
    data = {
        "schema": 1,
        "task": task,
        "exporter": {
            "name": "forebay",
            "version": forebay.__version__,
            "libraries": versions_of(libraries),
        },
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "files": {
            str(p.relative_to(folder)): {"sha256": sha256(p), "bytes": p.stat().st_size}
            for p in files
        },
        "inputs": inputs,
        "outputs": outputs,
        **blocks,
    }
    (folder / "manifest.json").write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n")
