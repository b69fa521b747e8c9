"""Language models from Hugging Face folders to OpenVINO's form, for the embedded engine. No torch.

    python -m forebay_exporters.openvino_export <folder> <new folder>

Needs the extra `openvino-export` (transformers, for the tokenizer's graph).
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forebay_exporters.artefact import ExportError

#: Files that are served as they are.
KEPT = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


def convert(source: Path, out: Path, say: Callable[[str], None] = lambda _: None) -> None:
    """Convert a folder, whole or not at all. Raises llama_graph.NotConvertible."""
    os.environ["OPENVINO_TELEMETRY_DISABLE"] = "1"
    import openvino as ov
    from openvino_tokenizers import convert_tokenizer
    from transformers import AutoTokenizer

    from forebay_exporters.llama_graph import build

    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    say("reading the weights")
    model = build(source)
    say("writing openvino_model.xml")
    ov.save_model(model, str(part / "openvino_model.xml"), compress_to_fp16=False)
    say("converting the tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    graphs: Any = convert_tokenizer(tokenizer, with_detokenizer=True)
    for name, graph in zip(("tokenizer", "detokenizer"), graphs, strict=True):
        ov.save_model(graph, str(part / f"openvino_{name}.xml"))
    for name in KEPT:
        if (source / name).exists():
            shutil.copy(source / name, part / name)
    shutil.rmtree(out, ignore_errors=True)
    part.rename(out)


def export_language_model(
    source: Path, root: Path, name: str, version: int, say: Callable[[str], None] = lambda _: None
) -> Path:
    """Put a converted folder at `<root>/<name>/<version>`. Raises ExportError."""
    out = root / name / str(version)
    if out.exists():
        raise ExportError(f"{out} is there already")
    try:
        convert(source, out, say)
    except ImportError as e:
        raise ExportError(f"{e.name} is missing: pip install 'forebay[openvino-export]'") from None
    except (OSError, KeyError, ValueError) as e:  # NotConvertible is a ValueError
        shutil.rmtree(out.with_name(f".{out.name}.part"), ignore_errors=True)
        raise ExportError(f"{source.name} cannot be converted: {e}") from None
    return out


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]), print)
