"""Generates the contract's Python modules and type stubs from protos/ into contract/.

Proto packages and Python packages have the same names, so nothing is rewritten afterwards.
Also writes contract/forebay/contract.binpb, the descriptor set with comments, from which the
gateway and the documentation take the words of the contract.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import google.api
import grpc_tools
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
OUT = ROOT / "contract"
GENERATED = ("v1", "options", "oip", "twin")


def main() -> int:
    """Generate; returns protoc's exit status."""
    for name in GENERATED:
        shutil.rmtree(OUT / "forebay" / name, ignore_errors=True)
    files = sorted(str(p.relative_to(PROTOS)) for p in (PROTOS / "forebay").rglob("*.proto"))
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    assert google.api  # googleapis-common-protos holds the generated google.api modules
    status = protoc.main(
        [
            "protoc",
            f"-I{PROTOS}",
            f"-I{well_known}",
            f"--python_out={OUT}",
            f"--pyi_out={OUT}",
            f"--grpc_python_out={OUT}",
            f"--descriptor_set_out={OUT / 'forebay' / 'contract.binpb'}",
            "--include_source_info",
            "--include_imports",
            *files,
        ]
    )
    for stub in (OUT / "forebay").rglob("*_pb2_grpc.py"):
        # A file without a service gives an empty stub module.
        if "class " not in stub.read_text():
            stub.unlink()
    for folder in [d for n in GENERATED for d in (OUT / "forebay" / n).rglob("*") if d.is_dir()]:
        if folder.name != "__pycache__":
            (folder / "__init__.py").touch()
    for name in GENERATED:
        (OUT / "forebay" / name / "__init__.py").touch()
    return status


if __name__ == "__main__":
    sys.exit(main())
